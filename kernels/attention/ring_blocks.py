"""Which keys meet which queries in a ring: tokens in chunks, and per step the calls of the block kernel.

A rank's rows are one *chunk* of each segment, one after the other.  In a ring of ``r`` places, each of ``u`` ranks that
have exchanged heads, a place holds ``u * ceil(n / (u*r))`` rows of a segment of ``n`` tokens; rows from ``n`` on are
pads.  A segment that is whole is one chunk, the same in every place, and meets its queries in the first step only.

Of a segment that is split into heads and tails (:mod:`fxsp.kernels.exchange.zigzag`) place ``p`` has two chunks of
the ``2r``: ``p`` and ``2r-1-p``.  In a causal attention the own keys are seen in order; of the keys of an earlier
place all queries see the head, and those of a later place the tail alone sees, all of them: half of the block each
time.

Of a segment of units (frames of so many tokens) all this is said of units.

Where lengths are ints the pads of keys are left out by a narrow, and chunks whose keys all lie in the future of a
causal attention are skipped, and so are those that lie before the window of every query.  A length may be symbolic:
then no length is compared, chunks of one sequence are compared by their places, and pads are masked.

Under a window a long chunk is taken in pieces, so that most of what no query sees is skipped too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from fxsp.kernels.tokens import Flags, Lengths, Size, placed
from fxsp.types import as_length, same_length

__all__ = ["Chunk", "Meeting", "chunks_of", "in_pieces", "meetings", "pairs_of"]

#: Under a window: rows of a piece at least, and pieces of a chunk at most (each takes calls of its own).
_ROWS, _PIECES = 1024, 8
#: Lengths of segments, which are whole, which are heads and tails (empty: none), and their units (left out: one).
Tokens = tuple[Any, ...]


@dataclass(frozen=True)
class Chunk:
    """``rows`` local rows from ``row`` on: the tokens ``first, first + 1, ...``; those from ``limit`` on are pads."""

    segment: int
    #: Which of the segment's chunks it is, in the order of tokens.
    place: int
    row: Size
    rows: Size
    first: Size
    limit: Size
    whole: bool

    @property
    def static(self) -> bool:
        return all(isinstance(n, int) for n in (self.rows, self.first, self.limit))

    @property
    def real(self) -> Size:
        """Rows that are no pads; all of them where lengths are symbolic."""
        return max(min(self.limit - self.first, self.rows), 0) if self.static and not self.whole else self.rows

    @property
    def pads(self) -> bool:
        """Whether there may be pads among the first ``real`` rows."""
        return not (self.whole or self.static)


@dataclass(frozen=True)
class Meeting:
    """One call of the block kernel: the queries of some adjacent chunks, the first ``real`` keys of some chunks.

    ``how`` is ``"full"``, ``"causal"`` (key row <= query row) or ``"positions"``: what the causal flag and the window
    make of the positions of queries and keys.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    how: str = "full"
    #: Mask the pads among the keys.
    pads: bool = False


def chunks_of(
    lengths: Lengths, whole: Flags, ulysses: int, ring: int, place: int, head_tail: Flags = (),
    units: Lengths = (),
) -> list[Chunk]:  # fmt: skip
    """The chunks of one place of the ring, in the order of its rows."""
    result: list[Chunk] = []
    row: Size = 0
    for i, part in enumerate(placed(lengths, whole, ulysses * ring, head_tail, units)):
        rows = part.length if part.whole else ulysses * part.chunk
        for chunk in (0,) if part.whole else (place, 2 * ring - 1 - place) if part.head_tail else (place,):
            limit = part.start + part.length
            result.append(Chunk(i, chunk, row, rows, part.start + chunk * rows, limit, part.whole))
            row = row + rows
    return result


