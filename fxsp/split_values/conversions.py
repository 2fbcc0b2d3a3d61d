"""Into split values and out of them; gradients pass.

``R`` is a whole value, ``S`` this rank's part of it: in its wrapper (:class:`fxsp.SplitTensor`), or as a plain tensor,
which is what the program of a rank takes and returns.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxsp import torch_internals
from fxsp.split_values.convert import masked, sharded
from fxsp.split_values.value import Placed, SplitTensor, dense

__all__ = ["from_local", "made_whole", "split_as", "to_local", "whole"]


class _ToLocal(torch.autograd.Function):
    """``S -> S``: out of its wrapper."""

    @staticmethod
    def forward(ctx: Any, x: SplitTensor) -> Tensor:
        ctx.placed, ctx.shape = x.placed, x.shape
        return x.local().detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return SplitTensor(dense(grad), Placed(ctx.placed.type, ctx.placed.ranks, zero_pads=True), ctx.shape)


class _FromLocal(torch.autograd.Function):
    """``S -> S``: into its wrapper."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, placed: Placed, shape: Any) -> SplitTensor:
        ctx.placed = placed
        return SplitTensor(dense(local.detach()), placed, shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _rows_of_gradient(grad, ctx.placed), None, None


class _Cut(torch.autograd.Function):
    """``R -> S``, and into a wrapper."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, placed: Placed) -> SplitTensor:
        return SplitTensor(dense(sharded(x.detach(), placed.type, placed.ranks)), placed, x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad.gathered() if isinstance(grad, SplitTensor) else grad), None


class _ToWhole(torch.autograd.Function):
    """``S -> R``."""

    @staticmethod
    def forward(ctx: Any, x: SplitTensor, op: str) -> Tensor:
        return x.gathered(op).detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _rows_of_gradient(grad: Tensor, placed: Placed) -> Tensor:
    """This rank's part of a gradient, which is whole or split, with zero pads."""
    type_, ranks = placed.type, placed.ranks
    if isinstance(grad, SplitTensor) and grad.placed.ranks == ranks and grad.placed.type.same_as(type_):
        rows = grad.local()
        return rows if grad.placed.zero_pads else masked(rows, grad.shape, type_, ranks)
    full = grad.gathered() if isinstance(grad, SplitTensor) else grad
    return masked(sharded(full, type_, ranks), full.shape, type_, ranks)


def to_local(x: SplitTensor) -> Tensor:
    """This rank's rows; gradients pass."""
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x.local()
    return _ToLocal.apply(x)  # type: ignore[no-any-return]


def from_local(local: Tensor, placed: Placed, shape: Any) -> SplitTensor:
    """The split value of global ``shape`` of which this rank has ``local``; gradients pass."""
    if not (local.requires_grad and torch.is_grad_enabled()):
        return SplitTensor(dense(local), placed, shape)
    return _FromLocal.apply(local, placed, tuple(shape))  # type: ignore[no-any-return]


def split_as(x: Tensor, placed: Placed) -> Tensor:
    """A whole ``x`` split as ``placed`` says, for the length that it has: without communication; gradients pass.

    What is split, or cannot be split so (other lengths of several segments), is returned as it is.
    """
    if not torch_internals.is_plain_tensor(x) or placed.type.dim >= x.ndim:
        return x
    type_ = placed.for_shape(x.shape)
    if type_.outer * type_.sequence.length != x.shape[type_.dim]:
        return x
    new: Tensor = _Cut.apply(x, replace(placed, type=type_))
    for name, value in vars(x).items():
        if name.startswith("_dynamo_"):  # which lengths change, as the user has marked them
            setattr(new, name, value)
    return new


def made_whole(x: Tensor, op: str = "") -> Tensor:
    """``x`` as a plain tensor, for ``op``, where nobody asked for it."""
    return _ToWhole.apply(x, op) if isinstance(x, SplitTensor) else x


def whole(x: Tensor) -> Tensor:
    """``x`` as a plain tensor: a split value is gathered, on all ranks of its group; gradients pass.

    A collective: every rank of the group has to call it.  Any other tensor is returned as it is.
    """
    return made_whole(x)
