"""``fxsp.ring_attention`` as an operator: one node, of three results, until *emit*; on real ranks in eager mode too.

Its gradient is an operator of its own.  The log-sum-exp, in two numbers, is a by-product for it and has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxsp.kernels.attention.merge import wide
from fxsp.kernels.attention.ring import RING

__all__ = ["RESULTS", "RING_OPS", "define", "register"]

_TOKENS = "SymInt[] q_lengths, bool[] q_whole, SymInt[] k_lengths, bool[] k_whole, bool causal, float? scale"
_PLACE = (
    "int ulysses, int rank, int size, str group, bool[] q_head_tail=[], bool[] k_head_tail=[], "
    "SymInt? window=None, float dropout_p=0.0, Tensor? seed=None, SymInt[] q_units=[], SymInt[] k_units=[], "
    "bool exact=False"
)
#: Output, log-sum-exp and what that leaves (:mod:`fxsp.kernels.attention.own_kernel`).
RESULTS = "(Tensor out, Tensor lse, Tensor rest)"

#: Name of an op -> its schema.
RING_OPS: dict[str, str] = {
    "ring_attention": f"(Tensor q, Tensor k, Tensor v, Tensor? mask, {_TOKENS}, {_PLACE}) -> {RESULTS}",
    "ring_attention_backward": f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor lse, "
    f"Tensor rest, {_TOKENS}, bool mask_grad, {_PLACE}) -> (Tensor, Tensor, Tensor, Tensor)",
}


def _like(x: Tensor, width: Any) -> Tensor:
    """``[B, H, L, width]`` that lies as ``[B, L, H, width]``."""
    return x.new_empty([x.shape[0], x.shape[2], x.shape[1], width]).transpose(1, 2)


def _fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    lse, rest = (q.new_empty(q.shape[:3], dtype=wide(q.dtype)) for _ in range(2))
    return _like(q, v.shape[3]), lse, rest


def _fake_backward(at: int) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """``mask_grad`` is the argument at this place behind the rest of the log-sum-exp."""

    def fake(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, rest: Tensor,
        *more: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        like = mask.new_empty(mask.shape) if mask is not None and more[at] else q.new_empty([0])
        return _like(q, q.shape[3]), _like(k, k.shape[3]), _like(v, v.shape[3]), like

    return fake


def define(
    library: torch.library.Library, name: str, schemas: dict[str, str], run: dict[str, Callable[..., Any]],
    mask_grad_at: int, setup: Callable[..., None], backward: Callable[..., Any],
) -> None:  # fmt: skip
    """Define an attention ``(q, k, v, mask, ...) -> (out, lse, rest)`` and the operator that is its gradient."""
    fakes: tuple[Callable[..., Any], ...] = (_fake, _fake_backward(mask_grad_at))
    for op, fake in zip((name, f"{name}_backward"), fakes, strict=True):
        library.define(op + schemas[op], tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(op, run[op], "CompositeExplicitAutograd")
        torch.library.register_fake(f"fxsp::{op}", fake, lib=library)
    torch.library.register_autograd(f"fxsp::{name}", backward, setup_context=setup, lib=library)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, mask, *ctx.more, seed, q_units, k_units, exact = inputs
    ctx.last = q_units, k_units, exact
    ctx.save_for_backward(q, k, v, mask, *output, seed)


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    *operands, seed = ctx.saved_tensors
    more = ctx.more
    mask_grad = bool(ctx.needs_input_grad[3])
    op = torch.ops.fxsp.ring_attention_backward
    dq, dk, dv, dmask = op(grad, *operands, *more[:6], mask_grad, *more[6:], seed, *ctx.last)
    return (dq, dk, dv, dmask if mask_grad else None, *(None for _ in more), None, *(None for _ in ctx.last))


def register(library: torch.library.Library) -> None:
    """Define the operators."""
    define(library, "ring_attention", RING_OPS, RING, 6, _setup, _backward)
