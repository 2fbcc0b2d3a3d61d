"""Where the rows of each rank lie: the segments of a sequence, one after the other, as operators get them.

Kernels move rows, mask pads and count by this one walk.  Types have lengths that are expressions, and so one of their
own (:meth:`fxsp.types.Sequence.placed`), and the oracle has, so that a mistake in one shows against the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Flags", "Lengths", "Part", "Size", "local_length", "placed"]

#: An ``int`` or a ``SymInt``; torch's annotations do not know that the latter is welcome wherever the former is.
Size = Any
#: Of each segment.
Lengths = Sequence[Size]
Flags = Sequence[bool]


def _once(compute: Callable[[Part], Size]) -> Any:
    """A property that is computed when it is first asked for.  (Dynamo does not trace ``cached_property``.)"""
    name = compute.__name__

    def get(part: Part) -> Size:
        if name not in part.known:
            part.known[name] = compute(part)
        return part.known[name]

    return property(get, doc=compute.__doc__)


@dataclass(frozen=True)
class Part:
    """One segment among all tokens, and among the rows of each of ``size`` ranks.

    What is not asked for is not computed: a graph of symbolic lengths would have nodes for it.
    """

    length: Size
    whole: bool
    size: int
    head_tail: bool = False
    unit: Size = 1
    before: Part | None = None
    known: dict[str, Size] = field(default_factory=dict, compare=False, repr=False)

    @property
    def dealt(self) -> bool:
        """Whether it is split otherwise than ``ceil(length / size)`` tokens in a row to each rank."""
        return self.head_tail or not (isinstance(self.unit, int) and self.unit == 1)

    @property
    def chunks(self) -> int:
        """On all ranks."""
        return 2 * self.size if self.head_tail else self.size

    @_once
    def chunk(self) -> Size:
        """Rows of one chunk of a split segment, pads included: ``unit * ceil(units / chunks)``."""
        if isinstance(self.unit, int) and self.unit == 1:
            return local_length(self.length, False, self.chunks)
        return self.unit * ((self.length // self.unit + (self.chunks - 1)) // self.chunks)

    @_once
    def rows(self) -> Size:
        """Rows of each rank, pads included."""
        if self.whole:
            return self.length
        return 2 * self.chunk if self.head_tail else self.chunk

    @_once
    def start(self) -> Size:
        """Its first token."""
        return 0 if self.before is None else self.before.start + self.before.length

    @_once
    def row(self) -> Size:
        """Its first row on each rank."""
        return 0 if self.before is None else self.before.row + self.before.rows

    def index(self, rank: int, device: torch.device) -> Tensor:
        """``[rows]``: the index in the segment of each of a rank's rows; that of a pad is not below ``length``."""
        if self.whole:
            return torch.arange(self.length, device=device)
        index = torch.arange(self.chunk, device=device)
        head = index + rank * self.chunk
        return torch.cat([head, index + (self.chunks - 1 - rank) * self.chunk]) if self.head_tail else head

    def may_have_pads(self, rank: int) -> bool:
        """Whether some of a rank's rows may be pads."""
        if self.whole or not (isinstance(self.length, int) and isinstance(self.unit, int)):
            return not self.whole
        # The end of a rank's last row: that of its tail, if it has one.
        return bool((self.chunks - rank if self.head_tail else rank + 1) * self.chunk > self.length)


def placed(
    lengths: Lengths, whole: Flags, size: int, head_tail: Flags = (),
    units: Lengths = (),
) -> list[Part]:  # fmt: skip
    """The segments of an operator's arguments; ``head_tail`` and ``units`` may be left out (none; one)."""
    parts: list[Part] = []
    kinds = head_tail or [False] * len(lengths), units or [1] * len(lengths)
    for length, entire, dealt, unit in zip(lengths, whole, *kinds, strict=True):
        parts.append(Part(length, bool(entire), size, bool(dealt), unit, parts[-1] if parts else None))
    return parts


def local_length(length: Size, whole: bool, size: int) -> Size:
    """Rows of one contiguous segment on each of ``size`` ranks, pads included (or in each of so many chunks)."""
    return length if whole else (length + (size - 1)) // size