def in_pieces(chunks: Sequence[Chunk], window: Size) -> list[Chunk]:
    """Long chunks in pieces, if there is a window that is smaller than they are; lengths are ints then."""
    if not isinstance(window, int):
        return list(chunks)
    result: list[Chunk] = []
    for c in chunks:
        if not (c.static and window < c.rows > _ROWS):
            result.append(replace(c, place=c.place * _PIECES))
            continue
        step = max(_ROWS, -(-c.rows // _PIECES))
        for i, start in enumerate(range(0, c.rows, step)):
            rows = min(step, c.rows - start)
            result.append(replace(c, place=c.place * _PIECES + i, row=c.row + start, rows=rows, first=c.first + start))
    return result


def meetings(
    queries: Sequence[Chunk], keys: Sequence[Chunk], causal: bool, same: bool, window: Size = None
) -> list[Meeting]:
    """The calls that one step takes; ``same``: queries and keys are of one sequence.

    ``window``: no query sees a key that is more than so many tokens before it (None: there is none).
    """
    everyone = tuple(range(len(queries)))
    usable = [j for j, k in enumerate(keys) if not (isinstance(k.real, int) and k.real == 0)]
    if not usable:
        return []
    if window is not None and all(_reach(q, keys[j], window) == "all" for q in queries for j in usable):
        window = None
    if window is None and not causal:
        return [Meeting(everyone, tuple(usable), pads=any(keys[j].pads for j in usable))]
    one = len({c.segment for c in (*queries, *keys)}) == 1
    if window is None and same and one and [q.place for q in queries] == [k.place for k in keys]:
        # The rows of one segment are in order, and pads come last: a query that is no pad sees none.
        return [Meeting(everyone, tuple(usable), "causal")]
    if causal and not (same or all(c.static for c in (*queries, *keys))):
        return [Meeting(everyone, tuple(usable), "positions", any(keys[j].pads for j in usable))]
    result: list[Meeting] = []
    open_for: tuple[tuple[int, ...], list[int]] | None = None
    for i, q in enumerate(queries):
        if isinstance(q.rows, int) and q.rows == 0:
            continue
        seen = {j: _relation(q, keys[j], causal, same, window) for j in usable}
        full = tuple(j for j in usable if seen[j] == "full")
        if open_for is not None and open_for[0] == full:
            open_for[1].append(i)
        else:
            _close(open_for, keys, queries, result, causal)
            open_for = (full, [i])
        result += [Meeting((i,), (j,), how) for j, how in seen.items() if how == "causal"]
        cut = tuple(j for j in usable if seen[j] == "positions")
        if cut:
            result.append(Meeting((i,), cut, "positions", any(keys[j].pads for j in cut)))
    _close(open_for, keys, queries, result, causal)
    return result


@lru_cache(maxsize=4096)
def pairs_of(
    queries: Tokens, keys: Tokens, causal: bool, ulysses: int, ring: int, place: int, window: int | None = None
) -> int:
    """Pairs of a query and a key that one place of the ring computes, pads too; lengths are ints, in tuples."""
    own = in_pieces(chunks_of(queries[0], queries[1], ulysses, ring, place, *queries[2:]), window)
    same = same_sequence(queries, keys)
    pairs = 0
    for step in range(ring):
        here = chunks_of(keys[0], keys[1], ulysses, ring, (place - step) % ring, *keys[2:])
        here = in_pieces([chunk for chunk in here if step == 0 or not chunk.whole], window)
        for call in meetings(own, here, causal, same, window):
            m, n = sum(own[i].rows for i in call.queries), sum(here[j].real for j in call.keys)
            full = min(m, n)
            # Row i of a causal call sees the first i + 1 keys.
            pairs += full * (full + 1) // 2 + (m - full) * n if call.how == "causal" else m * n
    return pairs


def _close(
    group: tuple[tuple[int, ...], list[int]] | None,
    keys: Sequence[Chunk],
    queries: Sequence[Chunk],
    result: list[Meeting],
    causal: bool,
) -> None:
    """Adjacent queries that see the same chunks in full share a call."""
    if group is None or not group[0]:
        return
    full, members = group
    # Symbolic pads of another segment may lie before real queries; in the queries' own segment only before pads.
    pads = any(
        keys[j].pads and (not causal or any(queries[i].segment != keys[j].segment for i in members)) for j in full
    )
    result.append(Meeting(tuple(members), full, pads=pads))


def _relation(q: Chunk, k: Chunk, causal: bool, same: bool, window: Size) -> str:
    """How much of chunk ``k`` the queries of chunk ``q`` see: ``""`` (nothing), full, causal or positions."""
    how = _past(q, k, same) if causal else "full"
    if not how or window is None:
        return how
    return {"all": how, "none": ""}.get(_reach(q, k, window), "positions")


def _past(q: Chunk, k: Chunk, same: bool) -> str:
    """The same by the causal flag alone."""
    if same and (q.segment, q.place) == (k.segment, k.place):
        return "causal"
    if same:
        return "full" if (k.segment, k.place) < (q.segment, q.place) else ""
    first, last = _span(q)
    if k.first > last:
        return ""
    return "full" if k.first + k.real - 1 <= first else "positions"


def _reach(q: Chunk, k: Chunk, window: Size) -> str:
    """Whether all pairs are within the window, none is, or (also if that is not known) some are."""
    if not (q.static and k.static and isinstance(window, int)):
        return "some"
    first, last = _span(q)
    if last - k.first <= window:
        return "all"
    return "none" if first - (k.first + k.real - 1) > window else "some"


def _span(q: Chunk) -> tuple[int, int]:
    """The first and the last token of the queries; pads are their segment's last token."""
    last = max(q.limit - 1, 0)
    return min(q.first, last), min(q.first + q.rows - 1, last)


def same_sequence(a: Tokens, b: Tokens) -> bool:
    """Whether both describe one sequence; adds no guard."""

    def parts(lengths: Lengths, *kinds: Any) -> tuple[list[list[Any]], list[Any]]:
        whole, head_tail, units = (*kinds, (), ())[:3]
        return [list(whole), list(head_tail)], [*lengths, *(units or [1] * len(lengths))]

    (kinds, sizes), (others, other_sizes) = parts(*a), parts(*b)
    return kinds == others and all(
        same_length(as_length(m), as_length(n)) for m, n in zip(sizes, other_sizes, strict=True)
    )
