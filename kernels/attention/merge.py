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
Triton kernel each for the forward and the backward pass, as the operator ``fxsp_kernels::merge``.  It is defined when
it is first needed: to import this module takes neither Triton nor a GPU.  The kernel's result lies as ``[B, m, H, E]``,
as fused attention kernels give it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fxsp.kernels.attention.own_kernel import wide
from fxsp.types import as_length, same_length

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


# The kernels.


def _tile(width: int) -> tuple[int, int]:
    """Tokens and elements of a tile, powers of two: some 2048 elements, and all of a row."""
    elements = max(16, 1 << (width - 1).bit_length())
    return max(1, 2048 // elements), elements


def _room(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for the like of ``x [B, H, m, E]``, as ``[B, m, H, E]``."""
    batch, heads, tokens, width = x.shape
    return torch.empty([batch, tokens, heads, width], dtype=dtype, device=x.device)


def _unit(tensors: Sequence[Tensor]) -> int:
    """The largest of 8, 4, 2, 1 at whose multiples all rows certainly begin, in elements; adds no guard."""
    rows = [as_length(s) for x in tensors if x.dim() == 4 for s in x.stride()[:3]]
    return next(n for n in (8, 4, 2, 1) if all(same_length(as_length(s % n), 0) for s in rows))


def _launch(kernel: Any, strided: Sequence[Tensor], room: Sequence[Tensor], like: Tensor) -> None:
    """``strided`` are the operands, ``room`` the results; ``like`` is one of the former, ``[B, H, m, E]``."""
    import triton.language as tl

    batch, heads, tokens, width = like.shape
    block_m, block_e = _tile(width)
    unit = _unit(strided)
    strides: list[Any] = []
    for x in strided:
        strides += [s // unit for s in x.stride()[:3]] + [x.stride(3)] if x.dim() == 4 else x.stride()
    kernel[(-(-tokens // block_m) * heads, batch, 1)](
        *strided, *room, heads, tokens, *strides, E=width, UNIT=unit, BLOCK_M=block_m, BLOCK_E=block_e,
        ACC=tl.float64 if wide(like.dtype) == torch.float64 else tl.float32,
    )  # fmt: skip


@cache
def merge_operator() -> Callable[..., Any]:
    """``fxsp_kernels::merge``, differentiable; the first call defines it."""
    from torch.library import triton_op, wrap_triton

    from fxsp.kernels.attention.triton_merge import merge_backward_kernel, merge_kernel

    @triton_op("fxsp_kernels::merge", mutates_args={})
    def forward(
        out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        merged, total = _room(out, dtype), torch.empty(lse.shape, dtype=lse.dtype, device=lse.device)
        _launch(wrap_triton(merge_kernel), (out, lse, other, other_lse), (merged, total), out)
        return merged.transpose(1, 2), total

    @triton_op("fxsp_kernels::merge_backward", mutates_args={})
    def backward(
        grad: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dx, dy = (_room(x, x.dtype) for x in (out, other))
        da, db = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (lse, other_lse))
        operands = (grad, grad_lse, out, lse, other, other_lse)
        _launch(wrap_triton(merge_backward_kernel), operands, (dx, da, dy, db), out)
        return dx.transpose(1, 2), da, dy.transpose(1, 2), db

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:4])

    def gradient(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
        return (*backward(grad, grad_lse, *ctx.saved_tensors), None)

    forward.register_autograd(gradient, setup_context=setup)
    return forward  # type: ignore[no-any-return]
