"""Constructs that few think of, for ranks in one process; each says what becomes of its tokens."""

from __future__ import annotations

from construct_variants_base import GATHERED, SPLIT, WHOLE

# isort: off
# In the order of their tests.
import construct_variants_flow  # noqa: F401
import construct_variants_modes  # noqa: F401
import construct_variants_calls  # noqa: F401
import construct_variants_tensors  # noqa: F401
# isort: on

__all__ = ["GATHERED", "SPLIT", "WHOLE"]
