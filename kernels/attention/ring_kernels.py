"""Attention of one block that also returns the log-sum-exp, and its backward, by the fused kernel of the device.

Queries ``[B, H, m, D]``, keys ``[B, h, n, D]``, values ``[B, h, n, E]`` (``h`` divides ``H``), an additive bias that
broadcasts to ``[B, H, m, n]``.  The log-sum-exp is two tensors ``[B, H, m]``, fp32 at least, whose sum it is: a level,
``-inf`` in rows without a key, and the rest (why: :mod:`fxsp.kernels.attention.merge`,
:mod:`fxsp.kernels.attention.own_kernel`). The backward takes the *final* output and log-sum-exp, those of all blocks
together: with them every block's probabilities, and so its gradients, are those of the whole attention (Ring
Attention, Liu et al. 2023; the formulas are those of FlashAttention, Dao et al. 2022).

With dropout the probabilities are multiplied by ``weights [B, H, m, n]``
(:class:`fxsp.kernels.attention.ring_bias.Draw`); then the block is written out, and its probabilities are held.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxsp.kernels.attention.own_kernel import level_and_rest, wide

__all__ = ["block_backward", "block_forward"]

aten = torch.ops.aten
_INFINITY = float("inf")


def _kernel(q: Tensor, v: Tensor, bias: Tensor | None, weights: Tensor | None) -> str:
    """The fused kernel that takes these operands, or ``"math"``."""
    if q.shape[-1] != v.shape[-1] or weights is not None:
        return "math"
    if q.device.type == "cpu":
        return "cpu"
    if q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16) and bias is None:
        width = q.shape[-1]
        if isinstance(width, int) and width % 8 == 0 and width <= 256:
            return "flash" if torch.cuda.get_device_capability(q.device) >= (8, 0) else "math"
    return "math"


def _repeated(x: Tensor, times: int) -> Tensor:
    """Key heads as often as query heads share them."""
    return x if times == 1 else x.repeat_interleave(times, 1)


def _summed(g: Tensor, times: int) -> Tensor:
    return g if times == 1 else g.unflatten(1, [-1, times]).sum(2)


def _without_keys(bias: Tensor) -> Tensor:
    """Rows of a bias that allow no key."""
    return (bias == -_INFINITY).all(-1)


def block_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float, weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``(out, level, rest)``; ``causal`` is ``key row <= query row``."""
    times = q.shape[1] // k.shape[1]
    kernel = _kernel(q, v, bias, weights)
    if kernel == "math":
        scores = _scores(q, _repeated(k, times), bias, causal, scale)
        level = scores.amax(-1)
        nothing = level == -_INFINITY
        # Of a row without keys the difference would be NaN.
        p = (scores - level.masked_fill(nothing, 0).unsqueeze(-1)).exp()
        total = p.sum(-1).masked_fill(nothing, 1)
        p = p / total.unsqueeze(-1)
        if weights is not None:
            p = p * weights
        return p @ _repeated(v, times).to(p.dtype), level, total.log()
    k, v = _repeated(k, times), _repeated(v, times)
    if kernel == "flash":
        results: Any = aten._scaled_dot_product_flash_attention.default(q, k, v, 0.0, causal, False, scale=scale)
        return results[0], results[1], torch.zeros_like(results[1])
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu.default(
        q, k, v, 0.0, causal, attn_mask=bias, scale=scale
    )
    if bias is not None:
        # The kernel says 0 for a row without keys.
        lse = lse.masked_fill(_without_keys(bias), -_INFINITY)
    return out, *level_and_rest(q, k, bias, causal, scale, lse)


def block_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rest: Tensor,
    causal: bool,
    scale: float,
    bias_grad: bool,
    weights: Tensor | None = None,
    exact: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v, and of the bias (``[B, H, m, n]``) if it is asked for.

    ``lse`` is the log-sum-exp as fused kernels keep it, in one number, and ``rest`` what is missing from it.  ``exact``
    asks for the gradients of attention that is written out, which are those of the bias in any case.
    """
    times = q.shape[1] // k.shape[1]
    # Any finite number: the scores of such a row are -inf, and so its probabilities are 0.
    lse = torch.where(lse == -_INFINITY, 0.0, lse)
    kernel = "math" if bias_grad or exact else _kernel(q, v, bias, weights)
    k, v = _repeated(k, times), _repeated(v, times)
    if kernel == "math":
        dtype = wide(q.dtype)
        g, queries, keys, values = (x.to(dtype) for x in (grad, q, k, v))
        p = (_scores(q, k, bias, causal, scale) - lse.unsqueeze(-1) - rest.unsqueeze(-1)).exp()
        delta = (g * out.to(dtype)).sum(-1, keepdim=True)
        dp, kept = g @ values.mT, p
        if weights is not None:
            dp, kept = dp * weights, p * weights
        ds = p * (dp - delta)
        dq, dk, dv = ds @ keys * scale, ds.mT @ queries * scale, kept.mT @ g
        return dq, _summed(dk, times), _summed(dv, times), ds if bias_grad else None
    if kernel == "flash":
        seed = torch.zeros([2], dtype=torch.uint64, device=q.device)
        unused = torch.zeros([], dtype=torch.uint64, device=q.device)
        grads: Any = aten._scaled_dot_product_flash_attention_backward.default(
            grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, seed, unused, scale=scale
        )
    else:
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale
        )
    return grads[0], _summed(grads[1], times), _summed(grads[2], times), None


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
    dtype = wide(q.dtype)
    scores = q.to(dtype) @ k.to(dtype).mT * scale
    if bias is not None:
        scores = scores + bias
    if causal:
        rows, columns = (torch.arange(n, device=q.device) for n in scores.shape[-2:])
        scores = scores.masked_fill(columns > rows.unsqueeze(1), -_INFINITY)
    return scores
