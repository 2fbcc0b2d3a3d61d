"""``fxsp.scale_grad``: a value as it is, whose gradient is multiplied.

Where gradients are left to an outer reducer that takes the mean over the ranks, a summand counts as often as there are
ranks (see :mod:`fxsp.summands`).  As an operator it lives until AOTAutograd has seen it; then it is nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["DEFERRED_OPS", "register"]

#: Name of an op -> its schema.
DEFERRED_OPS: dict[str, str] = {"scale_grad": "(Tensor x, int factor) -> Tensor"}


def _fake(x: Tensor, factor: int) -> Tensor:
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=x.device)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.factor = inputs[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return grad * ctx.factor, None


def register(library: torch.library.Library) -> None:
    """Define the ops of this file."""
    for name, schema in DEFERRED_OPS.items():
        library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, lambda x, factor: x.clone(), "CompositeExplicitAutograd")
        torch.library.register_fake(f"fxsp::{name}", _fake, lib=library)
        torch.library.register_autograd(f"fxsp::{name}", _backward, setup_context=_setup, lib=library)
