"""Tiny models of many more real classes of diffusers and transformers, each with a small plan.

``CASES`` has a builder of ``(model, inputs)``, the plan (None: the model's own), and what is to be expected.
"""

from __future__ import annotations

from zoo_others_base import CASES, Other

# isort: off
# In the order of their tests.
import zoo_others_transformers  # noqa: F401
import zoo_others_diffusers  # noqa: F401
# isort: on

__all__ = ["CASES", "Other"]
