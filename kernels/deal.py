"""Heads and tails: the order of rows in which a causal ring gives every rank the same work.

The ``n`` tokens of a segment are ``2 P`` chunks of ``C = ceil(n / 2P)`` rows, and rank ``r`` of ``P`` has chunk ``r``
(of the first half: a head) and chunk ``2P-1-r`` (a tail)::

    chunks    0  1  2  3  4  5          P = 3
    dealt     0  5  1  4  2  3          rank 0 has the first two, rank 1 the next two, ...

``deal`` puts a whole value into that order, pads included, so that contiguous blocks of it are what the ranks hold;
``undeal`` is the way back, and drops the pads.  All operators that split and gather contiguous rows do the rest.  Pads
are copies of the segment's last row, or zero.  Segments that are split in another way, or not at all, stay as they are.

Each is the adjoint of the other: rows are moved, and no gradient is index-added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["deal", "rows_from", "undeal"]

#: An ``int`` or a ``SymInt``.
Size = Any


def _chunk(length: Size, size: int) -> Size:
    return (length + (2 * size - 1)) // (2 * size)


def rows_from(length: Size, rank: int, size: int, head_tail: bool, device: torch.device) -> Tensor:
    """Index in its segment of each of a rank's rows; that of a pad is not below ``length``."""
    if head_tail:
        rows = _chunk(length, size)
        index = torch.arange(rows, device=device)
        return torch.cat([index + rank * rows, index + (2 * size - 1 - rank) * rows])
    rows = (length + (size - 1)) // size
    own: Tensor = torch.arange(rows, device=device) + rank * rows
    return own


# Element by element, without broadcasting: a guard on the length of a chunk would be a graph of its own.


def _tokens(length: Size, size: int, device: torch.device) -> Tensor:
    """``[2 P C]``: the token of each dealt row; that of a pad is not below ``length``."""
    rows = _chunk(length, size)
    row = torch.arange(2 * size * rows, device=device)
    at = row // rows
    head = at // 2
    tokens: Tensor = torch.where(at % 2 == 0, head, 2 * size - 1 - head) * rows + row % rows
    return tokens


def _places(length: Size, size: int, device: torch.device) -> Tensor:
    """``[n]``: the dealt row of each token."""
    rows = _chunk(length, size)
    token = torch.arange(length, device=device)
    chunk = token // rows
    places: Tensor = torch.where(chunk < size, 2 * chunk, 4 * size - 1 - 2 * chunk) * rows + token % rows
    return places


def deal(x: Tensor, dim: int, lengths: Sequence[Size], head_tail: Sequence[bool], zero_pads: bool, size: int) -> Tensor:
    """Rows in global order -> the rows of rank 0, of rank 1, ..., segment by segment."""
    index, pads = [], []
    start: Size = 0
    for length, dealt in zip(lengths, head_tail, strict=True):
        tokens = _tokens(length, size, x.device) if dealt else torch.arange(length, device=x.device)
        index.append(tokens.clamp(max=length - 1) + start)
        pads.append(tokens >= length)
        start = start + length
    rows = x.index_select(dim, torch.cat(index))
    if not zero_pads:
        return rows
    return rows.masked_fill(torch.cat(pads).view([-1 if d == dim else 1 for d in range(x.dim())]), 0)


def undeal(x: Tensor, dim: int, lengths: Sequence[Size], head_tail: Sequence[bool], size: int) -> Tensor:
    """The way back; the tokens are outermost in memory, as those of a gathered value are."""
    index = []
    start: Size = 0
    for length, dealt in zip(lengths, head_tail, strict=True):
        places = _places(length, size, x.device) if dealt else torch.arange(length, device=x.device)
        index.append(places + start)
        start = start + (2 * size * _chunk(length, size) if dealt else length)
    return x.movedim(dim, 0).index_select(0, torch.cat(index)).movedim(0, dim)
