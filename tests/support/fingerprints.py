"""What ranks compare of one value, as numbers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fxsp.ranks.checks import _stable, _sums

__all__ = ["fingerprint"]


def fingerprint(value: Any) -> list[int]:
    """Two 64-bit numbers that differ, almost certainly, when dtype, shape or any bit of ``value`` differs."""
    if not isinstance(value, Tensor):
        return [_stable((value,)), 0]
    first, second = _sums(value).tolist()
    return [_stable((str(value.dtype), *value.shape)) ^ (first % 2**62), second]
