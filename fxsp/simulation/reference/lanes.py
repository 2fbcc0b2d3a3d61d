"""A value on all ranks, one tensor per rank, and where the rows of its segments lie.

Rows of a split segment of ``n`` tokens: ``L = ceil(n / P)`` per rank, rank ``r`` has rows ``r*L .. (r+1)*L``; a row
``>= n`` is a pad.  A whole segment lies entire on every rank.  Segments follow each other along the dimension.  Of a
segment of heads and tails rank ``r`` has the ``r``-th block of ``ceil(n / 2P)`` rows, counted from the front, and the
``r``-th, counted from the end of all ``2P`` blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxsp.errors import VerificationError

__all__ = [
    "Flags",
    "Lanes",
    "Lengths",
    "Piece",
    "along",
    "check_local",
    "each",
    "fresh",
    "pieces",
    "rows_are_zeroed",
    "total",
]


#: Of each segment a number, or whether it is something.
Lengths = Sequence[int]
Flags = Sequence[bool]


class Lanes(list[Any]):
    """One tensor per rank (a tuple of them, of an operator with several results)."""


@dataclass(frozen=True)
class Piece:
    """One segment: where it starts in the global and in the local dimension, and how long it is in each."""

    start: int
    length: int
    local_start: int
    local_length: int
    whole: bool
    size: int
    head_tail: bool = False
    unit: int = 1

    def rows(self, rank: int) -> torch.Tensor:
        """Index within the segment of each local row; pads run past the end."""
        if self.head_tail:
            blocks = torch.arange(self.size * self.local_length).view(2 * self.size, -1)
            return torch.cat([blocks[rank], blocks[-1 - rank]])
        first = 0 if self.whole else rank * self.local_length
        return torch.arange(first, first + self.local_length)

    def dealt(self) -> torch.Tensor:
        """The rows of all ranks, one rank after the other; tokens that are split as they come have no pads yet."""
        if not self.head_tail and self.unit == 1:
            return torch.arange(self.length)
        return torch.cat([self.rows(rank) for rank in range(self.size)])

    def tokens(self, rows: torch.Tensor) -> torch.Tensor:
        """Which token of the segment each row is; a pad is a copy of one of the last unit."""
        last = self.length - self.unit + (rows - self.length) % self.unit
        return torch.where(rows < self.length, rows, last)


def pieces(lengths: Lengths, whole: Flags, size: int, head_tail: Flags = (), units: Lengths = ()) -> Iterator[Piece]:
    """The segments of these lengths, in order."""
    start = local_start = 0
    for i, (n, is_whole) in enumerate(zip(map(int, lengths), whole, strict=True)):
        dealt = len(head_tail) > i and bool(head_tail[i])
        unit, parts = int(units[i]) if units else 1, 2 if dealt else 1
        local = n if is_whole else unit * parts * -(-n // (unit * parts * size))
        yield Piece(start, n, local_start, local, bool(is_whole), size, dealt, unit)
        start += n
        local_start += local


def along(flags: torch.Tensor, x: torch.Tensor, dim: int) -> torch.Tensor:
    """Of each row along ``dim`` a flag, as a mask of ``x``."""
    shape = [1] * x.dim()
    shape[dim] = -1
    return flags.to(x.device).view(shape)


def rows_are_zeroed(x: torch.Tensor, dim: int, row_is_zero: torch.Tensor) -> torch.Tensor:
    """``x`` with zeros (never a product with zero) where ``row_is_zero`` along ``dim``."""
    return x.masked_fill(along(row_is_zero, x, dim), 0)


def total(lanes: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum over ranks: half precision is accumulated in float32, bool is "any"."""
    dtype = lanes[0].dtype
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else torch.int64 if dtype == torch.bool else dtype
    result = lanes[0].to(wide, copy=True)
    for lane in lanes[1:]:
        result = result + lane.to(wide)
    summed: torch.Tensor = result.to(dtype)
    return summed


def fresh(x: Lanes) -> Lanes:
    """Copies, as an operator never returns its operand; one tensor for all ranks stays one."""
    return each(x, torch.clone)


def each(x: Lanes, function: Callable[[torch.Tensor], torch.Tensor]) -> Lanes:
    """A local operator: one result per distinct tensor, so that what all ranks share stays shared."""
    results = {id(lane): function(lane) for lane in x}
    return Lanes([results[id(lane)] for lane in x])


def check_local(
    name: str, x: Lanes, dim: int, lengths: Lengths, whole: Flags, size: int, head_tail: Flags = (), units: Lengths = ()
) -> None:
    """Raises ``VerificationError`` unless dimension ``dim`` of every lane has the local rows of these segments."""
    expected = sum(piece.local_length for piece in pieces(lengths, whole, size, head_tail, units))
    for lane in x:
        if lane.shape[dim] != expected:
            raise VerificationError(
                f"fxsp::{name} of {list(lane.shape)} along {dim}: {list(lengths)} have {expected} local rows"
            )
