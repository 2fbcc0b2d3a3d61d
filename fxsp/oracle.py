"""What each fxsp operator means, on a list with one tensor per rank.

This is the reference that the operators and everything made of them are tested against.  It is written apart from
``fxsp.kernels``, for clarity and not for speed, and must stay so: a mistake in one has to show against the other.

Rows of a split segment of ``n`` tokens: ``L = ceil(n / P)`` per rank, rank ``r`` has rows ``r*L .. (r+1)*L``; a row
``>= n`` is a pad.  A whole segment lies entire on every rank.  Segments follow each other along the dimension.  Of a
segment of heads and tails rank ``r`` has the ``r``-th block of ``ceil(n / 2P)`` rows, counted from the front, and the
``r``-th, counted from the end of all ``2P`` blocks.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxsp import oracle_attention, oracle_deal
from fxsp.errors import UnsupportedError, VerificationError

__all__ = ["Call", "Lanes", "bind", "gather", "shard", "total"]


class Lanes(list[Any]):
    """One tensor per rank (a tuple of them, of an operator with several results)."""


@dataclass(frozen=True)
class Call:
    """An fxsp operator with its operands."""

    name: str
    function: Callable[..., Lanes]
    arguments: dict[str, Any]

    def run(self, *, poison_pads: bool = False) -> Lanes:
        """Execute it; ``poison_pads`` overwrites the pads it makes, unless they are promised to be zero."""
        result = self.function(**self.arguments)
        if not poison_pads or self.arguments.get("zero_pads", True):
            return result
        if self.name == "shard":
            return _poison(result, **self.arguments)
        if self.name == "pack_heads":
            length = self.arguments["xs"][0][0].shape[2]
            return Lanes([torch.cat([y[:, :length], 0.75 * y[:, :1].expand_as(y[:, length:])], 1) for y in result])
        x, lengths, size = (self.arguments[name] for name in ("x", "lengths", "size"))
        if self.name == "deal":
            how = self.arguments["dim"], lengths, self.arguments["head_tail"], size
            return Lanes([oracle_deal.poisoned(y, lane, *how) for y, lane in zip(result, x, strict=True)])
        # pack: for each receiver
        split = [False] * len(lengths)
        return Lanes(
            [
                torch.stack(_poison(Lanes(y), Lanes([lane] * size), 0, lengths, split, size))
                for y, lane in zip(result, x, strict=True)
            ]
        )


def bind(name: str, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Call:
    """The call of operator ``name``; tensor operands are :class:`Lanes`.  The rank and the group are dropped.

    Raises ``VerificationError`` if the call is for another number of ranks, ``UnsupportedError`` if the operator is
    unknown.
    """
    function = _OPERATORS.get(name)
    if function is None:
        raise UnsupportedError(f"the simulator does not know fxsp::{name}; it knows {', '.join(sorted(_OPERATORS))}")
    arguments = dict(inspect.signature(function).bind(*args, **kwargs).arguments)
    if name in _LOCAL and size % arguments["size"] == 0:
        # Among some consecutive ranks.
        return Call(name, function, arguments)
    if arguments.get("size", size) != size:
        raise VerificationError(f"fxsp::{name} is for {arguments['size']} ranks, the simulation has {size}")
    arguments["size"] = size
    return Call(name, function, arguments)


# --- pieces ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    """One segment: where it starts in the global and in the local dimension, and how long it is in each."""

    start: int
    length: int
    local_start: int
    local_length: int
    whole: bool
    #: Number of ranks, if it is split into heads and tails; else 0.
    head_tail: int = 0

    def rows(self, rank: int) -> torch.Tensor:
        """Index within the segment of each local row; pads run past the end."""
        if self.head_tail:
            blocks = torch.arange(self.head_tail * self.local_length).view(2 * self.head_tail, -1)
            return torch.cat([blocks[rank], blocks[-1 - rank]])
        first = 0 if self.whole else rank * self.local_length
        return torch.arange(first, first + self.local_length)


def _pieces(
    lengths: Sequence[int], whole: Sequence[bool], size: int, head_tail: Sequence[bool] = ()
) -> Iterator[_Piece]:
    start = local_start = 0
    for i, (n, is_whole) in enumerate(zip(lengths, whole, strict=True)):
        n = int(n)
        dealt = len(head_tail) > i and bool(head_tail[i])
        local = n if is_whole else 2 * -(-n // (2 * size)) if dealt else -(-n // size)
        yield _Piece(start, n, local_start, local, bool(is_whole), size if dealt else 0)
        start += n
        local_start += local


def _rows_are_zeroed(x: torch.Tensor, dim: int, row_is_zero: torch.Tensor) -> torch.Tensor:
    """``x`` with zeros (never a product with zero) where ``row_is_zero`` along ``dim``."""
    shape = [1] * x.dim()
    shape[dim] = -1
    return x.masked_fill(row_is_zero.to(x.device).view(shape), 0)


def total(lanes: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum over ranks: half precision is accumulated in float32, bool is "any"."""
    dtype = lanes[0].dtype
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else torch.int64 if dtype == torch.bool else dtype
    result = lanes[0].to(wide, copy=True)
    for lane in lanes[1:]:
        result = result + lane.to(wide)
    summed: torch.Tensor = result.to(dtype)
    return summed


