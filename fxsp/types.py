"""The sharding types: how a value of the global program lies on the ranks.

Notation (what ``str`` prints and :func:`parse` reads)::

    R                      Replicate: every rank has the whole value, and its whole gradient
    U                      Used: a replicated value that is used with shards; its gradient is a summand
    P                      Partial: every rank has a summand of the value; its gradient is whole
    S(1, [512|4096])       Shard: dimension 1 holds the tokens of two segments, each split over the ranks
    S(1, [512 whole|4096]) the first segment is whole on every rank, the second is split
    S(1, [4096 head-tail]) of 2 P chunks of the tokens rank r has chunks r and 2P-1-r
    S(0, 2*[4096]*1)       the tokens are an inner factor of dimension 0, of size 2*4096
    S(1, [144 by 6|37])    of the first 144 tokens each six in a row stay together: 24 frames of six, say, are split
    S(1, 1*[24]*6)         the same of all tokens: 144, in units of six

The four kinds are the replicate/varying/partial states of spmd_types and the sharding types of GSPMD and Shardy,
specialised to one axis.  A length is an ``int`` or a sympy expression, always global, counted in tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import InitVar, dataclass, field, replace
from typing import Any, Literal

import sympy

from fxsp.lengths import Length, as_length, ceil_div, equal_lengths, parse_length, product, quotient, same_length

__all__ = [
    "Layout",
    "Length",
    "Partial",
    "Ranks",
    "Replicate",
    "Segment",
    "Sequence",
    "Shard",
    "Type",
    "Used",
    "as_length",
    "ceil_div",
    "equal_lengths",
    "parse",
    "product",
    "quotient",
    "same_length",
    "shape_on_rank",
]

Layout = Literal["contiguous", "head-tail"]


def _check_length(length: Length, what: str) -> None:
    if not isinstance(length, (int, sympy.Expr)) or isinstance(length, bool):
        raise TypeError(f"{what} has a length that is an int or a sympy expression, not {length!r}")
    if isinstance(length, int) and length < 1:
        raise ValueError(f"{what} has at least one token, not {length}")


@dataclass(frozen=True)
class Ranks:
    """The ranks that a program is split over: this process's ``rank`` of ``size`` in process group ``group``."""

    rank: int
    size: int
    group: str

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} is not in 0..{self.size - 1}")


@dataclass(frozen=True)
class Segment:
    """``length`` consecutive tokens of a sequence, split over the ranks or (``sharded=False``) whole on each.

    ``layout`` says which tokens of a split segment rank ``r`` of ``P`` holds.  ``contiguous``: rows ``r*L .. (r+1)*L``
    of ``L = ceil(n/P)``.  ``head-tail``: the chunks ``r`` and ``2P-1-r`` of ``2P`` chunks of ``ceil(n/2P)`` rows, so
    that a causal ring gives each rank the same work (zigzag ring attention).  Rows from ``n`` on are pads.

    ``unit`` tokens in a row stay on one rank (frames that were split, and then became tokens): all of this is then said
    of the ``n / unit`` units, and a pad is a copy of a row of the last unit.
    """

    length: Length
    sharded: bool = True
    #: Whose tokens they are, for reports: the plan entry's argument (``hidden_states``).  No part of equality.
    name: str = field(default="", compare=False)
    layout: Layout = "contiguous"
    unit: Length = 1

    def __post_init__(self) -> None:
        _check_length(self.length, "a segment")
        _check_length(self.unit, "the unit of a segment")
        if quotient(self.length, self.unit) is None:
            raise ValueError(f"a segment of {self.length} tokens does not consist of units of {self.unit}")
        if self.layout not in ("contiguous", "head-tail"):
            raise ValueError(f"a layout is contiguous or head-tail, not {self.layout!r}")
        if self.head_tail and not self.sharded:
            raise ValueError("a segment that is whole on every rank has no layout")
        if not self.sharded and not same_length(self.unit, 1):
            raise ValueError("a segment that is whole on every rank has no units")

    @property
    def head_tail(self) -> bool:
        return self.layout == "head-tail"

    @property
    def parts(self) -> int:
        """Chunks of its tokens on each rank (0: it is whole)."""
        return (2 if self.head_tail else 1) if self.sharded else 0

    def local_length(self, size: int) -> Length:
        """Tokens per rank, pads included: ``unit * parts * ceil(units / (parts * size))``, or all."""
        if not self.sharded:
            return self.length
        return product((self.unit, self.parts, ceil_div(self.units, self.parts * size)))

    @property
    def units(self) -> Length:
        """The number of its units."""
        units = quotient(self.length, self.unit)
        assert units is not None
        return units

    @property
    def dealt(self) -> bool:
        """Whether its ranks hold anything but ``ceil(length / size)`` tokens in a row."""
        return self.head_tail or not same_length(self.unit, 1)

    def __str__(self) -> str:
        kind = "" if self.sharded else " whole"
        unit = "" if same_length(self.unit, 1) else f" by {self.unit}"
        return f"{self.length}{kind or (' head-tail' if self.head_tail else '')}{unit}"


