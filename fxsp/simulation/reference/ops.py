"""What each fxsp operator means, on a list with one tensor per rank; see :mod:`fxsp.simulation.reference.table`.

Written for clarity, and apart from ``fxsp.kernels``.  Where rows lie: :mod:`fxsp.simulation.reference.lanes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxsp.errors import VerificationError
from fxsp.simulation.reference.lanes import (
    Flags,
    Lanes,
    Lengths,
    Piece,
    check_local,
    each,
    fresh,
    pieces,
    rows_are_zeroed,
    total,
)


def annotate(x: Lanes) -> Lanes:
    """Identity: a plan entry waiting to be carried out."""
    return fresh(x)


def shard(x: Lanes, dim: int, lengths: Lengths, whole: Flags, zero_pads: bool, size: int = 1) -> Lanes:
    """Each rank's own rows of a value that every rank has; a pad is a copy of the segment's last row, or zero."""
    result = Lanes()
    for r, lane in enumerate(x):
        if lane.shape[dim] != sum(lengths):
            raise VerificationError(f"fxsp::shard of {list(lane.shape)} along {dim} as segments of {list(lengths)}")
        parts = []
        for piece in pieces(lengths, whole, size):
            rows = piece.rows(r)
            part = lane.index_select(dim, (piece.start + piece.tokens(rows)).to(lane.device))
            parts.append(rows_are_zeroed(part, dim, rows >= piece.length) if zero_pads else part)
        result.append(torch.cat(parts, dim))
    return result


def gather(x: Lanes, dim: int, lengths: Lengths, whole: Flags, size: int = 1) -> Lanes:
    """The global value on every rank: shards in order without their pads; a whole segment is the rank's own."""
    check_local("gather", x, dim, lengths, whole, size)

    def rows_of(piece: Piece, r: int) -> torch.Tensor:
        if piece.whole:
            own: torch.Tensor = x[r].narrow(dim, piece.local_start, piece.local_length)
            return own
        blocks = [lane.narrow(dim, piece.local_start, piece.local_length) for lane in x]
        return torch.cat(blocks, dim).narrow(dim, 0, piece.length)

    found = list(pieces(lengths, whole, size))
    own = any(piece.whole for piece in found)
    values = [torch.cat([rows_of(piece, r) for piece in found], dim) for r in range(size if own else 1)]
    return Lanes(values if own else values * size)


def reduce_scatter(x: Lanes, dim: int, lengths: Lengths, whole: Flags, size: int = 1) -> Lanes:
    """Each rank's own rows of the sum of summands, zero in pads; rows of a whole segment stay the rank's summand."""
    mine = shard(Lanes([total(x)] * size), dim, lengths, whole, True, size=size)
    kept = shard(x, dim, lengths, whole, True, size=size)
    result = Lanes()
    for summed, own in zip(mine, kept, strict=True):
        parts = [
            (own if piece.whole else summed).narrow(dim, piece.local_start, piece.local_length)
            for piece in pieces(lengths, whole, size)
        ]
        result.append(torch.cat(parts, dim))
    return result


def all_reduce(x: Lanes, size: int = 1) -> Lanes:
    """The sum of the ranks' summands."""
    return Lanes([total(x)] * size)


def use(x: Lanes, size: int = 1) -> Lanes:
    """Identity (its adjoint is the all-reduce)."""
    return fresh(x)


def all_to_all(x: Lanes, size: int = 1) -> Lanes:
    """Block ``j`` of rank ``i`` becomes block ``i`` of rank ``j``."""
    if any(lane.shape[0] != size for lane in x):
        raise VerificationError(f"fxsp::all_to_all of {list(x[0].shape)} on {size} ranks: the first size is no {size}")
    return Lanes([torch.stack([sender[r] for sender in x]) for r in range(size)])


def mask_pads(
    x: Lanes, dim: int, lengths: Lengths, whole: Flags, size: int = 1, head_tail: Flags = (), units: Lengths = ()
) -> Lanes:
    """Zero in pad rows; zero in rows of whole segments except on rank 0, so that a sum over ranks is the global sum."""
    check_local("mask_pads", x, dim, lengths, whole, size, head_tail, units)
    result = Lanes()
    for r, lane in enumerate(x):
        drop = [
            torch.full((piece.length,), r != 0) if piece.whole else piece.rows(r) >= piece.length
            for piece in pieces(lengths, whole, size, head_tail, units)
        ]
        result.append(rows_are_zeroed(lane, dim, torch.cat(drop)))
    return result


