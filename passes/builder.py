"""Writing local graphs: nodes with the right metadata, sizes from lengths, and the fxsp ops by their meaning."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from fxsp.kernels.ops import fxsp_ops as _ops
from fxsp.kernels.ops import op_of
from fxsp.passes.graph import facts, mark
from fxsp.report import CollectiveRecord, Report
from fxsp.source import module_path, node_source
from fxsp.torch_internals import sympy_to_fx
from fxsp.types import Length, Ranks, Sequence, as_length

__all__ = ["Builder"]

#: What a node has from the one that it was written for.
_LENT = ("stack_trace", "nn_module_stack", "recompute", "ac_graph_id", "custom", "seq_nr")
aten = torch.ops.aten


class Builder:
    """Appends nodes to ``graph``; the current *origin* node lends its source line and module path."""

    def __init__(self, graph: Graph, ranks: Ranks, report: Report, *, training: bool) -> None:
        self.graph = graph
        self.ranks = ranks
        self.report = report
        self.training = training
        self.symbols: dict[sympy.Symbol, Node] = {}
        self._sizes: dict[sympy.Expr, Node] = {}
        self._origin: Node | None = None

    def at(self, node: Node) -> None:
        """Nodes made from now on come from ``node``."""
        self._origin = node

    def note(self, new: Node) -> Node:
        if self._origin is not None:
            for key in _LENT:
                if key in self._origin.meta:
                    new.meta.setdefault(key, self._origin.meta[key])
            if (attention := facts(self._origin).written_attention) is not None:
                mark(new, written_attention=attention)
        return new

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

    def deal(self, x: Node, dim: int, lengths: Seq[Length], head_tail: Seq[bool], size: int) -> Node:
        """Global rows in the order of ``size`` ranks, where they are heads and tails; else as they are."""
        if not any(head_tail):
            return x
        return self.call(_ops.deal.default, x, dim, self.sizes(lengths), list(head_tail), False, size)

    def undeal(self, x: Node, dim: int, lengths: Seq[Length], head_tail: Seq[bool], size: int) -> Node:
        if not any(head_tail):
            return x
        return self.call(_ops.undeal.default, x, dim, self.sizes(lengths), list(head_tail), size)

    def _dealt(self, x: Node, dim: int, sequence: Sequence) -> Node:
        """Global rows in the order of the ranks, pads included, where segments are not split into contiguous rows."""
        if not sequence.dealt_segments or _is_in_order(sequence, self.ranks.size):
            return x
        head_tail, *units = self.placed(sequence)
        size = self.ranks.size
        return self.call(_ops.deal.default, x, dim, self.sizes(sequence.lengths), head_tail, False, size, *units)

    def _undealt(self, x: Node, dim: int, sequence: Sequence) -> Node:
        if not sequence.dealt_segments or _is_in_order(sequence, self.ranks.size):
            return x
        if len(sequence.segments) == 1 and not any(sequence.head_tail):
            return self.narrow(x, dim, 0, sequence.length)  # the pads stand at the end
        head_tail, *units = self.placed(sequence)
        return self.call(_ops.undeal.default, x, dim, self.sizes(sequence.lengths), head_tail, self.ranks.size, *units)

    def shard(self, x: Node, dim: int, sequence: Sequence) -> Node:
        size = self.ranks.size
        x = self._dealt(x, dim, sequence)
        return self.call(_ops.shard.default, x, dim, *self.sequence(sequence.dealt(size)), False, *self.at_rank())

    def gather(self, x: Node, dim: int, sequence: Sequence, *, used: bool) -> Node:
        op, size = _ops.gather_used if used else _ops.gather, self.ranks.size
        new = self.call(op.default, x, dim, *self.sequence(sequence.dealt(size)), *self.at_rank())
        return self._undealt(new, dim, sequence)

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
        rank, size, _ = self.at_rank()
        placed = self.placed(sequence)
        return self.call(_ops.mask_pads.default, x, dim, *self.sequence(sequence), rank, size, *placed)

    def positions(self, sequence: Sequence, device: torch.device) -> Node:
        rank, size, _ = self.at_rank()
        placed = self.placed(sequence)
        return self.call(_ops.positions.default, *self.sequence(sequence), rank, size, device, *placed)

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
        return self._undealt(rows, 0, sequence)

    def pack(self, x: Node, sequence: Sequence) -> Node:
        size = self.ranks.size
        rows = self._dealt(x, 0, sequence)
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


def _is_in_order(sequence: Sequence, size: int) -> bool:
    """Whether the rows of the ranks, one rank after the other, are the global rows."""
    return not any(sequence.head_tail) and not sequence.has_pads(size)