@dataclass(frozen=True)
class Sequence:
    """The tokens along one dimension: segments in global order; a rank holds its part of each, one after the other."""

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        if not self.segments:
            raise ValueError("a sequence has at least one segment")
        if not any(s.sharded for s in self.segments):
            raise ValueError("a sequence has at least one sharded segment; without one the value is Replicate")

    @staticmethod
    def of(*lengths: Length, layout: Layout = "contiguous") -> Sequence:
        """A sequence of sharded segments of these lengths."""
        return Sequence(tuple(Segment(as_length(n), layout=layout) for n in lengths))

    @property
    def length(self) -> Length:
        """Global number of tokens."""
        return as_length(sum((s.length for s in self.segments), start=0))

    @property
    def lengths(self) -> tuple[Length, ...]:
        return tuple(s.length for s in self.segments)

    @property
    def whole(self) -> tuple[bool, ...]:
        """Per segment: is it whole on every rank?"""
        return tuple(not s.sharded for s in self.segments)

    @property
    def head_tail(self) -> tuple[bool, ...]:
        """Per segment: is it split into heads and tails?"""
        return tuple(s.head_tail for s in self.segments)

    @property
    def units(self) -> tuple[Length, ...]:
        """Per segment: the tokens that stay together; one where any may part."""
        return tuple(s.unit for s in self.segments)

    @property
    def dealt_segments(self) -> bool:
        """Whether a segment is split otherwise than ``ceil(n / P)`` tokens in a row to each rank."""
        return any(s.dealt for s in self.segments)

    def times(self, count: Length) -> Sequence:
        """The sequence in which each token has become ``count`` tokens in a row."""
        if same_length(count, 1):
            return self
        return Sequence(
            tuple(
                replace(s, length=product((s.length, count)), unit=product((s.unit, count)) if s.sharded else 1)
                for s in self.segments
            )
        )

    def divided(self, count: Length) -> Sequence | None:
        """The way back: ``count`` tokens in a row as one; None where the ranks do not hold all of them together."""
        if same_length(count, 1):
            return self
        found = []
        for s in self.segments:
            length, unit = quotient(s.length, count), quotient(s.unit, count) if s.sharded else 1
            if length is None or unit is None:
                return None
            found.append(replace(s, length=length, unit=unit))
        return Sequence(tuple(found))

    @property
    def layout(self) -> Layout:
        """The layout of all split segments; contiguous if they differ."""
        return "head-tail" if all(s.head_tail for s in self.segments if s.sharded) else "contiguous"

    def dealt(self, size: int) -> Sequence:
        """The contiguous sequence of the rows of heads and tails, and of units, rank after rank, pads included."""
        return Sequence(
            tuple(Segment(as_length(size * s.local_length(size)), name=s.name) if s.dealt else s for s in self.segments)
        )

    def placed(self, size: int | None = None) -> tuple[tuple[Length, Length, Segment], ...]:
        """Per segment: its first row on each rank, its rows there, pads included, and itself; None: its global rows."""
        found: list[tuple[Length, Length, Segment]] = []
        row: Length = 0
        for segment in self.segments:
            rows = segment.length if size is None else segment.local_length(size)
            found.append((row, rows, segment))
            row = as_length(row + rows)
        return tuple(found)

    def local_length(self, size: int) -> Length:
        """Rows per rank, pads included."""
        return as_length(sum((s.local_length(size) for s in self.segments), start=0))

    def split_length(self, size: int) -> Length:
        """Rows per rank of the split segments, pads included: those that a gather sends."""
        return as_length(sum((s.local_length(size) for s in self.segments if s.sharded), start=0))

    def has_pads(self, size: int) -> bool:
        """Whether some rank may hold pad rows (a symbolic length may)."""
        split = [s for s in self.segments if s.sharded]
        return any(not isinstance(n := s.units, int) or n % (s.parts * size) != 0 for s in split)

    def same_as(self, other: Sequence) -> bool:
        """Whether both describe the same placement of tokens."""
        return (
            self.whole == other.whole
            and self.head_tail == other.head_tail
            and all(same_length(a, b) for a, b in zip(self.lengths, other.lengths, strict=True))
            and all(same_length(a, b) for a, b in zip(self.units, other.units, strict=True))
        )

    def __str__(self) -> str:
        return f"[{'|'.join(str(s) for s in self.segments)}]"


