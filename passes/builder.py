"""Writing calls into graphs: nodes with the right metadata; in local ones sizes from lengths, and our operators."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from fxsp.errors import UnsupportedError
from fxsp.kernels.ops import fxsp_ops as _ops
from fxsp.kernels.ops import op_of
from fxsp.lengths import hint
from fxsp.passes.graph import Call, facts, mark
from fxsp.report import CollectiveRecord, Report
from fxsp.source import describe, module_path, node_source
from fxsp.torch_internals import python_dispatch, sympy_to_fx
from fxsp.types import Length, Ranks, Sequence, Shard, as_length, product

__all__ = ["Builder", "Writer", "erase_unused", "memory_order"]

#: What a node has from the one that it was written for.
_LENT = ("stack_trace", "nn_module_stack", "recompute", "ac_graph_id", "custom", "seq_nr")
aten = torch.ops.aten


def memory_order(value: torch.Tensor) -> list[int]:
    """The dimensions of a value, the outermost in memory first."""
    steps = [hint(as_length(stride)) for stride in value.stride()]
    return sorted(range(len(steps)), key=lambda d: -steps[d])


class Writer:
    """Writes calls on behalf of an *origin* node, which lends its source line and module path.

    Their values come from running the operators on fakes, under ``mode``.
    """

    #: What passes know of the origin, and of what is written for it, too.
    lent: tuple[str, ...] = ("island", "row_wise")

    def __init__(self, graph: Graph, mode: Any = None) -> None:
        self.graph = graph
        self.mode = mode
        self.before: Node | None = None
        self.origin: Node | None = None

    def at(self, node: Node) -> None:
        """Write before ``node`` from now on, and on its behalf."""
        self.before = self.origin = node

    @contextlib.contextmanager
    def on_behalf_of(self, origin: Node | None) -> Iterator[None]:
        """Nodes written meanwhile take their origin from another node."""
        before, self.origin = self.origin, origin or self.origin
        try:
            yield
        finally:
            self.origin = before

    def note(self, new: Node) -> Node:
        """``new`` with what it has from its origin."""
        if self.origin is not None:
            for key in _LENT:
                if key in self.origin.meta:
                    new.meta.setdefault(key, self.origin.meta[key])
            known = facts(self.origin)
            if lent := {name: value for name in self.lent if (value := getattr(known, name))}:
                mark(new, **lent)
        return new

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """A call with its metadata."""
        node = self.write(target, *args, **kwargs)
        self.refresh(node)
        return node

    def write(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """The same, but without ``meta["val"]``."""
        assert self.before is not None
        with self.graph.inserting_before(self.before):
            return self.note(self.graph.call_function(target, args, kwargs))

    def same(self, call: Call, arguments: dict[str, Any], **changes: Any) -> Node:
        """The same call with other arguments."""
        args, kwargs = call.bound_to(arguments).rebuild(**changes)
        return self.call(call.op, *args, **kwargs)

    def permuted(self, x: Node, order: list[int]) -> Node:
        """``x`` with its dimensions in this order."""
        return x if order == sorted(order) else self.call(aten.permute.default, x, order)

    def dense(self, x: Node, order: list[int]) -> Node:
        """``x`` as it is, without gaps in memory, where its dimensions are in this order."""
        new = self.call(aten.contiguous.default, self.permuted(x, order))
        return self.permuted(new, [order.index(d) for d in range(len(order))])

    def refresh(self, node: Node) -> None:
        """Compute ``meta["val"]`` from the arguments' values."""
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        assert callable(node.target)
        try:
            with self.mode, python_dispatch(), torch.no_grad():
                node.meta["val"] = node.target(*args, **kwargs)
        except Exception as error:
            raise UnsupportedError(
                f"{describe(self.origin)} writes in place; as a value, {node.target} fails: "
                f"{type(error).__name__}: {error}"
            ) from error

    def sizes_of(self, node: Node) -> list[Any]:
        """The sizes of a tensor as arguments: ints, and ``sym_size`` nodes where they are symbolic."""
        shape = node.meta["val"].shape
        return [
            size if isinstance(size, int) else self.call(aten.sym_size.int, node, d) for d, size in enumerate(shape)
        ]