def _fresh(x: Lanes) -> Lanes:
    """Copies, as an operator never returns its operand; one tensor for all ranks stays one."""
    copies = {id(lane): lane.clone() for lane in x}
    return Lanes([copies[id(lane)] for lane in x])


# --- operators -------------------------------------------------------------------------------------------------------


def annotate(x: Lanes, kind: str, dim: int, text_len: int, entry: str, size: int = 0) -> Lanes:
    """Identity: a plan entry waiting to be carried out."""
    return _fresh(x)


def shard(
    x: Lanes,
    dim: int,
    lengths: Sequence[int],
    whole: Sequence[bool],
    zero_pads: bool,
    rank: int = 0,
    size: int = 1,
    group: str = "",
) -> Lanes:
    """Each rank's own rows of a value that every rank has; a pad is a copy of the segment's last row, or zero."""
    result = Lanes()
    for r, lane in enumerate(x):
        if lane.shape[dim] != sum(lengths):
            raise VerificationError(f"fxsp::shard of {list(lane.shape)} along {dim} as segments of {list(lengths)}")
        parts = []
        for piece in _pieces(lengths, whole, size):
            segment = lane.narrow(dim, piece.start, piece.length)
            rows = piece.rows(r)
            part = segment.index_select(dim, rows.clamp(max=piece.length - 1).to(lane.device))
            parts.append(_rows_are_zeroed(part, dim, rows >= piece.length) if zero_pads else part)
        result.append(torch.cat(parts, dim))
    return result


def gather(
    x: Lanes,
    dim: int,
    lengths: Sequence[int],
    whole: Sequence[bool],
    rank: int = 0,
    size: int = 1,
    group: str = "",
) -> Lanes:
    """The global value on every rank: shards in order without their pads; a whole segment is the rank's own."""
    _check_local("gather", x, dim, lengths, whole, size)

    def rows_of(piece: _Piece, r: int) -> torch.Tensor:
        if piece.whole:
            own: torch.Tensor = x[r].narrow(dim, piece.local_start, piece.local_length)
            return own
        blocks = [lane.narrow(dim, piece.local_start, piece.local_length) for lane in x]
        return torch.cat(blocks, dim).narrow(dim, 0, piece.length)

    pieces = list(_pieces(lengths, whole, size))
    own = any(piece.whole for piece in pieces)
    values = [torch.cat([rows_of(piece, r) for piece in pieces], dim) for r in range(size if own else 1)]
    return Lanes(values if own else values * size)


def reduce_scatter(
    x: Lanes,
    dim: int,
    lengths: Sequence[int],
    whole: Sequence[bool],
    rank: int = 0,
    size: int = 1,
    group: str = "",
) -> Lanes:
    """Each rank's own rows of the sum of summands, zero in pads; rows of a whole segment stay the rank's summand."""
    mine = shard(Lanes([total(x)] * size), dim, lengths, whole, True, size=size)
    kept = shard(x, dim, lengths, whole, True, size=size)
    result = Lanes()
    for summed, own in zip(mine, kept, strict=True):
        parts = [
            (own if piece.whole else summed).narrow(dim, piece.local_start, piece.local_length)
            for piece in _pieces(lengths, whole, size)
        ]
        result.append(torch.cat(parts, dim))
    return result


def all_reduce(x: Lanes, group: str = "", size: int = 1) -> Lanes:
    """The sum of the ranks' summands."""
    return Lanes([total(x)] * size)


def use(x: Lanes, group: str = "", size: int = 1) -> Lanes:
    """Identity (its adjoint is the all-reduce)."""
    return _fresh(x)


def all_to_all(x: Lanes, group: str = "", size: int = 1) -> Lanes:
    """Block ``j`` of rank ``i`` becomes block ``i`` of rank ``j``."""
    if any(lane.shape[0] != size for lane in x):
        raise VerificationError(f"fxsp::all_to_all of {list(x[0].shape)} on {size} ranks: the first size is no {size}")
    return Lanes([torch.stack([sender[r] for sender in x]) for r in range(size)])