def positions(
    lengths: Lengths, whole: Flags, size: int = 1, device: Any = "cpu", head_tail: Flags = (), units: Lengths = ()
) -> Lanes:
    """The global index of each local row, int64; a pad has that of its segment's last row."""
    result = Lanes()
    for r in range(size):
        found = pieces(lengths, whole, size, head_tail, units)
        parts = [piece.start + piece.rows(r).clamp(max=piece.length - 1) for piece in found]
        result.append(torch.cat(parts).to(device))
    return result


def deal(
    x: Lanes, dim: int, lengths: Lengths, head_tail: Flags, zero_pads: bool, size: int, units: Lengths = ()
) -> Lanes:
    """Global rows in the order in which ranks hold them, by every rank for itself; a pad is a copy, or zero."""

    def dealt(lane: torch.Tensor) -> torch.Tensor:
        parts = []
        for piece in pieces(lengths, [False] * len(lengths), size, head_tail, units):
            rows = piece.dealt()
            part = lane.index_select(dim, (piece.start + piece.tokens(rows)).to(lane.device))
            parts.append(rows_are_zeroed(part, dim, rows >= piece.length) if zero_pads else part)
        return torch.cat(parts, dim)

    return each(x, dealt)


def undeal(x: Lanes, dim: int, lengths: Lengths, head_tail: Flags, size: int, units: Lengths = ()) -> Lanes:
    """The way back: every token from where it lies; pads are dropped."""

    def back(lane: torch.Tensor) -> torch.Tensor:
        start, parts = 0, []
        for piece in pieces(lengths, [False] * len(lengths), size, head_tail, units):
            rows = piece.dealt()
            parts.append(lane.index_select(dim, (start + rows.argsort()[: piece.length]).to(lane.device)))
            start += len(rows)
        return torch.cat(parts, dim)

    return each(x, back)


def take(x: Lanes, dim: int, size: int = 1) -> Lanes:
    """The rank-th of ``size`` equal blocks along ``dim``."""
    if any(lane.shape[dim] % size for lane in x):
        raise VerificationError(f"fxsp::take of {list(x[0].shape)}: {size} ranks do not divide dimension {dim}")
    block = x[0].shape[dim] // size
    return Lanes([lane.narrow(dim, r % size * block, block).clone() for r, lane in enumerate(x)])


def gather_sum(x: Lanes, dim: int, lengths: Lengths, whole: Flags, size: int = 1) -> Lanes:
    """The adjoint of :func:`shard`: shards in order without pads; rows of a whole segment are summed over ranks."""
    gathered = gather(x, dim, lengths, whole, size=size)
    parts = []
    for piece in pieces(lengths, whole, size):
        rows = [lane.narrow(dim, piece.start, piece.length) for lane in gathered]
        parts.append(total(rows) if piece.whole else rows[0])
    return Lanes([torch.cat(parts, dim)] * size)


def scale_whole(x: Lanes, dim: int, lengths: Lengths, whole: Flags, size: int = 1) -> Lanes:
    """Rows of whole segments divided by the number of ranks: of equal gradients, summands."""
    check_local("scale_whole", x, dim, lengths, whole, size)
    result = Lanes()
    for lane in x:
        parts = []
        for piece in pieces(lengths, whole, size):
            rows = lane.narrow(dim, piece.local_start, piece.local_length)
            parts.append(rows / size if piece.whole else rows)
        result.append(torch.cat(parts, dim))
    return result


def put(x: Lanes, dim: int, size: int = 1) -> Lanes:
    """The adjoint of :func:`take`: the rank-th of ``size`` blocks along ``dim``, zeros in the others."""
    return Lanes(
        [
            torch.cat([lane if j == r % size else torch.zeros_like(lane) for j in range(size)], dim)
            for r, lane in enumerate(x)
        ]
    )


