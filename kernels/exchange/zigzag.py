"""Heads and tails: the order of rows in which a causal ring gives every rank the same work.

The ``n`` tokens of a segment are ``2 P`` chunks of ``C = ceil(n / 2P)`` rows, and rank ``r`` of ``P`` has chunk ``r``
(of the first half: a head) and chunk ``2P-1-r`` (a tail)::

    chunks    0  1  2  3  4  5          P = 3
    dealt     0  5  1  4  2  3          rank 0 has the first two, rank 1 the next two, ...

Or ``unit`` tokens in a row stay together (frames of so many tokens): then rank ``r`` has ``unit * ceil(n / unit P)`` in
a row, or two chunks of ``unit * ceil(n / 2 unit P)``.

``deal`` puts a whole value into that order, pads included, so that contiguous blocks of it are what the ranks hold;
``undeal`` is the way back, and drops the pads.  All operators that split and gather contiguous rows do the rest.  Pads
are copies of the segment's last row (in units: of the row at their place in the last unit), or zero.  Segments that are
split in another way, or not at all, stay as they are.

Each is the adjoint of the other: rows are moved, and no gradient is index-added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["chunk_rows", "deal", "rows_from", "undeal", "units_of"]

#: An ``int`` or a ``SymInt``.
Size = Any


def chunk_rows(length: Size, parts: int, unit: Size = 1) -> Size:
    """Rows of each of ``parts`` chunks of a segment, pads included."""
    if isinstance(unit, int) and unit == 1:
        return (length + (parts - 1)) // parts
    return unit * ((length // unit + (parts - 1)) // parts)


def units_of(units: Sequence[Size], segments: Sequence[Any]) -> Sequence[Size]:
    """The unit of each segment; one where none is given."""
    return units or [1] * len(segments)


def rows_from(length: Size, rank: int, size: int, head_tail: bool, device: torch.device, unit: Size = 1) -> Tensor:
    """Index in its segment of each of a rank's rows; that of a pad is not below ``length``."""
    if head_tail:
        rows = chunk_rows(length, 2 * size, unit)
        index = torch.arange(rows, device=device)
        return torch.cat([index + rank * rows, index + (2 * size - 1 - rank) * rows])
    rows = chunk_rows(length, size, unit)
    own: Tensor = torch.arange(rows, device=device) + rank * rows
    return own


# Element by element, without broadcasting: a guard on the length of a chunk would be a graph of its own.


def _is_dealt(head_tail: bool, unit: Size) -> bool:
    return head_tail or not (isinstance(unit, int) and unit == 1)


def _tokens(length: Size, size: int, device: torch.device, head_tail: bool, unit: Size) -> Tensor:
    """``[2 P C]``: the token of each dealt row; that of a pad is not below ``length``."""
    if not head_tail:
        return torch.arange(size * chunk_rows(length, size, unit), device=device)
    rows = chunk_rows(length, 2 * size, unit)
    row = torch.arange(2 * size * rows, device=device)
    at = row // rows
    head = at // 2
    tokens: Tensor = torch.where(at % 2 == 0, head, 2 * size - 1 - head) * rows + row % rows
    return tokens


def _copied(tokens: Tensor, length: Size, unit: Size) -> Tensor:
    """Those of pads replaced by the tokens that they copy."""
    if isinstance(unit, int) and unit == 1:
        return tokens.clamp(max=length - 1)
    return torch.where(tokens >= length, tokens % unit + (length - unit), tokens)


def _places(length: Size, size: int, device: torch.device, head_tail: bool, unit: Size) -> Tensor:
    """``[n]``: the dealt row of each token."""
    token = torch.arange(length, device=device)
    if not head_tail:
        return token
    rows = chunk_rows(length, 2 * size, unit)
    chunk = token // rows
    places: Tensor = torch.where(chunk < size, 2 * chunk, 4 * size - 1 - 2 * chunk) * rows + token % rows
    return places


def deal(
    x: Tensor,
    dim: int,
    lengths: Sequence[Size],
    head_tail: Sequence[bool],
    zero_pads: bool,
    size: int,
    units: Sequence[Size] = (),
) -> Tensor:
    """Rows in global order -> the rows of rank 0, of rank 1, ..., segment by segment."""
    index, pads = [], []
    start: Size = 0
    for length, dealt, unit in zip(lengths, head_tail, units_of(units, lengths), strict=True):
        if _is_dealt(dealt, unit):
            tokens = _tokens(length, size, x.device, dealt, unit)
        else:
            tokens = torch.arange(length, device=x.device)
        index.append(_copied(tokens, length, unit) + start)
        pads.append(tokens >= length)
        start = start + length
    rows = x.index_select(dim, torch.cat(index))
    if not zero_pads:
        return rows
    return rows.masked_fill(torch.cat(pads).view([-1 if d == dim else 1 for d in range(x.dim())]), 0)


def undeal(
    x: Tensor,
    dim: int,
    lengths: Sequence[Size],
    head_tail: Sequence[bool],
    size: int,
    units: Sequence[Size] = (),
) -> Tensor:
    """The way back; the tokens are outermost in memory, as those of a gathered value are."""
    index = []
    start: Size = 0
    for length, dealt, unit in zip(lengths, head_tail, units_of(units, lengths), strict=True):
        index.append(_places(length, size, x.device, dealt, unit) + start)
        parts = 2 * size if dealt else size
        start = start + (parts * chunk_rows(length, parts, unit) if _is_dealt(dealt, unit) else length)
    return x.movedim(dim, 0).index_select(0, torch.cat(index)).movedim(0, dim)
