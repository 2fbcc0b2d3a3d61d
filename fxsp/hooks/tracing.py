"""Which compiler is looking: hooks stand aside for backend ``"sp"``, which follows the plan itself."""

from __future__ import annotations

import torch

from fxsp.backend import sp
from fxsp.torch_internals import Translation, backend_layers

__all__ = ["sp_is_tracing"]


@torch.compiler.assume_constant_result
def sp_is_tracing() -> bool:
    """Whether Dynamo traces for backend ``"sp"``.  Called while it traces; its answer is a constant of the graph."""
    translation = Translation.current()
    if translation is None:
        return False
    ours = any(layer is sp for layer in backend_layers(translation.compiler()))
    if ours:
        translation.say("hooks of sequence parallelism stand aside: the plan is compiled")
    return ours
