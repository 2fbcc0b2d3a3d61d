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

import torch
from torch import Tensor

from fxsp.kernels.rows import along
from fxsp.kernels.tokens import Flags, Lengths, Part, Size, placed

__all__ = ["deal", "undeal"]

# Element by element, without broadcasting: a guard on the length of a chunk would be a graph of its own.


def _tokens(part: Part, device: torch.device) -> Tensor:
    """``[2 P C]``: the token of each dealt row; that of a pad is not below ``length``."""
    if not part.head_tail:
        return torch.arange(part.size * part.chunk if part.dealt else part.length, device=device)
    row = torch.arange(part.chunks * part.chunk, device=device)
    at = row // part.chunk
    head = at // 2
    tokens: Tensor = torch.where(at % 2 == 0, head, part.chunks - 1 - head) * part.chunk + row % part.chunk
    return tokens


def _copied(tokens: Tensor, length: Size, unit: Size) -> Tensor:
    """Those of pads replaced by the tokens that they copy."""
    if isinstance(unit, int) and unit == 1:
        return tokens.clamp(max=length - 1)
    return torch.where(tokens >= length, tokens % unit + (length - unit), tokens)


def _places(part: Part, device: torch.device) -> Tensor:
    """``[n]``: the dealt row of each token."""
    token = torch.arange(part.length, device=device)
    if not part.head_tail:
        return token
    chunk = token // part.chunk
    at = torch.where(chunk < part.size, 2 * chunk, 2 * part.chunks - 1 - 2 * chunk)
    places: Tensor = at * part.chunk + token % part.chunk
    return places


def _parts(lengths: Lengths, head_tail: Flags, size: int, units: Lengths) -> list[Part]:
    return placed(lengths, [False] * len(lengths), size, head_tail, units)


def deal(
    x: Tensor, dim: int, lengths: Lengths, head_tail: Flags, zero_pads: bool, size: int,
    units: Lengths = (),
) -> Tensor:  # fmt: skip
    """Rows in global order -> the rows of rank 0, of rank 1, ..., segment by segment."""
    index, pads = [], []
    for part in _parts(lengths, head_tail, size, units):
        tokens = _tokens(part, x.device)
        index.append(_copied(tokens, part.length, part.unit) + part.start)
        pads.append(tokens >= part.length)
    rows = x.index_select(dim, torch.cat(index))
    if not zero_pads:
        return rows
    return rows.masked_fill(torch.cat(pads).view(along(x, dim)), 0)


def undeal(x: Tensor, dim: int, lengths: Lengths, head_tail: Flags, size: int, units: Lengths = ()) -> Tensor:
    """The way back; the tokens are outermost in memory, as those of a gathered value are."""
    index = []
    start: Size = 0
    for part in _parts(lengths, head_tail, size, units):
        index.append(_places(part, x.device) + start)
        start = start + (part.chunks * part.chunk if part.dealt else part.length)
    return x.movedim(dim, 0).index_select(0, torch.cat(index)).movedim(0, dim)
