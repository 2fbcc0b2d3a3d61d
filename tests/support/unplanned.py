"""Small modules of structures that no library has, or has otherwise: nobody has written a plan for them.

:data:`MODULES`: name -> ``() -> (module, inputs)``, the module in eval mode.  :data:`HELD`: those that gather in their
midst, and the operator that has to be named for it.
"""

from __future__ import annotations

from unplanned_base import MODULES, Block

# isort: off
# In the order of their tests.
import unplanned_tokens  # noqa: F401
import unplanned_attentions  # noqa: F401
# isort: on

__all__ = ["HELD", "MODULES", "Block"]

HELD = {
    "RunningMean": "aten.cumsum",
    "FourierMixing": "aten.fft_fft",
    "KeptTokens": "aten.topk",
    "Windows": "aten.reshape",
}
