"""Where whole values meet split ones: what becomes of gradients, and what cannot have any."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxsp.hooks.region import Region
from fxsp.hooks.where import refuse
from fxsp.kernels.ops import as_view
from fxsp.kernels.ops import fxsp_ops as _ops
from fxsp.torch_internals import custom_function

__all__ = ["check_history", "use"]


def check_history(x: Tensor) -> None:
    """Refuse what a custom ``autograd.Function`` made of split values: its backward would get this rank's rows, of
    which nothing tells it that they are not all tokens."""
    made_by = custom_function(x.grad_fn)
    if made_by:
        refuse(made_by, "is an autograd.Function whose backward cannot tell this rank's tokens from all of them")


def use(x: Any, region: Region) -> Any:
    """A whole value as an operand of split ones."""
    if not isinstance(x, Tensor) or not torch.is_grad_enabled() or not x.requires_grad:
        return x
    if torch.compiler.is_compiling():
        return _ops.use.default(x, region.group)
    return as_view("use", x, region.group)