def mask_pads(
    x: Lanes,
    dim: int,
    lengths: Sequence[int],
    whole: Sequence[bool],
    rank: int = 0,
    size: int = 1,
    head_tail: Sequence[bool] = (),
) -> Lanes:
    """Zero in pad rows; zero in rows of whole segments except on rank 0, so that a sum over ranks is the global sum."""
    _check_local("mask_pads", x, dim, lengths, whole, size, head_tail)
    result = Lanes()
    for r, lane in enumerate(x):
        drop = [
            torch.full((piece.length,), r != 0) if piece.whole else piece.rows(r) >= piece.length
            for piece in _pieces(lengths, whole, size, head_tail)
        ]
        result.append(_rows_are_zeroed(lane, dim, torch.cat(drop)))
    return result


def positions(
    lengths: Sequence[int],
    whole: Sequence[bool],
    rank: int = 0,
    size: int = 1,
    device: torch.device | str = "cpu",
    head_tail: Sequence[bool] = (),
) -> Lanes:
    """The global index of each local row, int64; a pad has that of its segment's last row."""
    result = Lanes()
    for r in range(size):
        pieces = _pieces(lengths, whole, size, head_tail)
        parts = [piece.start + piece.rows(r).clamp(max=piece.length - 1) for piece in pieces]
        result.append(torch.cat(parts).to(device))
    return result


def deal(x: Lanes, dim: int, lengths: Sequence[int], head_tail: Sequence[bool], zero_pads: bool, size: int) -> Lanes:
    """Global rows in the order of ranks, by every rank for itself."""
    return _each(x, lambda lane: oracle_deal.deal(lane, dim, lengths, head_tail, zero_pads, size))


def undeal(x: Lanes, dim: int, lengths: Sequence[int], head_tail: Sequence[bool], size: int) -> Lanes:
    """The way back; pads are dropped."""
    return _each(x, lambda lane: oracle_deal.undeal(lane, dim, lengths, head_tail, size))


def take(x: Lanes, dim: int, rank: int = 0, size: int = 1) -> Lanes:
    """The rank-th of ``size`` equal blocks along ``dim``."""
    if any(lane.shape[dim] % size for lane in x):
        raise VerificationError(f"fxsp::take of {list(x[0].shape)}: {size} ranks do not divide dimension {dim}")
    block = x[0].shape[dim] // size
    return Lanes([lane.narrow(dim, r % size * block, block).clone() for r, lane in enumerate(x)])


def gather_sum(
    x: Lanes,
    dim: int,
    lengths: Sequence[int],
    whole: Sequence[bool],
    rank: int = 0,
    size: int = 1,
    group: str = "",
) -> Lanes:
    """The adjoint of :func:`shard`: shards in order without pads; rows of a whole segment are summed over ranks."""
    gathered = gather(x, dim, lengths, whole, size=size)
    parts = []
    for piece in _pieces(lengths, whole, size):
        rows = [lane.narrow(dim, piece.start, piece.length) for lane in gathered]
        parts.append(total(rows) if piece.whole else rows[0])
    return Lanes([torch.cat(parts, dim)] * size)


def scale_whole(x: Lanes, dim: int, lengths: Sequence[int], whole: Sequence[bool], size: int = 1) -> Lanes:
    """Rows of whole segments divided by the number of ranks: of equal gradients, summands."""
    _check_local("scale_whole", x, dim, lengths, whole, size)
    result = Lanes()
    for lane in x:
        parts = []
        for piece in _pieces(lengths, whole, size):
            rows = lane.narrow(dim, piece.local_start, piece.local_length)
            parts.append(rows / size if piece.whole else rows)
        result.append(torch.cat(parts, dim))
    return result


def put(x: Lanes, dim: int, rank: int = 0, size: int = 1) -> Lanes:
    """The adjoint of :func:`take`: the rank-th of ``size`` blocks along ``dim``, zeros in the others."""
    return Lanes(
        [
            torch.cat([lane if j == r % size else torch.zeros_like(lane) for j in range(size)], dim)
            for r, lane in enumerate(x)
        ]
    )


def pack(x: Lanes, lengths: Sequence[int], size: int, zero_pads: bool) -> Lanes:
    """Global rows ``[S, ...]`` as one block of local rows per rank, ``[P, L, ...]``; done by every rank for itself."""
    whole = [False] * len(lengths)
    return _each(x, lambda lane: torch.stack(shard(Lanes([lane] * size), 0, lengths, whole, zero_pads, size=size)))


def unpack(x: Lanes, lengths: Sequence[int], size: int) -> Lanes:
    """The way back: ``[P, L, ...]`` as the global rows ``[S, ...]``, pads dropped."""
    whole = [False] * len(lengths)
    return _each(x, lambda lane: gather(Lanes(lane.unbind(0)), 0, lengths, whole, size=size)[0])


