"""What one device's own attention kernel does with large scores, where blocks cannot follow it blindly.

A *log-sum-exp* of scores near ``-3.4e38`` (a row that a mask of ``finfo.min`` forbids entirely), or of ``-1e9``, cannot
hold the logarithm of a number of keys: in fp32 its neighbours are 2e31, or 64, away.  Two things follow.

*Blocks* are merged by the ratio of their sums, so there it must be exact: it is kept as two numbers, ``level + rest``
(:mod:`fxsp.kernels.attention.merge`).  Fused kernels return one.  :func:`level_and_rest` makes two of it, on the CPU:
where ``|lse|`` is so large that half of its last place counts (``_LIMIT``), the scores are computed once more, and
the rest is taken from them, row by row; elsewhere the number is good enough, and ``rest`` is 0.  Which rows these are
is seen in their values, by this rank alone: nothing is sent, the result is the same to rounding, and on the CPU there
is no device to wait for.  On CUDA a block with a bias is written out (its level and rest are at hand); one without
runs in fp16 or bf16, with one number: half of its last place is below that of the output up to scores of 2^13 and 2^16.

*Gradients* are those of one device, and its kernel keeps one number, rounded once: ``p = exp(score - lse)``.  Where
that swallows the logarithm of ``n`` keys the kernel's probabilities are 1 instead of ``1/n`` (in the backward pass
alone); so are those of blocks, which get the same number.  Attention that torch writes out itself, because a mask
requires grad, for dropout, or for shapes that its fused kernel does not take, keeps the probabilities of its softmax:
there ``p = exp(score - lse - rest)`` (:func:`written_out`).  On CUDA that is what blocks with a bias do in any case.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxsp.types import as_length, same_length

__all__ = ["level_and_rest", "wide", "written_out"]

_INFINITY = float("inf")
#: Up to here a log-sum-exp is one number.  Half of its last place is an error of the block's share, relative: 2^-19 (of
#: fp32 sums, for fp32), 2^-48 (fp64), an eighth of the last place of fp16 (2^-13) and of bf16 (2^-10).
_LIMIT = {torch.float64: 2.0**6, torch.float32: 2.0**6, torch.float16: 2.0**11, torch.bfloat16: 2.0**14}
#: Scores that are held at a time.
_HELD = 2**20


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, gqa: bool) -> bool:
    """Whether torch writes this ``scaled_dot_product_attention`` on the CPU out; not asked: dropout, a mask's gradient.

    False on other devices.  The operands are those of the call, global or local.
    """
    if q.device.type != "cpu":
        return False
    if not torch.backends.cuda.flash_sdp_enabled():  # which speaks of the CPU's fused kernel, too
        return True
    if not q.dim() == k.dim() == v.dim() == 4 or (mask is not None and mask.dim() not in (2, 4)):
        return True
    heads, shared, others = (x.shape[1] for x in (q, k, v))
    equal = [(heads, shared), (shared, others)] if not gqa else [(shared, others)]
    equal += [(q.shape[0], k.shape[0]), (q.shape[0], v.shape[0]), (q.shape[3], k.shape[3]), (q.shape[3], v.shape[3])]
    equal += [(x.stride(3), 1) for x in (q, k, v)]
    return not all(same_length(as_length(a), as_length(b)) for a, b in equal)


def level_and_rest(
    q: Tensor, k: Tensor, bias: Tensor | None, causal: bool, scale: float, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """``lse [B, H, m]``, as the CPU's fused kernel gave it (``-inf`` without a key), in two numbers.

    ``q [B, H, m, D]``, ``k [B, H, n, D]``, an additive ``bias`` that broadcasts to ``[B, H, m, n]``.
    """
    return torch.ops.fxsp_local.level_and_rest.default(q, k, bias, causal, scale, lse)  # type: ignore[no-any-return]


def _level_and_rest(
    q: Tensor, k: Tensor, bias: Tensor | None, causal: bool, scale: float, lse: Tensor
) -> tuple[Tensor, Tensor]:
    level, rest = lse.clone(), torch.zeros_like(lse)
    far = (lse.abs() > _LIMIT[q.dtype]) & (lse != -_INFINITY)
    if not far.any():
        return level, rest
    batch, heads, m, _ = q.shape
    n = k.shape[2]
    keys = k.to(wide(q.dtype)).mT
    columns = torch.arange(n)
    step = max(1, _HELD // (batch * heads * n))
    for start in range(0, m, step):
        here = slice(start, min(start + step, m))
        which = far[:, :, here]
        if not which.any():
            continue
        scores = q[:, :, here].to(keys.dtype) @ keys * scale
        if bias is not None:
            scores += bias if bias.shape[-2] == 1 else bias[..., here, :]
        if causal:
            scores.masked_fill_(columns > torch.arange(here.start, here.stop).unsqueeze(1), -_INFINITY)
        more = scores.sub_(scores.amax(-1, keepdim=True)).exp_().sum(-1).log()
        # The level is the largest score as the kernel has it, whose products may be rounded in another way than these:
        # its backward pass has them again, and a unit in the last place of 1e4 is an error of 1e-3 there.
        level[:, :, here] = torch.where(which, lse[:, :, here] - more, lse[:, :, here])
        rest[:, :, here] = torch.where(which, more, 0.0)
    return level, rest


def _fake(q: Tensor, k: Tensor, bias: Tensor | None, causal: bool, scale: float, lse: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(lse), torch.empty_like(lse)


_library = torch.library.Library("fxsp_local", "FRAGMENT")
_library.define(
    "level_and_rest(Tensor q, Tensor k, Tensor? bias, bool causal, float scale, Tensor lse) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("level_and_rest", _level_and_rest, "CPU")
torch.library.register_fake("fxsp_local::level_and_rest", _fake, lib=_library)
