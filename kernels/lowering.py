"""What each fxsp op means, in ATen and ``_c10d_functional`` ops: one function per op.

The same functions are the eager implementation (``kernels.ops``), the shape of the result (its fake implementation runs
them on fake tensors) and what *emit* writes into the graph in place of the op, so the three cannot disagree.

Every function returns a dense tensor, and may return its argument or a view of it: the op, which may not, copies then.
Where rows have to be copied, because of pads or because several segments are put in order, that is one pass on CUDA, by
the kernels of :mod:`fxsp.kernels.exchange.place`; where strides suffice nothing is copied.
A length may be a ``SymInt``: then no formula here compares lengths, so that one graph serves dividing lengths and
others.  Where lengths are ints, a rank that has no pads gets a plain narrow instead of index arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxsp.kernels import collectives
from fxsp.kernels.attention.ring_blocks import chunks_of
from fxsp.kernels.exchange import place
from fxsp.kernels.rows import along, cut, joined
from fxsp.kernels.tokens import Flags, Lengths, Part, placed
from fxsp.types import as_length, product, same_length

__all__ = ["known_dense"]


def known_dense(x: Tensor) -> bool:
    """Whether the elements of ``x`` certainly fill their memory, each its own place; adds no guard."""
    left = [
        (as_length(n), as_length(s))
        for n, s in zip(x.shape, x.stride(), strict=True)
        if not same_length(as_length(n), 1)
    ]
    expected = product(())
    while left:
        inner = next((i for i, (_, stride) in enumerate(left) if same_length(stride, expected)), None)
        if inner is None:
            return any(n == 0 for n, _ in left)
        expected = product((expected, left.pop(inner)[0]))
    return True


def dense(x: Tensor) -> Tensor:
    """``x``, or a copy of it without gaps between its elements (its dimensions stay in the same order in memory)."""
    return x if known_dense(x) else x.clone()


def all_reduce(x: Tensor, group: str) -> Tensor:
    return collectives.all_reduce(x, group) if group else x


def all_to_all(x: Tensor, group: str) -> Tensor:
    size = x.shape[0]
    return collectives.all_to_all(x, group) if group and size != 1 else x


def all_to_all_within(x: Tensor, rank: int, size: int, group: str) -> Tensor:
    members = x.shape[0]
    return collectives.all_to_all_within(x, rank, size, group) if members != 1 else x


def _own_rows(x: Tensor, dim: int, part: Part, zero_pads: bool, rank: int) -> Tensor:
    """This rank's rows of a split segment along ``dim``, pads at the tail."""
    length = part.length
    if isinstance(length, int):
        first = min(rank * part.rows, length)
        real = min(part.rows, length - first)
        mine = x.narrow(dim, part.start + first, real)
        if real == part.rows:
            return mine
        shape = list(x.shape)
        shape[dim] = part.rows - real
        pads = x.new_zeros(shape) if zero_pads else x.narrow(dim, part.start + length - 1, 1).expand(shape)
        return torch.cat([mine, pads], dim) if real else pads
    index = part.index(rank, x.device)
    mine = x.index_select(dim, index.clamp(max=length - 1) + part.start)
    return mine.masked_fill((index >= length).view(along(x, dim)), 0) if zero_pads else mine


def _rows_kernels(x: Tensor, dim: int) -> Any:
    """The kernels that move rows along ``dim`` of tensors like ``x``, or None."""
    return place.kernels(x, [n for i, n in enumerate(x.shape) if i != dim])


def shard(
    x: Tensor, dim: int, lengths: Lengths, whole: Flags, zero_pads: bool, rank: int, size: int, group: str
) -> Tensor:
    parts = placed(lengths, whole, size)
    pads = any(part.may_have_pads(rank) for part in parts)
    movers = _rows_kernels(x, dim) if size > 1 and (pads or len(lengths) > 1) else None
    if movers is not None:
        own = movers.pack_rows(x.movedim(dim, 0), lengths, whole, size, zero_pads, rank, 1, dim)
        return own.select(0, 0)  # type: ignore[no-any-return]
    pieces = [
        x.narrow(dim, part.start, part.length) if part.whole or size == 1 else _own_rows(x, dim, part, zero_pads, rank)
        for part in parts
    ]
    return dense(joined(pieces, dim))


def _gathered(
    x: Tensor, dim: int, lengths: Lengths, whole: Flags, size: int, group: str, whole_rows: Callable[[Tensor], Tensor]
) -> Tensor:
    """The global rows from everyone's local ones: one all-gather for all split segments together.

    The gather wants the tokens outermost; of one segment the result is a view with the tokens outermost in memory.
    Several are put in order, without pads, where they are wanted.
    """
    if size == 1 and not any(whole):
        return dense(x)
    local = x.movedim(dim, 0)
    parts = placed(lengths, whole, size)
    own = [local if len(parts) == 1 else local.narrow(0, part.row, part.rows) for part in parts]
    split = [piece for piece, part in zip(own, parts, strict=True) if not part.whole]
    send = local if len(split) == len(own) else (joined(split, 0) if split else None)
    blocks = None
    if send is not None:
        blocks = collectives.all_gather(send, size, group) if size > 1 else send.contiguous()
        if len(split) > 1:
            blocks = blocks.view([size, sum(part.rows for part in parts if not part.whole), *send.shape[1:]])
            movers = _rows_kernels(x, dim) if len(split) == len(own) else None
            if movers is not None:
                return movers.unpack_rows(blocks, lengths, whole, size, 0, dim)  # type: ignore[no-any-return]
    pieces = []
    gathered = iter([] if blocks is None else cut(blocks, [part.rows for part in parts if not part.whole], 1))
    for piece, part in zip(own, parts, strict=True):
        if part.whole:
            pieces.append(whole_rows(piece))
            continue
        rows = next(gathered)
        if len(split) > 1:
            rows = rows.reshape([size * part.rows, *local.shape[1:]])
        if not (isinstance(part.length, int) and size * part.rows == part.length):
            rows = rows.narrow(0, 0, part.length)
        pieces.append(rows)
    return dense(joined(pieces, 0)).movedim(0, dim)