def pack(x: Lanes, lengths: Lengths, size: int, zero_pads: bool) -> Lanes:
    """Global rows ``[S, ...]`` as one block of local rows per rank, ``[P, L, ...]``; done by every rank for itself."""
    whole = [False] * len(lengths)
    return each(x, lambda lane: torch.stack(shard(Lanes([lane] * size), 0, lengths, whole, zero_pads, size=size)))


def unpack(x: Lanes, lengths: Lengths, size: int) -> Lanes:
    """The way back: ``[P, L, ...]`` as the global rows ``[S, ...]``, pads dropped."""
    whole = [False] * len(lengths)
    return each(x, lambda lane: gather(Lanes(lane.unbind(0)), 0, lengths, whole, size=size)[0])


def pack_heads(xs: Sequence[Lanes], rows: int, zero_pads: bool, size: int) -> Lanes:
    """``[B, P h_i, L, D]`` each as ``[P, rows, B sum of h_i, D]``: the heads of each rank; pads copy the last row."""
    result = Lanes()
    for tensors in zip(*xs, strict=True):
        index = torch.arange(rows)
        blocks = []
        for r in range(size):
            heads = torch.cat([x.tensor_split(size, 1)[r].movedim(2, 0).flatten(1, 2) for x in tensors], 1)
            block = heads[index.clamp(max=len(heads) - 1).to(heads.device)]
            blocks.append(rows_are_zeroed(block, 0, index >= len(heads)) if zero_pads else block)
        result.append(torch.stack(blocks))
    return result


def unpack_heads(x: Lanes, heads: Sequence[int], length: int) -> Lanes:
    """The way back: ``[P, rows, B sum of h_i, D]`` as ``[B, length, P sum of h_i, D]``, tensor after tensor."""

    def back(lane: torch.Tensor) -> torch.Tensor:
        batch = lane.shape[2] // sum(heads)
        tensors = []
        for h, part in zip(heads, lane[:, :length].split([batch * h for h in heads], 2), strict=True):
            tensors.append(torch.cat([block.unflatten(1, (batch, h)) for block in part], 2))
        return torch.cat(tensors, 2).movedim(1, 0)

    return each(x, back)


def all_to_all_within(x: Lanes, size: int = 1) -> Lanes:
    """An all-to-all in each set of ``u`` consecutive ranks, ``u`` the first size of ``x``."""
    u = x[0].shape[0]
    return Lanes([torch.stack([sender[r % u] for sender in x[r - r % u : r - r % u + u]]) for r in range(size)])


def all_reduce_extreme(x: Lanes, op: str, size: int) -> Lanes:
    """The largest, or smallest, of the ranks' elements, as torch itself compares: what is not a number stays so."""
    stacked = torch.stack(list(x))
    return Lanes([stacked.amax(0) if op == "max" else stacked.amin(0)] * size)


def at_extreme(x: Lanes, value: Lanes, hit: Lanes) -> Lanes:
    """``value``, which is whole on every rank."""
    for lane, where in zip(x, hit, strict=True):
        if lane.shape != where.shape:
            raise VerificationError(f"fxsp::at_extreme of {list(lane.shape)} with hits of {list(where.shape)}")
    return fresh(value)


def at_extreme_backward(grad: Lanes, hit: Lanes, dims: Sequence[int], ties: bool) -> Lanes:
    """What each element that is the extreme gets of the gradient: equal parts, of all ranks' together."""
    shape = [1 if d in dims else n for d, n in enumerate(hit[0].shape)]
    counts = [where.double().sum(list(dims), keepdim=True) for where in hit]
    everyone = torch.stack(counts).sum(0) if ties else torch.ones(shape, dtype=torch.float64)
    result = Lanes()
    for g, where in zip(grad, hit, strict=True):
        part = g.reshape(shape).double() / everyone.to(g.device)
        # No element at all is the extreme where that is not a number: then no gradient is a number.
        part = torch.where(everyone.to(g.device) == 0, torch.nan, part)
        own = torch.where(where | part.isnan(), part, 0.0)
        result.append(own.to(g.dtype))
    return result


OPERATORS = (
    annotate, shard, gather, reduce_scatter, all_reduce, use, all_to_all, mask_pads, positions,
    deal, undeal, take, gather_sum, scale_whole, put, pack, unpack, pack_heads,
    unpack_heads, all_to_all_within, all_reduce_extreme, at_extreme, at_extreme_backward,
)  # fmt: skip