@dataclass(frozen=True)
class _Base:
    #: Why the value has this type: the plan line, or the rule and edge it came by.  No part of equality.
    origin: str = field(default="", compare=False, kw_only=True)


@dataclass(frozen=True)
class Replicate(_Base):
    """Every rank has the whole value and, in the backward pass, its whole gradient."""

    def __str__(self) -> str:
        return "R"


@dataclass(frozen=True)
class Used(_Base):
    """A replicated value as it is used with shards: the same data, but the gradient is a summand on each rank."""

    def __str__(self) -> str:
        return "U"


@dataclass(frozen=True)
class Partial(_Base):
    """Every rank has a summand; the value is their sum.  The gradient is whole on every rank."""

    def __str__(self) -> str:
        return "P"


@dataclass(frozen=True)
class Shard(_Base):
    """Dimension ``dim`` is ``outer * sequence``, and the tokens of ``sequence`` are split over the ranks.

    ``inner`` elements for each token of the sequence that is given are tokens themselves, in units of ``inner``.

    The gradient is sharded the same way; on a segment that is whole on each rank it is a summand, on pads zero.
    """

    dim: int = 0
    sequence: Sequence = None  # type: ignore[assignment]
    outer: Length = 1
    inner: InitVar[Length] = 1

    def __post_init__(self, inner: Length) -> None:
        if not isinstance(self.sequence, Sequence):
            raise TypeError("Shard needs a Sequence")
        if self.dim < 0:
            raise ValueError("Shard.dim is counted from the front: it is not negative")
        _check_length(self.outer, "Shard.outer")
        _check_length(inner, "Shard.inner")
        object.__setattr__(self, "sequence", self.sequence.times(inner))

    @property
    def plain(self) -> bool:
        """Whether the sequence is the whole dimension."""
        return same_length(self.outer, 1)

    @property
    def is_one_sequence(self) -> bool:
        """Whether the dimension is one sequence of single tokens: its length is that of the sequence."""
        return self.plain and len(self.sequence.segments) == 1 and self.sequence.units == (1,)

    def global_size(self) -> Length:
        return product((self.outer, self.sequence.length))

    def local_size(self, size: int) -> Length:
        """Size of dimension ``dim`` on each rank."""
        return product((self.outer, self.sequence.local_length(size)))

    def same_as(self, other: Type) -> bool:
        return (
            isinstance(other, Shard)
            and self.dim == other.dim
            and same_length(self.outer, other.outer)
            and self.sequence.same_as(other.sequence)
        )

    def __str__(self) -> str:
        # Units of all tokens are shown as a factor.
        unit = self.sequence.units[0]
        inner = unit if all(same_length(unit, n) for n in self.sequence.units) else 1
        tokens = self.sequence.divided(inner)
        body = str(tokens)
        if not self.plain or not same_length(inner, 1):
            body = f"{_factor(self.outer)}*{body}*{_factor(inner)}"
        return f"S({self.dim}, {body})"


Type = Replicate | Used | Partial | Shard


def shape_on_rank(shape: Iterable[Any], type_: object, size: int) -> list[Length]:
    """The shape on each rank of a value of this type and global shape."""
    found = [as_length(n) for n in shape]
    if isinstance(type_, Shard) and type_.dim < len(found):
        found[type_.dim] = type_.local_size(size)
    return found


_SHARD = re.compile(r"^S\((\d+), (?:([^\[\]]*)\*)?\[([^\]]*)\](?:\*([^\[\]]*))?\)$")


def parse(text: str) -> Type:
    """The inverse of ``str``: ``parse(str(t)) == t``.  Raises ``ValueError`` for anything else."""
    simple: dict[str, Type] = {"R": Replicate(), "U": Used(), "P": Partial()}
    if text in simple:
        return simple[text]
    match = _SHARD.match(text)
    if match is None:
        raise ValueError(f"not a sharding type: {text!r}; write R, U, P or S(dim, [n|m whole|l head-tail|k by 6])")
    dim, outer, body, inner = match.groups()
    segments = []
    for part in body.split("|"):
        part, _, unit = part.partition(" by ")
        whole, head_tail = part.endswith(" whole"), part.endswith(" head-tail")
        length = parse_length(part.removesuffix(" whole").removesuffix(" head-tail"))
        layout: Layout = "head-tail" if head_tail else "contiguous"
        segments.append(Segment(length, not whole, layout=layout, unit=parse_length(unit or "1")))
    return Shard(int(dim), Sequence(tuple(segments)), parse_length(outer or "1"), parse_length(inner or "1"))


def _factor(length: Length) -> str:
    return f"({length})" if isinstance(length, sympy.Add) else str(length)
