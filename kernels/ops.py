"""The fxsp ops: what *partition* writes into a graph, differentiable, and opaque until *emit*.

``lengths`` and ``whole`` describe a :class:`fxsp.types.Sequence`: global lengths per segment, and whether a segment is
entire on every rank.  A split segment of ``n`` rows has ``L = ceil(n / size)`` rows on each rank; rank ``r`` holds rows
``r*L .. (r+1)*L``, and those from ``n`` on are pads.  Rank, size and group are plain arguments: what differs by rank
must be part of the graph, or a cached artifact of one rank would be loaded by another.

Segments split into heads and tails (see :mod:`fxsp.kernels.exchange.zigzag`) are dealt before they are split, and
gathered before they are undealt, and so are segments of units (frames, say, whose tokens stay together);
``head_tail`` says which are the former, ``units`` the tokens of a unit, where the place of a row matters (empty: none).

Types and adjoints are in the notation of ``fxsp.types`` (``S+`` is a shard whose pads are zero and whose whole segments
hold summands).  The gradient of ``R`` is ``R``, of ``S`` is ``S+``, of ``U`` is ``P``, and the other way round.

With ``size == 1`` (or ``group == ""`` where an op has no size) no process group is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxsp.kernels import counts, lowering
from fxsp.kernels.attention.banded import BANDED
from fxsp.kernels.attention.ops import ATTENTIONS
from fxsp.kernels.draws import DRAWS
from fxsp.kernels.exchange import exchange
from fxsp.kernels.exchange.zigzag import deal, undeal
from fxsp.kernels.extremes import EXTREMES
from fxsp.kernels.op import Op, define, unchanged

__all__ = ["LOCAL_OPS", "OPS", "as_view", "fxsp_ops", "local_ops", "op_of", "record_of"]

#: Where the operators are called from: ``fxsp_ops.shard.default``.
fxsp_ops = torch.ops.fxsp
local_ops = torch.ops.fxsp_local


def _contiguous(x: Tensor, *group: Any) -> Tensor:
    """The shape of what went through a collective, said directly: graphs are full of it."""
    if group[0]:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=x.device)


def _shared_out(grad: Tensor, dim: int, lengths: Any, whole: Any, rank: int, size: int, group: str) -> Tensor:
    """Rows of the whole segments are divided by the number of ranks: each has the same gradient."""
    grad = fxsp_ops.shard(grad, dim, lengths, whole, True, rank, size, group)
    return fxsp_ops.scale_whole(grad, dim, lengths, whole, size) if size > 1 and any(whole) else grad


_SEQ = "int dim, SymInt[] lengths, bool[] whole"
_PLACED = "bool[] head_tail=[], SymInt[] units=[]"
_RANKS = "int rank, int size, str group"

#: The operators of ours, all of them.
OPS: tuple[Op, ...] = (
    Op("annotate", "(Tensor x, str kind, int dim, SymInt text_len, str entry, int unit=1) -> Tensor",
       unchanged, "R -> R", lambda g, *_: g),
    Op("shard", f"(Tensor x, {_SEQ}, bool zero_pads, {_RANKS}) -> Tensor", lowering.shard, "R -> S",
       lambda g, dim, lengths, whole, zero_pads, *at: fxsp_ops.gather_sum(g, dim, lengths, whole, *at),
       returns=counts.returned_rows),
    Op("gather", f"(Tensor x, {_SEQ}, {_RANKS}) -> Tensor", lowering.gather, "S -> R", _shared_out,
       sends=counts.rows_sent),
    Op("gather_used", f"(Tensor x, {_SEQ}, {_RANKS}) -> Tensor", lowering.gather, "S -> U", "reduce_scatter",
       sends=counts.rows_sent, returns=counts.scattered, moves=counts.moved_by_gather, saved=True),
    Op("reduce_scatter", f"(Tensor x, {_SEQ}, {_RANKS}) -> Tensor", lowering.reduce_scatter, "P -> S+", "gather_used",
       sends=counts.rows_scattered),
    Op("gather_sum", f"(Tensor x, {_SEQ}, {_RANKS}) -> Tensor", lowering.gather_sum, "S+ -> R",
       lambda g, dim, lengths, whole, *at: fxsp_ops.shard(g, dim, lengths, whole, True, *at),
       sends=counts.rows_summed),
    Op("all_reduce", "(Tensor x, str group) -> Tensor", lowering.all_reduce, "P -> R", "use", fake=_contiguous,
       sends=counts.reduced),
    Op("use", "(Tensor x, str group) -> Tensor", unchanged, "R -> U",
       lambda g, group: fxsp_ops.reduce_grad(g, group) if group else g, returns=counts.returned_use),
    # An all_reduce of a gradient: emit may put several into one bucket.
    Op("reduce_grad", "(Tensor x, str group) -> Tensor", lowering.all_reduce, "P -> R", "use", fake=_contiguous,
       sends=counts.reduced),
    # A whole value whose gradient is multiplied, where an outer reducer takes the mean (see fxsp.summands).
    Op("scale_grad", "(Tensor x, int factor) -> Tensor", unchanged, "U -> U", lambda g, factor: g * factor),
    Op("all_to_all", "(Tensor x, str group) -> Tensor", lowering.all_to_all, "S -> S", "all_to_all",
       fake=_contiguous, sends=counts.exchanged, returns=counts.once_more, moves=counts.moved, saved=True),
    # Of as many consecutive ranks as the first dimension has blocks.
    Op("all_to_all_within", f"(Tensor x, {_RANKS}) -> Tensor", lowering.all_to_all_within, "S -> S",
       "all_to_all_within", sends=counts.exchanged_within, returns=counts.once_more, moves=counts.moved, saved=True),
    Op("mask_pads", f"(Tensor x, {_SEQ}, int rank, int size, {_PLACED}) -> Tensor", lowering.mask_pads, "S -> S+",
       "mask_pads"),
    Op("scale_whole", f"(Tensor x, {_SEQ}, int size) -> Tensor", lowering.scale_whole, "S -> S+", "scale_whole"),
    Op("positions", f"(SymInt[] lengths, bool[] whole, int rank, int size, Device device, {_PLACED}) -> Tensor",
       lowering.positions),
    Op("place_positions", "(SymInt[] lengths, bool[] whole, int ulysses, int rank, int size, Device device, "
       f"{_PLACED}) -> Tensor", lowering.place_positions),
    # Of U and P too: the rows of each rank, one rank after the other.
    Op("deal", "(Tensor x, int dim, SymInt[] lengths, bool[] head_tail, bool zero_pads, int size, SymInt[] units=[])"
       " -> Tensor", deal, "R -> R",
       lambda g, dim, lengths, dealt, _, size, units: fxsp_ops.undeal(g, dim, lengths, dealt, size, units)),
    Op("undeal", "(Tensor x, int dim, SymInt[] lengths, bool[] head_tail, int size, SymInt[] units=[]) -> Tensor",
       undeal, "R -> R",
       lambda g, dim, lengths, dealt, size, units: fxsp_ops.deal(g, dim, lengths, dealt, True, size, units)),
    Op("take", "(Tensor x, int dim, int rank, int size) -> Tensor", lowering.take, "U -> S", "put",
       moves=counts.moved_by_take),
    Op("put", "(Tensor x, int dim, int rank, int size) -> Tensor", lowering.put, "S -> P", "take"),
    Op("pack", "(Tensor x, SymInt[] lengths, int size, bool zero_pads) -> Tensor", exchange.pack, "U -> S",
       lambda g, lengths, size, zero_pads: fxsp_ops.unpack(g, lengths, size), moves=counts.moved),
    Op("unpack", "(Tensor x, SymInt[] lengths, int size) -> Tensor", exchange.unpack, "S -> U",
       lambda g, lengths, size: fxsp_ops.pack(g, lengths, size, True), moves=counts.moved),
    *exchange.HEADS,
    *ATTENTIONS,
    *EXTREMES,
)  # fmt: skip

#: Operators that every rank runs on what it has: made of ATen operators, so that compilers see through them.
LOCAL_OPS: tuple[Op, ...] = (*DRAWS, BANDED)

_libraries = [torch.library.Library("fxsp", "DEF"), torch.library.Library("fxsp_local", "FRAGMENT")]
for _library, _ops in zip(_libraries, (OPS, LOCAL_OPS), strict=True):
    define(_library, _ops)
_RECORDS: dict[Any, Op] = {op.target: op for op in (*OPS, *LOCAL_OPS)}


def record_of(target: Any) -> Op | None:
    """The record of an operator overload of ours, local ones included; None of anything else."""
    return _RECORDS.get(target)


def op_of(node: Node) -> Op | None:
    """The operator among ranks that a node calls; None of any other node."""
    op = _RECORDS.get(node.target)
    return op if op is not None and op.namespace == "fxsp" else None


class _View(torch.autograd.Function):
    """An operator may not return its argument; a Function may return a view of it."""

    @staticmethod
    def forward(x: Tensor, gradient: Callable[..., Tensor], *others: Any) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.gradient, *ctx.others = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return ctx.gradient(grad, *ctx.others), None, *(None for _ in ctx.others)


def as_view(name: str, x: Tensor, *others: Any) -> Tensor:
    """The operator ``name``, which is nothing forward, without the copy that it has to make."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    op = _RECORDS[getattr(fxsp_ops, name).default]
    return _View.apply(x, op.gradient, *others)  # type: ignore[no-any-return]
