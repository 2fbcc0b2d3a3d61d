"""``fxsp.merged_attention`` as an operator, as ``fxsp.ring_attention`` is one: see :mod:`fxsp.kernels.ring_ops`.

Its gradient is an operator of its own.  The log-sum-exp is a by-product for it and has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxsp.kernels.merge import wide
from fxsp.kernels.merged import MERGED

__all__ = ["MERGED_OPS", "register"]

_KEYS = "SymInt[] k_lengths, bool[] k_whole, bool causal, float? scale"
_PLACE = "int rank, int size, str group, bool[] k_head_tail=[]"

#: Name of an op -> its schema.
MERGED_OPS: dict[str, str] = {
    "merged_attention": f"(Tensor q, Tensor k, Tensor v, Tensor? mask, {_KEYS}, {_PLACE}) -> (Tensor out, Tensor lse)",
    "merged_attention_backward": f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor lse, "
    f"{_KEYS}, bool mask_grad, {_PLACE}) -> (Tensor, Tensor, Tensor, Tensor)",
}


def _like(x: Tensor, width: Any) -> Tensor:
    """``[B, H, L, width]`` that lies as ``[B, L, H, width]``."""
    return x.new_empty([x.shape[0], x.shape[2], x.shape[1], width]).transpose(1, 2)


def _fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    return _like(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=wide(q.dtype))


def _fake_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = mask.new_empty(mask.shape) if mask is not None and rest[4] else q.new_empty([0])
    return _like(q, q.shape[3]), _like(k, k.shape[3]), _like(v, v.shape[3]), like


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, mask, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    q, k, v, mask, out, lse = ctx.saved_tensors
    rest = ctx.rest
    mask_grad = bool(ctx.needs_input_grad[3])
    op = torch.ops.fxsp.merged_attention_backward
    dq, dk, dv, dmask = op(grad, q, k, v, mask, out, lse, *rest[:4], mask_grad, *rest[4:])
    return (dq, dk, dv, dmask if mask_grad else None, *(None for _ in rest))


def register(library: torch.library.Library) -> None:
    """Define the operators."""
    fakes: dict[str, Callable[..., Any]] = {"merged_attention": _fake, "merged_attention_backward": _fake_backward}
    for name, schema in MERGED_OPS.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, MERGED[name], "CompositeExplicitAutograd")
        torch.library.register_fake(f"fxsp::{name}", fakes[name], lib=library)
    torch.library.register_autograd("fxsp::merged_attention", _backward, setup_context=_setup, lib=library)
