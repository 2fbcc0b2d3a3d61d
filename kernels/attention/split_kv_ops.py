"""``fxsp.merged_attention`` as an operator, as ``fxsp.ring_attention`` is one: see
:mod:`fxsp.kernels.attention.ring_ops`.

Its gradient is an operator of its own.  The log-sum-exp, in two numbers, is a by-product for it and has no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxsp.kernels.attention.ring_ops import RESULTS, define
from fxsp.kernels.attention.split_kv import MERGED

__all__ = ["MERGED_OPS", "register"]

_KEYS = "SymInt[] k_lengths, bool[] k_whole, bool causal, float? scale"
_PLACE = "int rank, int size, str group, bool[] k_head_tail=[], SymInt[] k_units=[], bool exact=False"

#: Name of an op -> its schema.
MERGED_OPS: dict[str, str] = {
    "merged_attention": f"(Tensor q, Tensor k, Tensor v, Tensor? mask, {_KEYS}, {_PLACE}) -> {RESULTS}",
    "merged_attention_backward": f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor lse, "
    f"Tensor rest, {_KEYS}, bool mask_grad, {_PLACE}) -> (Tensor, Tensor, Tensor, Tensor)",
}


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, mask, *ctx.more = inputs
    ctx.save_for_backward(q, k, v, mask, *output)


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    more = ctx.more
    mask_grad = bool(ctx.needs_input_grad[3])
    op = torch.ops.fxsp.merged_attention_backward
    dq, dk, dv, dmask = op(grad, *ctx.saved_tensors, *more[:4], mask_grad, *more[4:])
    return (dq, dk, dv, dmask if mask_grad else None, *(None for _ in more))


def register(library: torch.library.Library) -> None:
    """Define the operators."""
    define(library, "merged_attention", MERGED_OPS, MERGED, 4, _setup, _backward)
