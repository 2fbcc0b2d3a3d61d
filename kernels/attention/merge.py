"""Two attentions of the same queries over different keys, merged: what a step of a ring does to device memory.

``merge(out, lse, other, other_lse, dtype)``: ``out, other [B, H, m, E]`` of any strides, ``lse, other_lse [B, H, m]``
in fp32 (fp64 for fp64 values).  The results are ``[B, H, m, E]`` of ``dtype`` and the new log-sum-exp::

    lse' = log(exp(lse) + exp(other_lse))
    out' = exp(lse - lse') out + exp(other_lse - lse') other

in fp32 (fp64), rounded once, in one pass over memory.  A log-sum-exp of ``-inf`` says that no key was seen: what stands
in that row of the output counts for nothing, NaN included.  Where both are ``-inf``, the results are zero and ``-inf``.
(The online softmax of Milakov and Gimelshein 2018, as in Ring Attention, Liu et al. 2023.)

What is exact here is a *difference* of log-sum-exps, not a log-sum-exp.  The share of a block is off by ``delta``,
relative, if the difference is; and one number ``x`` is off by half of its last place, ``|x| 2^-24`` in fp32: 6e-6 at
100, 5e-4 at 1e4, 32 at 1e9 and 1e31 at the smallest number, where nothing is left of the logarithm of a sum.  So
between blocks a log-sum-exp is two numbers, ``level + rest``: a level near the largest score (which a mask may make as
large as it likes), and what is to be added to it, the logarithm of a sum that is at most the number of keys.
:func:`join` merges by ``(level - level') + rest``.  Of two levels within a factor of 2 the difference is exact
(Sterbenz); of others it is off by ``d 2^-24``, and weighs ``exp(-d)``.  So shares are exact to the last place of the
rest, 1e-6 of a million keys, whatever the level.

One meaning, two spellings: :func:`merge_eager` in plain operations, which Inductor fuses on the CPU, and on CUDA one
Triton kernel (:mod:`fxsp.kernels.attention.triton_merge`).  It is imported when it is first needed: to import this
module takes neither Triton nor a GPU.  The kernel's result lies as ``[B, m, H, E]``, as fused attention kernels give
it.  Nothing here needs a gradient: those of a ring and of merged attention are operators of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxsp.kernels.attention.own_kernel import wide

__all__ = ["above", "join", "merge", "merge_eager", "merge_operator", "rounded", "wide"]

_INFINITY = float("inf")


def join(
    out: Tensor, level: Tensor, rest: Tensor, other: Tensor, other_level: Tensor, other_rest: Tensor,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """:func:`merge`, with log-sum-exps of two numbers; the level is ``-inf`` where no key was seen."""
    base = torch.maximum(level, other_level)
    merged, total = merge(out, above(level, rest, base), other, above(other_level, other_rest, base), dtype)
    return merged, base, total


def above(level: Tensor, rest: Tensor, base: Tensor) -> Tensor:
    """The log-sum-exp ``level + rest`` less ``base``, which is no smaller than the level; ``-inf`` without a key."""
    # Of two -inf the difference would be NaN.
    return torch.where(level == -_INFINITY, level, (level - base) + rest)


def rounded(level: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """``level + rest`` as fused kernels keep it, in one number that is rounded once; and what that leaves."""
    lse = level + rest
    return lse, torch.where(level == -_INFINITY, 0.0, (level - lse) + rest)


def merge(
    out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The merged output, of ``dtype`` (None: the dtype of sums), and its log-sum-exp."""
    dtype = wide(out.dtype) if dtype is None else dtype
    if out.device.type == "cuda":
        return merge_operator()(out, lse, other, other_lse, dtype)  # type: ignore[no-any-return]
    return merge_eager(out, lse, other, other_lse, dtype)


def merge_operator() -> Callable[..., Any]:
    """``fxsp_kernels::merge``, which needs Triton."""
    from fxsp.kernels.attention.triton_merge import merge

    return merge  # type: ignore[no-any-return]


def _shares(lse: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The shares of both in the sum of exponentials, and its logarithm."""
    top = torch.maximum(lse, other_lse)
    # Of two -inf the difference would be NaN.
    base = torch.where(top == -_INFINITY, 0.0, top)
    a, b = (lse - base).exp(), (other_lse - base).exp()
    total = a + b
    scale = 1 / torch.where(total == 0, 1.0, total)
    return a * scale, b * scale, base + total.log()


def _seen(x: Tensor, lse: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows that saw a key; zeros elsewhere."""
    return x.to(dtype).masked_fill((lse == -_INFINITY).unsqueeze(-1), 0)


def merge_eager(
    out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The reference."""
    a, b, total = _shares(lse, other_lse)
    x, y = _seen(out, lse, lse.dtype), _seen(other, other_lse, lse.dtype)
    return (x * a.unsqueeze(-1) + y * b.unsqueeze(-1)).to(dtype), total
