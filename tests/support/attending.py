"""Attention operators of one's own, as a kernel library brings them: with and without gradients, of each layout."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import fxsp

__all__ = ["attend", "attend_forward", "attend_heads", "attend_slopes"]


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool, window: int) -> Tensor:
    """``[B, H, S, T]`` from ``[B, S, H, D]``; causal from the lower right corner, as flash-attention has it."""
    groups = q.shape[2] // k.shape[2]
    scores = torch.einsum("bmhd,bnhd->bhmn", q, k.repeat_interleave(groups, 2)) * scale
    m, n = scores.shape[-2:]
    past = torch.arange(m)[:, None] + (n - m) - torch.arange(n)
    if causal:
        scores = scores.masked_fill(past < 0, -math.inf)
    return scores.masked_fill(past.abs() > window, -math.inf) if window >= 0 else scores


def _wide(v: Tensor, heads: int) -> Tensor:
    return v.repeat_interleave(heads // v.shape[2], 2)


@torch.library.custom_op("fxsp_test::attend", mutates_args=())
def attend(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, window: int = -1
) -> tuple[Tensor, Tensor]:
    """``(out [B, S, H, D], lse [B, H, S])``.  It reads its operands as flat memory, as simple kernels do."""
    assert all(x.is_contiguous() for x in (q, k, v))
    scores = _scores(q, k, softmax_scale, causal, window)
    out = torch.einsum("bhmn,bnhd->bmhd", scores.softmax(-1), _wide(v, q.shape[2]))
    return out.contiguous(), scores.logsumexp(-1)


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, window: int = -1) -> Any:
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[0], q.shape[2], q.shape[1])


@torch.library.custom_op("fxsp_test::attend_backward", mutates_args=())
def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    groups = q.shape[2] // k.shape[2]
    p = _scores(q, k, softmax_scale, causal, window).softmax(-1)
    dp = torch.einsum("bmhd,bnhd->bhmn", grad, _wide(v, q.shape[2]))
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * softmax_scale
    dq = torch.einsum("bhmn,bnhd->bmhd", ds, k.repeat_interleave(groups, 2))
    dk, dv = torch.einsum("bhmn,bmhd->bnhd", ds, q), torch.einsum("bhmn,bmhd->bnhd", p, grad)
    return dq.contiguous(), *(x.unflatten(2, [-1, groups]).sum(3) for x in (dk, dv))  # type: ignore[return-value]


@attend_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, window: int) -> Any:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v)


def _backward(ctx: Any, grad: Tensor, _: Any) -> Any:
    return (*attend_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.rest), None, None, None)


attend.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("fxsp_test::attend_forward", mutates_args=())
def attend_forward(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, softcap: float) -> Tensor:
    """``[B, H, S, D]``, for inference only."""
    scores = queries @ keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1).mT
    scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else scores + bias
    return scores.softmax(-1) @ values.repeat_interleave(queries.shape[1] // keys.shape[1], 1)


@attend_forward.register_fake
def _(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, softcap: float) -> Tensor:
    return queries.new_empty(*queries.shape[:-1], values.shape[-1])


@torch.library.custom_op("fxsp_test::attend_slopes", mutates_args=())
def attend_slopes(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, causal: bool) -> Tensor:
    """``[B, H, S, D]`` with a bias of ALiBi."""
    distance = (torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None]).abs()
    scores = q @ k.mT - slopes[:, None, None] * distance
    if causal:
        scores = scores.masked_fill(torch.arange(k.shape[2]) > torch.arange(q.shape[2])[:, None], -math.inf)
    return scores.softmax(-1) @ v


@attend_slopes.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, causal: bool) -> Tensor:
    return q.new_empty(*q.shape[:-1], v.shape[-1])


@torch.library.custom_op("fxsp_test::attend_heads", mutates_args=())
def attend_heads(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """An operator that wants to know how many heads there are: nothing says what that means for a part of them."""
    assert q.shape[1] == heads
    return (q @ k.mT).softmax(-1) @ v


@attend_heads.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    return q.new_empty(*q.shape[:-1], v.shape[-1])


fxsp.register_attention(attend, layout="BSHD", scale="softmax_scale", causal="causal", positional=["window"], output=0)
fxsp.register_attention(
    torch.ops.fxsp_test.attend_forward, query="queries", key="keys", value="values", mask="bias", constants=["softcap"]
)
fxsp.register_attention(attend_slopes, causal="causal", per_head={"slopes": 0})
fxsp.register_attention(attend_heads)