def pack_heads(xs: Sequence[Lanes], rows: int, zero_pads: bool, size: int, fuse: bool = False) -> Lanes:
    """``[B, P h_i, L, D]`` each as ``[P, rows, B sum of h_i, D]``: the heads of each rank; pads copy the last row."""
    result = Lanes()
    for tensors in zip(*xs, strict=True):
        index = torch.arange(rows)
        blocks = []
        for r in range(size):
            heads = torch.cat([x.tensor_split(size, 1)[r].movedim(2, 0).flatten(1, 2) for x in tensors], 1)
            block = heads[index.clamp(max=len(heads) - 1).to(heads.device)]
            blocks.append(_rows_are_zeroed(block, 0, index >= len(heads)) if zero_pads else block)
        result.append(torch.stack(blocks))
    return result


def unpack_heads(x: Lanes, heads: Sequence[int], length: int, fuse: bool = False, size: int = 0) -> Lanes:
    """The way back: ``[P, rows, B sum of h_i, D]`` as ``[B, length, P sum of h_i, D]``, tensor after tensor."""

    def back(lane: torch.Tensor) -> torch.Tensor:
        batch = lane.shape[2] // sum(heads)
        tensors = []
        for h, part in zip(heads, lane[:, :length].split([batch * h for h in heads], 2), strict=True):
            tensors.append(torch.cat([block.unflatten(1, (batch, h)) for block in part], 2))
        return torch.cat(tensors, 2).movedim(1, 0)

    return _each(x, back)


def _each(x: Lanes, function: Callable[[torch.Tensor], torch.Tensor]) -> Lanes:
    """A local operator: one result per distinct tensor, so that what all ranks share stays shared."""
    results = {id(lane): function(lane) for lane in x}
    return Lanes([results[id(lane)] for lane in x])


def all_to_all_within(x: Lanes, rank: int = 0, size: int = 1, group: str = "") -> Lanes:
    """An all-to-all in each set of ``u`` consecutive ranks, ``u`` the first size of ``x``."""
    u = x[0].shape[0]
    return Lanes([torch.stack([sender[r % u] for sender in x[r - r % u : r - r % u + u]]) for r in range(size)])


def _lanes(function: Callable[..., Any]) -> Callable[..., Lanes]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Lanes:
        return Lanes(function(*args, **kwargs))

    return run


#: Operators without communication: their size may be that of a part of the ranks.
_LOCAL = frozenset({"deal", "pack", "pack_heads", "put", "take", "undeal", "unpack"})

_OPERATORS: dict[str, Callable[..., Lanes]] = {
    "all_to_all_within": all_to_all_within,
    "ring_attention": _lanes(oracle_attention.ring_attention),
    "ring_attention_backward": _lanes(oracle_attention.ring_attention_backward),
    "all_reduce": all_reduce,
    "all_to_all": all_to_all,
    "annotate": annotate,
    "deal": deal,
    "gather": gather,
    "gather_sum": gather_sum,
    "gather_used": gather,
    "mask_pads": mask_pads,
    "pack": pack,
    "pack_heads": pack_heads,
    "place_positions": _lanes(oracle_attention.place_positions),
    "positions": positions,
    "put": put,
    "reduce_grad": all_reduce,
    "reduce_scatter": reduce_scatter,
    "scale_whole": scale_whole,
    "shard": shard,
    "take": take,
    "undeal": undeal,
    "unpack": unpack,
    "unpack_heads": unpack_heads,
    "use": use,
}


def _check_local(
    name: str,
    x: Lanes,
    dim: int,
    lengths: Sequence[int],
    whole: Sequence[bool],
    size: int,
    head_tail: Sequence[bool] = (),
) -> None:
    expected = sum(piece.local_length for piece in _pieces(lengths, whole, size, head_tail))
    for lane in x:
        if lane.shape[dim] != expected:
            raise VerificationError(
                f"fxsp::{name} of {list(lane.shape)} along {dim}: {list(lengths)} have {expected} local rows"
            )


def _poison(
    result: Lanes, x: Lanes, dim: int, lengths: Sequence[int], whole: Sequence[bool], size: int, **_: Any
) -> Lanes:
    """Other values in the pad rows: those of the first row, three quarters of them where numbers are real.

    Values that the program might have, because pads, being copies of rows, promise just that: nothing new overflows or
    leaves a domain, so zero times a pad is zero, and an index of a pad is in range.
    """
    poisoned = Lanes()
    for r, lane in enumerate(result):
        lane = lane.clone()
        for piece in _pieces(lengths, whole, size):
            pads = (piece.rows(r) >= piece.length).nonzero().flatten()
            if piece.whole or not pads.numel():
                continue
            first = x[r].narrow(dim, 0, 1)
            if lane.dtype.is_floating_point or lane.dtype.is_complex:
                first = first * 0.75
            rows = piece.local_start + pads.to(lane.device)
            lane.index_copy_(dim, rows, first.repeat_interleave(pads.numel(), dim))
        poisoned.append(lane)
    return poisoned
