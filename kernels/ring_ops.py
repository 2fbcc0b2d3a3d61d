"""``fxsp.ring_attention`` as an operator: one node, of two results, until *emit*, and on real ranks in eager mode too.

Its gradient is an operator of its own.  The log-sum-exp is a by-product for it and has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxsp.kernels.merge import wide
from fxsp.kernels.ring import RING

__all__ = ["RING_OPS", "register"]

_TOKENS = "SymInt[] q_lengths, bool[] q_whole, SymInt[] k_lengths, bool[] k_whole, bool causal, float? scale"
_PLACE = (
    "int ulysses, int rank, int size, str group, bool[] q_head_tail=[], bool[] k_head_tail=[], "
    "SymInt? window=None, float dropout_p=0.0, Tensor? seed=None"
)

#: Name of an op -> its schema.
RING_OPS: dict[str, str] = {
    "ring_attention": f"(Tensor q, Tensor k, Tensor v, Tensor? mask, {_TOKENS}, {_PLACE}) -> (Tensor out, Tensor lse)",
    "ring_attention_backward": f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor lse, "
    f"{_TOKENS}, bool mask_grad, {_PLACE}) -> (Tensor, Tensor, Tensor, Tensor)",
}


def _like(x: Tensor, width: Any) -> Tensor:
    """``[B, H, L, width]`` that lies as ``[B, L, H, width]``."""
    return x.new_empty([x.shape[0], x.shape[2], x.shape[1], width]).transpose(1, 2)


def _fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    return _like(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=wide(q.dtype))


def _fake_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mask_grad = rest[6]
    like = mask.new_empty(mask.shape) if mask is not None and mask_grad else q.new_empty([0])
    return _like(q, q.shape[3]), _like(k, k.shape[3]), _like(v, v.shape[3]), like


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, *ctx.rest, seed = inputs
    ctx.save_for_backward(q, k, v, mask, *output, seed)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    q, k, v, mask, out, lse, seed = ctx.saved_tensors
    rest = ctx.rest
    mask_grad = bool(ctx.needs_input_grad[3])
    op = torch.ops.fxsp.ring_attention_backward
    dq, dk, dv, dmask = op(grad, q, k, v, mask, out, lse, *rest[:6], mask_grad, *rest[6:], seed)
    return (dq, dk, dv, dmask if mask_grad else None, *(None for _ in rest), None)


def register(library: torch.library.Library) -> None:
    """Define the operators."""
    fakes: dict[str, Callable[..., Any]] = {"ring_attention": _fake, "ring_attention_backward": _fake_backward}
    for name, schema in RING_OPS.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, RING[name], "CompositeExplicitAutograd")
        torch.library.register_fake(f"fxsp::{name}", fakes[name], lib=library)
    torch.library.register_autograd("fxsp::ring_attention", _backward, setup_context=_setup, lib=library)
