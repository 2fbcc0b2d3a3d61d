"""All contact with private torch API: one small, well-named function for each thing that is needed.

Supported torch: 2.11 to 2.15.  Nothing else in fxsp imports a name of torch that begins with an underscore.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

# --- simulation: operators and tracing on fakes ----------------------------------------------------------------------


def is_operator(target: Any) -> bool:
    """Whether a node's target is an overload of a registered operator (``torch.ops.aten.add.Tensor``)."""
    return isinstance(target, torch._ops.OpOverload)


def schema(target: Any) -> Any:
    """The schema of an operator overload: ``name``, ``arguments``, ``is_mutable``."""
    return target._schema


def trace_on_fakes(function: Callable[..., Any], inputs: Sequence[Any]) -> torch.fx.GraphModule:
    """``function`` as an ATen graph below autograd, static shapes; tensors it closes over become constants."""
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