class Builder(Writer):
    """Writes local graphs, where they are at (at their end, say): lengths as arguments, our operators by their meaning.

    Values are found later, by *verify*.
    """

    lent = ("written_attention",)

    def __init__(self, graph: Graph, ranks: Ranks, report: Report, *, training: bool) -> None:
        super().__init__(graph)
        self.ranks = ranks
        self.report = report
        self.training = training
        self.symbols: dict[sympy.Symbol, Node] = {}
        self._sizes: dict[sympy.Expr, Node] = {}
        self._masked: dict[tuple[Node, str], Node] = {}

    def at(self, node: Node) -> None:
        """Nodes made from now on come from ``node``."""
        self.origin = node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        return self.note(self.graph.call_function(target, args, kwargs))

    # Lengths.

    def learn(self, placeholder: Node, value: Any) -> None:
        """Symbols that an input brings: a ``SymInt`` itself, or a tensor's sizes."""
        if isinstance(value, torch.SymInt):
            expr = value.node.expr
            if isinstance(expr, sympy.Symbol):
                self.symbols.setdefault(expr, placeholder)
        elif isinstance(value, torch.Tensor):
            for dim, size in enumerate(value.shape):
                expr = as_length(size)
                if isinstance(expr, sympy.Symbol) and expr not in self.symbols:
                    self.symbols[expr] = self.call(aten.sym_size.int, placeholder, dim)

    def size(self, length: Length) -> int | Node:
        """A length as an argument: the number, or a node that computes it from the inputs' sizes."""
        if isinstance(length, int):
            return length
        if isinstance(length, sympy.Symbol):
            return self.symbols[length]
        if length not in self._sizes:
            self._sizes[length] = self.note(sympy_to_fx(length, self.symbols, self.graph))
        return self._sizes[length]

    def sizes(self, lengths: Seq[Length]) -> list[int | Node]:
        return [self.size(n) for n in lengths]

    def narrow(self, x: Node, dim: int, start: Length, length: Length) -> Node:
        return self.call(aten.narrow.default, x, dim, self.size(start), self.size(length))

    # The fxsp ops.

    def sequence(self, sequence: Sequence) -> tuple[list[int | Node], list[bool]]:
        """Arguments of an op: the lengths of segments, and which of them are whole."""
        return self.sizes(sequence.lengths), list(sequence.whole)

    def layouts(self, *sequences: Sequence) -> list[list[bool]]:
        """Last arguments of an op: of each sequence, which segments are heads and tails; none if nothing is."""
        return [list(s.head_tail) for s in sequences] if any(any(s.head_tail) for s in sequences) else []

    def placed(self, sequence: Sequence) -> list[list[Any]]:
        """Last arguments of an op that asks where rows are: heads and tails, and units; none where none is needed."""
        if not any(n != 1 for n in sequence.units):
            return list(self.layouts(sequence))
        return [list(sequence.head_tail), self.sizes(sequence.units)]

    def at_rank(self) -> tuple[int, int, str]:
        """Arguments of an op: this rank, the number of ranks, and their group."""
        return self.ranks.rank, self.ranks.size, self.ranks.group

    def deal(self, x: Node, dim: int, sequence: Sequence, size: int = 0) -> Node:
        """Global rows in the order of ``size`` ranks (0: of all), pads included, where that is another one."""
        return x if self._in_order(sequence, size) else self._dealt(_ops.deal, x, dim, sequence, size, False)

    def undeal(self, x: Node, dim: int, sequence: Sequence, size: int = 0) -> Node:
        """The way back, without pads."""
        if self._in_order(sequence, size):
            return x
        if len(sequence.segments) == 1 and not any(sequence.head_tail):
            return self.narrow(x, dim, 0, sequence.length)  # the pads stand at the end
        return self._dealt(_ops.undeal, x, dim, sequence, size)

    def _in_order(self, sequence: Sequence, size: int) -> bool:
        """Whether the rows of the ranks, one rank after the other, are the global rows; or segments are contiguous."""
        dealt = any(sequence.head_tail) or sequence.has_pads(size or self.ranks.size)
        return not (sequence.dealt_segments and dealt)

    def _dealt(self, op: Any, x: Node, dim: int, sequence: Sequence, size: int, *more: Any) -> Node:
        head_tail, *units = self.placed(sequence)
        lengths = self.sizes(sequence.lengths)
        return self.call(op.default, x, dim, lengths, head_tail, *more, size or self.ranks.size, *units)

    def shard(self, x: Node, shape: tuple[Length, ...], type_: Shard) -> Node:
        """This rank's part of a whole value."""
        exposed, dim, back = self.expose(x, shape, type_, whole=True)
        size, sequence = self.ranks.size, type_.sequence
        x = self.deal(exposed, dim, sequence)
        new = self.call(_ops.shard.default, x, dim, *self.sequence(sequence.dealt(size)), False, *self.at_rank())
        return back(new, sequence.local_length(size))

    def gather(self, x: Node, dim: int, sequence: Sequence, *, used: bool) -> Node:
        op, size = _ops.gather_used if used else _ops.gather, self.ranks.size
        new = self.call(op.default, x, dim, *self.sequence(sequence.dealt(size)), *self.at_rank())
        return self.undeal(new, dim, sequence)

    def leave(self, x: Node, length: Length) -> Node:
        """Rows that are whole on every rank, as a replicated value: the same data, the gradient is shared out."""
        return self.call(_ops.gather.default, x, 0, [self.size(length)], [True], *self.at_rank())

    def use(self, x: Node) -> Node:
        return self.call(_ops.use.default, x, self.ranks.group)

    def all_reduce(self, x: Node) -> Node:
        return self.call(_ops.all_reduce.default, x, self.ranks.group)

    def all_reduce_extreme(self, x: Node, op: str) -> Node:
        return self.call(_ops.all_reduce_extreme.default, x, op, self.ranks.group)

    def at_extreme(self, x: Node, value: Node, hit: Node, dims: Seq[int], keepdim: bool, *, ties: bool) -> Node:
        return self.call(_ops.at_extreme.default, x, value, hit, list(dims), keepdim, ties, self.ranks.group)

    def all_to_all(self, x: Node, members: int) -> Node:
        """Among so many consecutive ranks."""
        if members == self.ranks.size:
            return self.call(_ops.all_to_all.default, x, self.ranks.group)
        return self.call(_ops.all_to_all_within.default, x, *self.at_rank())

    def mask_pads(self, x: Node, dim: int, sequence: Sequence) -> Node:
        where = *self.sequence(sequence), *self.at_rank()[:2]
        return self.call(_ops.mask_pads.default, x, dim, *where, *self.placed(sequence))

    def masked(self, x: Node, shape: tuple[Length, ...], type_: Shard) -> Node:
        """``x`` with its pads zeroed, and with whole segments counted by one rank only."""
        if not type_.sequence.has_pads(self.ranks.size) and not any(type_.sequence.whole):
            return x
        key = (x, str(type_))
        if key not in self._masked:
            exposed, dim, back = self.expose(x, shape, type_)
            self._masked[key] = back(self.mask_pads(exposed, dim, type_.sequence))
        return self._masked[key]

    def expose(
        self, x: Node, shape: tuple[Length, ...], type_: Shard, *, whole: bool = False
    ) -> tuple[Node, int, Callable[..., Node]]:
        """``x`` with the tokens as a dimension of their own: ``(x, dim, back)``, where ``back`` undoes the reshape.

        ``whole`` says that ``x`` is the global value, else it is local; ``back`` takes what a shard, gather or mask
        made of it, so its sizes are those of the other side for shard and gather.
        """
        if type_.plain:
            return x, type_.dim, lambda y, *_: y
        lead, last = shape[: type_.dim], shape[type_.dim + 1 :]
        count = type_.sequence.length if whole else type_.sequence.local_length(self.ranks.size)
        exposed = self.call(aten.reshape.default, x, self.sizes([*lead, type_.outer, count, *last]))

        def back(y: Node, tokens: Length = count) -> Node:
            return self.call(aten.reshape.default, y, self.sizes([*lead, product((type_.outer, tokens)), *last]))

        return exposed, type_.dim + 1, back

    def positions(self, sequence: Sequence, device: torch.device) -> Node:
        where = *self.sequence(sequence), *self.at_rank()[:2]
        return self.call(_ops.positions.default, *where, device, *self.placed(sequence))

    def seed(self, device: torch.device) -> Node:
        """A number that the generators of all ranks agree on, int64 ``[1]``."""
        return self.call(aten.randint.default, 2**62, [1], dtype=torch.int64, device=device)

    def take(self, x: Node, dim: int, members: int = 0) -> Node:
        """This rank's part of ``dim``, which consecutive ranks share: ``members`` of them, or all."""
        members = members or self.ranks.size
        return self.call(_ops.take.default, x, dim, self.ranks.rank % members, members)

    def unpack(self, x: Node, sequence: Sequence) -> Node:
        size = self.ranks.size
        rows = self.call(_ops.unpack.default, x, self.sizes(sequence.dealt(size).lengths), size)
        return self.undeal(rows, 0, sequence)

    def pack(self, x: Node, sequence: Sequence) -> Node:
        size = self.ranks.size
        rows = self.deal(x, 0, sequence)
        return self.call(_ops.pack.default, rows, self.sizes(sequence.dealt(size).lengths), size, False)

    def pack_heads(self, xs: Seq[Node], length: Length, size: int) -> Node:
        return self.call(_ops.pack_heads.default, list(xs), self.size(length), False, size, False)

    def unpack_heads(self, x: Node, heads: Seq[int], length: Length) -> Node:
        return self.call(_ops.unpack_heads.default, x, list(heads), self.size(length), False)

    def record(
        self, kind: str, node: Node, sent: Length, reason: str, tokens: Sequence | None = None, members: int = 0
    ) -> None:
        """Count a collective; ``sent`` is in bytes per rank, forward, and grows with the local length of ``tokens``."""
        if (op := op_of(node)) is None or op.sends is None:  # gathered rows, put in order
            node = node.all_input_nodes[0]
        mark(node, sent=sent)
        place = module_path(node) or self.report.root, sent, reason, node_source(node)
        self.report.collectives.append(CollectiveRecord(kind, node.name, *place, tokens, members))


def erase_unused(graph: Graph) -> None:
    """Erase dead code, but not in the bodies of islands, as torch's own method does: what has no user there, the end of
    a functorch level say, is needed all the same.
    """
    for node in reversed(graph.nodes):
        if not node.users and not node.is_impure() and not facts(node).island:
            graph.erase_node(node)
