"""What a rank sends, as a formula in the lengths of the sequences and the number of ranks.

A collective that moves tokens sends ``c * rows * share`` bytes: ``c`` bytes for each token, the local rows of the
tokens that travel, ``ceil(S/P)`` for each segment that is split (``2 ceil(S/2P)`` into heads and tails) and ``S`` for
one that is whole, and the share that leaves the rank::

    gather, all_gather          (P - 1)      everyone else gets the rank's rows
    all_to_all, reduce_scatter  (P - 1)/P    one part in P stays at home; among U ranks only, one in U
    all_reduce                  2(P - 1)/P   a reduce-scatter and an all-gather
    rotation                    1            one place on, in a ring

What an attention moves through device memory has the same form, without a share for rows with pads, and with ``1/P`` of
all tokens where pads are gone (each rank then has a part of the heads).

The formula is read from the operator and the tokens that its pass recorded, and it is accepted only if it gives, at the
lengths and the number of ranks at hand, exactly the bytes that the pass counted.  ``c`` holds whatever else decides the
size (batch, heads, head size, dtype), as numbers; where frames of so many tokens were split, ``S`` counts frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from fxsp.report import CollectiveRecord, Memory

__all__ = ["Formula", "Names", "Sent", "format_formulas", "formula_of", "memory_formulas", "rows_of", "sum_text"]

#: Kind of collective -> the share that leaves a rank, as text and as a function of P.
_SHARES = {
    "all_gather": "(P-1)",
    "all_to_all": "(P-1)/P",
    "reduce_scatter": "(P-1)/P",
    "all_reduce": "2(P-1)/P",
    "rotation": "",
}


def _share(text: str, size: int, members: int = 0) -> Fraction:
    shares = {
        "": Fraction(1),
        "1/P": Fraction(1, size),
        "(P-1)": Fraction(size - 1),
        "(P-1)/P": Fraction(size - 1, size),
    }
    if members:
        shares["(U-1)/U"] = Fraction(members - 1, members)
    return shares.get(text, Fraction(2 * (size - 1), size))


def rows_of(length: int, parts: int, size: int) -> int:
    """Rows of a segment on each rank, pads included."""
    return parts * -(-length // (parts * size)) if parts else length


def _rows_text(name: str, parts: int) -> str:
    """Heads and tails are two parts."""
    return f"{parts}⌈{name}/{parts}P⌉" if parts > 1 else f"⌈{name}/P⌉" if parts else name


class Names:
    """Short names for lengths: ``S`` if there is one, else ``S1``, ``S2``, ... in order of first use."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, int], None] = {}

    def add(self, *formulas: Formula | None) -> None:
        """Remember the lengths in formulas; :meth:`short` knows them."""
        self._found.update(dict.fromkeys(key for formula in formulas if formula for key, _ in formula.tokens))

    def short(self, key: tuple[str, int]) -> str:
        if len(self._found) == 1:
            return "S"
        return f"S{list(self._found).index(key) + 1}"

    def legend(self) -> list[tuple[str, str, int]]:
        """``(short name, what it counts, its value)`` of every length."""
        return [(self.short(key), *key) for key in self._found]


