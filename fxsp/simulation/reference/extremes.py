"""Maxima and minima over ranks, on a list with one tensor per rank; see :mod:`fxsp.simulation.reference.table`.

Written apart from ``fxsp.kernels.extremes``: torch itself compares, so that what is not a number stays so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxsp.errors import VerificationError
from fxsp.simulation.reference.lanes import Lanes, fresh

__all__ = ["all_reduce_extreme", "at_extreme", "at_extreme_backward"]


def all_reduce_extreme(x: Lanes, op: str, size: int) -> Lanes:
    """The largest, or smallest, of the ranks' elements; the same tensor on all."""
    stacked = torch.stack(list(x))
    return Lanes([stacked.amax(0) if op == "max" else stacked.amin(0)] * size)


def at_extreme(x: Lanes, value: Lanes, hit: Lanes) -> Lanes:
    """``value``, which is whole on every rank."""
    for lane, where in zip(x, hit, strict=True):
        if lane.shape != where.shape:
            raise VerificationError(f"fxsp::at_extreme of {list(lane.shape)} with hits of {list(where.shape)}")
    return fresh(value)


def at_extreme_backward(grad: Lanes, hit: Lanes, dims: Sequence[int], ties: bool) -> Lanes:
    """What each element that is the extreme gets of the gradient: equal parts, of all ranks' together."""
    shape = [1 if d in dims else n for d, n in enumerate(hit[0].shape)]
    counts = [where.double().sum(list(dims), keepdim=True) for where in hit]
    everyone = torch.stack(counts).sum(0) if ties else torch.ones(shape, dtype=torch.float64)
    result = Lanes()
    for g, where in zip(grad, hit, strict=True):
        part = g.reshape(shape).double() / everyone.to(g.device)
        # No element at all is the extreme where that is not a number: then no gradient is a number.
        part = torch.where(everyone.to(g.device) == 0, torch.nan, part)
        own = torch.where(where | part.isnan(), part, 0.0)
        result.append(own.to(g.dtype))
    return result


OPERATORS = (all_reduce_extreme, at_extreme, at_extreme_backward)
