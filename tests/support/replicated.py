"""Outputs of simulated ranks, which are the same on all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxsp.errors import VerificationError

__all__ = ["check_replicated"]


def check_replicated(outputs: Sequence[Sequence[Any]], *, rtol: float = 1e-9, atol: float = 1e-12) -> list[Any]:
    """Rank 0's outputs, after a check that every rank has the same ones.

    Whole values are bitwise equal, unless ranks add summands in different orders; hence the tiny tolerance, relative
    to the largest element.  Raises ``VerificationError`` that names the output and the rank.
    """
    for rank, other in enumerate(outputs):
        if len(other) != len(outputs[0]):
            raise VerificationError(f"rank {rank} has {len(other)} outputs, rank 0 has {len(outputs[0])}")
        for i, (a, b) in enumerate(zip(outputs[0], other, strict=True)):
            problem = _difference(a, b, rtol, atol)
            if problem:
                raise VerificationError(f"output {i} of rank {rank} is not that of rank 0: {problem}")
    return list(outputs[0])


def _difference(a: Any, b: Any, rtol: float, atol: float) -> str:
    """What distinguishes two values, or ``""``."""
    if a is b:
        return ""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return "" if a == b else f"{b!r} instead of {a!r}"
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{b.dtype} {tuple(b.shape)} instead of {a.dtype} {tuple(a.shape)}"
    if torch.equal(a, b):
        return ""
    if not (a.dtype.is_floating_point or a.dtype.is_complex):
        return f"{int((a != b).sum())} of {a.numel()} elements differ"
    if not torch.equal(a.isnan(), b.isnan()):
        return f"{int((a.isnan() != b.isnan()).sum())} of {a.numel()} elements are NaN in one of them only"
    tolerance = max(rtol, 8 * torch.finfo(a.dtype).eps)
    a, b = a.nan_to_num(), b.nan_to_num()
    error, scale = float((a - b).abs().max()), float(a.abs().max())
    return "" if error <= atol + tolerance * scale else f"largest difference {error:.3g}, largest element {scale:.3g}"