@dataclass(frozen=True)
class Formula:
    """Bytes that each rank sends: ``per_token * rows * share``, or ``per_token * share`` where no tokens travel."""

    per_token: Fraction
    share: str
    #: What travels: ``(key of the length, in how many parts it is split on each rank)``; 0 parts: it is whole.
    tokens: tuple[tuple[tuple[str, int], int], ...] = ()
    #: U, where the share speaks of it.
    members: int = 0

    def __call__(self, size: int, lengths: Mapping[str, int] | None = None) -> int:
        """The bytes on ``size`` ranks; ``lengths`` replaces the lengths of the sequences that it names."""
        given = lengths or {}
        rows = sum(rows_of(given.get(what, length), parts, size) for (what, length), parts in self.tokens)
        return int(-(-self.per_token * (rows if self.tokens else 1) * _share(self.share, size, self.members) // 1))

    def text(self, names: Names) -> str:
        """``3072·(⌈S1/P⌉+⌈S2/P⌉)·(P-1)/P``."""
        factors = [str(self.per_token)] if self.per_token != 1 else []
        if self.tokens:
            terms = [_rows_text(names.short(key), parts) for key, parts in self.tokens]
            factors.append(terms[0] if len(terms) == 1 else f"({'+'.join(terms)})")
        return "·".join([*factors, *([self.share] if self.share else [])])


@dataclass(frozen=True)
class Sent:
    """One collective of a report, its bytes for the inputs at hand, and the formula where there is one."""

    record: CollectiveRecord
    bytes: Any
    formula: Formula | None = None


def formula_of(record: CollectiveRecord, sent: int, size: int, number: Callable[[Any], int]) -> Formula | None:
    """The formula of one collective, or None if ``sent``, the bytes counted on ``size`` ranks, do not have that form.

    ``number`` reads a length.
    """
    kind, tokens, members = record.kind, record.tokens, record.members
    if kind not in _SHARES or (tokens is None and kind != "all_reduce"):
        return None
    share = "(U-1)/U" if members else _SHARES[kind]
    segments = tokens.segments if tokens is not None else ()
    units = [s.unit for s in segments if s.sharded]
    if not all(isinstance(unit, int) for unit in units):
        return None
    travelling: list[tuple[tuple[str, int], int]] = []
    rows = 0
    for segment in segments:
        if not segment.sharded and kind in ("all_gather", "rotation"):
            continue  # whole on every rank: it stays at home
        if not segment.name or segment.unit != units[0]:
            return None
        n = number(segment.length) // int(segment.unit)
        travelling.append(((segment.name, n), segment.parts))
        rows += rows_of(n, segment.parts, size)
    per_token = Fraction(sent) / (_share(share, size, members) * (rows if travelling else 1))
    if per_token.denominator != 1 and travelling:
        return None
    formula = Formula(per_token, share, tuple(travelling), members)
    return formula if formula(size) == sent else None


def memory_formulas(memory: Memory, number: Callable[[Any], int], size: int) -> tuple[list[Formula], int]:
    """What the moves of an attention have in common with its tokens, and the bytes of those that have no formula."""
    found, rest = [], 0
    for move in memory.moves:
        tokens = move.tokens
        if tokens is None or not all(segment.name for segment in tokens.segments):
            rest += move.bytes
            continue
        local = move.rows == "local"
        units = [number(s.unit) for s in tokens.segments]
        if any(unit != units[0] for unit in units):
            rest += move.bytes
            continue
        keys = tuple(((s.name, number(s.units)), s.parts if local else 0) for s in tokens.segments)
        rows = Fraction(number(tokens.local_length(size))) if local else Fraction(number(tokens.length), size)
        rows /= units[0]
        found.append(Formula(move.bytes / rows, "" if local else "1/P", keys))
    return found, rest


def format_formulas(formulas: Iterable[Formula], names: Names) -> str:
    """A sum of formulas; those of one form are one term."""
    sums: dict[tuple[str, tuple[tuple[tuple[str, int], int], ...], int], Fraction] = {}
    for f in formulas:
        key = (f.share, f.tokens, f.members)
        sums[key] = sums.get(key, Fraction(0)) + f.per_token
    return " + ".join(Formula(total, *key).text(names) for key, total in sums.items())


def sum_text(parts: Iterable[tuple[Any, Formula | None]], names: Names) -> str:
    """``"1024·⌈S/P⌉ + 96 (at these sizes) B"``: bytes with their formulas as a sum; nothing if they are none."""
    parts = list(parts)
    formulas = format_formulas([formula for _, formula in parts if formula is not None], names)
    rest = sum(size for size, formula in parts if formula is None)
    terms = [*([formulas] if formulas else []), *([f"{rest} (at these sizes)"] if rest else [])]
    return f"{' + '.join(terms)} B" if terms else ""