def gather(x: Tensor, dim: int, lengths: Lengths, whole: Flags, rank: int, size: int, group: str) -> Tensor:
    return _gathered(x, dim, lengths, whole, size, group, lambda rows: rows)


def gather_sum(x: Tensor, dim: int, lengths: Lengths, whole: Flags, rank: int, size: int, group: str) -> Tensor:
    return _gathered(x, dim, lengths, whole, size, group, lambda rows: all_reduce(rows, group if size > 1 else ""))


def reduce_scatter(x: Tensor, dim: int, lengths: Lengths, whole: Flags, rank: int, size: int, group: str) -> Tensor:
    if size == 1:
        return dense(x)
    rows = x.movedim(dim, 0)
    padded = len(lengths) > 1 or not isinstance(lengths[0], int) or lengths[0] % size
    movers = _rows_kernels(x, dim) if padded and not any(whole) else None
    if movers is not None:
        send = movers.pack_rows(rows, lengths, whole, size, True, 0, size, 0).flatten(0, 1)
        return collectives.reduce_scatter(send, size, group).movedim(0, dim)
    parts = placed(lengths, whole, size)
    own = [rows if len(parts) == 1 else rows.narrow(0, part.start, part.length) for part in parts]
    blocks = []
    for piece, part in zip(own, parts, strict=True):
        if part.whole:
            continue
        if not (isinstance(part.length, int) and size * part.rows == part.length):
            piece = torch.constant_pad_nd(piece, [0, 0] * (x.dim() - 1) + [0, size * part.rows - part.length])
        blocks.append(piece)
    if not blocks:
        return dense(x)
    split = [part.rows for part in parts if not part.whole]
    if len(blocks) == 1:
        send = blocks[0]
    else:
        send = torch.cat([b.unflatten(0, [size, n]) for b, n in zip(blocks, split, strict=True)], 1).flatten(0, 1)
    summed = iter(cut(collectives.reduce_scatter(send, size, group), split, 0))
    pieces = [piece if part.whole else next(summed) for piece, part in zip(own, parts, strict=True)]
    return dense(joined(pieces, 0)).movedim(0, dim)


def mask_pads(
    x: Tensor,
    dim: int,
    lengths: Lengths,
    whole: Flags,
    rank: int,
    size: int,
    head_tail: Flags = (),
    units: Lengths = (),
) -> Tensor:
    keep, all_kept = [], True
    for part in placed(lengths, whole, size, head_tail, units):
        if part.whole:
            keep.append(torch.full([part.length], rank == 0, dtype=torch.bool, device=x.device))
            all_kept = all_kept and rank == 0
        else:
            keep.append(part.index(rank, x.device) < part.length)
            all_kept = all_kept and not part.may_have_pads(rank)
    if all_kept or (size == 1 and not any(head_tail)):
        return dense(x)
    return x.masked_fill(~joined(keep, 0).view(along(x, dim)), 0)


def scale_whole(x: Tensor, dim: int, lengths: Lengths, whole: Flags, size: int) -> Tensor:
    pieces = []
    for part in placed(lengths, whole, size):
        piece = x.narrow(dim, part.row, part.rows)
        pieces.append(piece / size if part.whole else piece)
    return dense(joined(pieces, dim))


def positions(
    lengths: Lengths,
    whole: Flags,
    rank: int,
    size: int,
    device: torch.device,
    head_tail: Flags = (),
    units: Lengths = (),
) -> Tensor:
    pieces = []
    for part in placed(lengths, whole, size, head_tail, units):
        index = part.index(rank, device)
        pieces.append((index if part.whole else index.clamp(max=part.length - 1)) + part.start)
    return joined(pieces, 0)


def place_positions(
    lengths: Lengths,
    whole: Flags,
    ulysses: int,
    rank: int,
    size: int,
    device: torch.device,
    head_tail: Flags = (),
    units: Lengths = (),
) -> Tensor:
    chunks = chunks_of(lengths, whole, ulysses, size // ulysses, rank // ulysses, head_tail, units)
    rows = [(torch.arange(c.rows, device=device) + c.first).clamp(max=c.limit - 1) for c in chunks]
    return joined(rows, 0)


def take(x: Tensor, dim: int, rank: int, size: int) -> Tensor:
    block = x.shape[dim] // size
    return dense(x.narrow(dim, rank * block, block))


def put(x: Tensor, dim: int, rank: int, size: int) -> Tensor:
    block = x.shape[dim]
    pads = [0, 0] * (x.dim() - 1 - dim) + [rank * block, (size - 1 - rank) * block]
    return torch.constant_pad_nd(x, pads) if size > 1 else x
