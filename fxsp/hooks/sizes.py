"""Sizes of split tensors: to the model they are those of one process, to who looks from outside those of this rank.

A block that computes ``x.shape[1]``, ``x.size(1) > 1`` or ``range(x.shape[1])`` means all tokens, also where this rank
holds some of them only: positions, masks, scales and divisors come out as on one process.  What hooks and tests kept
of a shape and look at after the call tells the rows that this rank has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fxsp.hooks.region import Region
from fxsp.torch_internals import in_backward

__all__ = ["SplitSize", "meaning", "split_size"]


class SplitSize(int):
    """The global number, in C too; arithmetic and comparisons outside of the model's call take the local one."""

    local: int
    region: Region

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (meaning(self),)


def meaning(value: Any) -> Any:
    """A plain number: the global one while the model runs, or is recomputed in a backward pass; else the local one."""
    if not isinstance(value, SplitSize):
        return value
    return int.__int__(value) if value.region.running or in_backward() else value.local


def split_size(whole: int, local: int, region: Region) -> int:
    """``whole`` tokens, of which this rank has ``local``; where ints are not to be told apart, the local number."""
    if region.alone:
        return local
    size = SplitSize(whole)
    size.local, size.region = local, region
    return size


def _operator(name: str) -> Callable[..., Any]:
    plain = getattr(int, name)

    def run(self: SplitSize, *others: Any) -> Any:
        return plain(meaning(self), *map(meaning, others))

    run.__name__ = name
    return run


#: Methods of an int that speak of its value; `__index__`, which C asks for, stays the global one.
_NAMES = vars(int).keys() - {"__new__", "__index__", "__getattribute__", "__getnewargs__", "__sizeof__"}
for _name in _NAMES:
    if _name.startswith("__") and callable(getattr(int, _name)):
        setattr(SplitSize, _name, _operator(_name))
