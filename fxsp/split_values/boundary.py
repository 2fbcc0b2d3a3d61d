"""Where split values enter and leave a compiled graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from fxsp import torch_internals
from fxsp.kernels.ops import fxsp_ops
from fxsp.lengths import Length, as_length
from fxsp.passes.annotate.dynamo_graph import written_by
from fxsp.passes.base import Program
from fxsp.passes.graph import facts, shape_of
from fxsp.report import Report
from fxsp.source import input_name
from fxsp.split_values.calls import is_under_way, watch_calls
from fxsp.split_values.conversions import from_local, made_whole, to_local
from fxsp.split_values.dispatch import dispatch
from fxsp.split_values.entrance import SplitFirst, offered
from fxsp.split_values.forward import OUTPUT, recording
from fxsp.split_values.one_call import call
from fxsp.split_values.value import Placed, SplitTensor, handle_with
from fxsp.types import Ranks, Shard
from fxsp.types import Sequence as Tokens

__all__ = ["Edge"]

handle_with(call, dispatch)


class Edge:
    """The edge of one graph of Dynamo: what enters it split, and what leaves it so.

    Dynamo's examples of inputs change in place: split values become plain fakes of global shape.
    """

    def __init__(self, gm: GraphModule, inputs: Sequence[Any], ranks: Ranks, *, splits: bool, always: bool) -> None:
        self.ranks = ranks
        self.inputs = list(inputs)
        #: The types of inputs that enter as the rows of one rank.  Not among them, and made whole: what is split over
        #: other ranks, or is written to.
        self.arrivals: dict[int, Shard] = {}
        #: Positions of all inputs that are split.
        self._split: list[int] = []
        #: Outputs that leave as the rows of one rank: their types and global shapes.
        self.left: Mapping[int, tuple[Shard, tuple[Length, ...]]] = {}
        #: Where symbols of lengths stand: the position of an input, and the dimension (None: it is a number).
        self.symbols: dict[sympy.Symbol, tuple[int, int | None]] = {}
        #: What was found for the lengths of the last call.
        self._last: tuple[Any, list[tuple[int, Placed, tuple[int, ...]]]] = (None, [])
        nodes = gm.graph.find_nodes(op="placeholder")
        mode = torch_internals.compile_fake_mode(inputs)
        for position, (node, value) in enumerate(zip(nodes, inputs, strict=True)):
            if isinstance(value, SplitTensor):
                self._split.append(position)
                shape = node.meta["example_value"].shape
                if not value.placed.type.is_one_sequence:  # its guards hold its lengths, too
                    int(shape[value.placed.type.dim])
                    shape = node.meta["example_value"].shape
                if splits and value.placed.ranks == ranks and not written_by(gm.graph, node):
                    self.arrivals[position] = value.placed.for_shape(shape)
                with mode:
                    plain = torch.empty(shape, dtype=value.dtype, device=value.device)
                self.inputs[position] = node.meta["example_value"] = plain.requires_grad_(value.requires_grad)
            self._learn(position, node.meta.get("example_value"))
        self._nodes = nodes
        # A checkpoint that compiles anew what it recomputes goes on with what it has.
        self._returned_split = torch_internals.in_backward() and bool(self.arrivals)
        #: Whether who calls the graph may take split values: a module that Python runs, or what is between two graphs
        #: of a compiled function.
        self._in_module = splits and torch_internals.is_called_by_module()
        translation = torch_internals.Translation.current()
        piece = splits and is_under_way() and translation is not None and translation.is_piece(gm)
        self.regional = always or self._in_module or piece or (splits and self._returned_split)
        #: Whether split values are returned to whoever calls, and never made whole.
        self._always = always

    def _learn(self, position: int, value: Any) -> None:
        sizes = enumerate(value.shape) if isinstance(value, torch.Tensor) else [(None, value)]
        for dim, size in sizes:
            if isinstance(size, torch.SymInt) and isinstance(symbol := as_length(size), sympy.Symbol):
                self.symbols.setdefault(symbol, (position, dim))

    def topics(self) -> dict[str, str]:
        """What must be the same on all ranks, as text by topic."""
        rows = [f"input {position} {type_}" for position, type_ in self.arrivals.items()]
        return {"split inputs": "\n".join([*rows, f"outputs may stay split: {self.regional}"])}

    def split_first(self, program: Program) -> SplitFirst | None:
        """That the block be called again, with split values: where all that its program splits are inputs, which enter
        whole, and are used for nothing else.
        """
        offer, translation = offered(), torch_internals.Translation.current()
        if offer is None or translation is None or not self._in_module or torch_internals.suppresses_errors():
            return None
        if self._split or translation.has_begun():
            return None
        marks = program.whole.graph.find_nodes(op="call_function", target=fxsp_ops.annotate.default)
        births = {mark.args[0].name for mark in marks if mark.args[1] == "shard"}
        # What is split as an output of its kind is comes in split in the next block.
        left = [(str(type_), shape) for type_, shape in program.left_split.values()]
        wanted: dict[int, Placed] = {}
        graphs = (program.whole.graph, program.graph)
        inputs = zip(self._nodes, *(graph.find_nodes(op="placeholder") for graph in graphs), strict=True)
        for node, value, local in inputs:
            leaf, type_ = offer.position(torch_internals.input_example(node)), _cut_at_once(local, value.name)
            if leaf is not None and type_ is not None:
                if value.name in births or (str(type_), shape_of(value)) in left:
                    births.discard(value.name)
                    wanted[leaf] = Placed(_concrete(type_, program.number), self.ranks)
        if births or not wanted:
            return None
        offer.wanted, offer.plan, offer.inferred = wanted, list(program.report.plan), program.report.inferred
        return offer.taken()

    def leave(self, program: Program) -> None:
        """The graph was compiled as this program of one rank."""
        self.left = program.left_split
        for position, type_ in self.arrivals.items():
            node = self._nodes[position]
            name = input_name(torch_internals.input_source(node)) or node.target
            program.report.note(f"{name} comes in split: {type_}")
        offer = offered()
        if offer is None:
            return
        program.report.plan[:0] = offer.plan
        program.report.inferred = program.report.inferred or offer.inferred
        for position, type_ in self.arrivals.items():
            leaf = offer.position(torch_internals.input_example(self._nodes[position]))
            if leaf is not None:
                offer.wanted[leaf] = Placed(_concrete(type_, program.number), self.ranks)

    def stay_whole(self) -> None:
        """The graph runs whole: what enters split is made so."""
        self.arrivals = {}

    def crossing(self, run: Callable[..., Any], report: Report) -> Callable[..., Any]:
        """``run``, which takes and returns the rows of one rank, for split values."""
        if not self.regional and not self._split:

            def counted(*args: Any) -> Any:
                results = run(*args)
                if (forward := recording()) is not None:
                    forward.ran(report, self._sizes(args))
                return results

            return counted

        def cross(*args: Any) -> Any:
            local = self._taken(args)
            results = list(run(*local))
            sizes = self._sizes(args)
            if (forward := recording()) is not None:
                forward.ran(report, sizes)
                forward.keeps_split |= self._always
            if not self.left:
                return tuple(results)
            if not torch_internals.in_backward():  # a checkpoint wants what it had
                self._returned_split = self._always or is_under_way()
            for position, placed, shape in self._placements(sizes):
                shared = [at for at in self.arrivals if _same_memory(results[position], local[at])]
                if shared and torch.is_inference_mode_enabled():  # where writes are not counted
                    results[position], shared = results[position].clone(), []
                value = from_local(results[position], placed, shape)
                for at in shared:
                    value.view_of(args[at])
                results[position] = value if self._returned_split else made_whole(value, OUTPUT)
            if not self._returned_split:
                watch_calls()
            return tuple(results)

        return cross

    def _taken(self, args: Sequence[Any]) -> list[Any]:
        """The arguments of the program of one rank: Dynamo's guards say which are split."""
        found = list(args)
        for position in self._split:
            x = args[position]
            found[position] = to_local(x) if position in self.arrivals else made_whole(x, "a graph")
        return found

    def _sizes(self, args: Sequence[Any]) -> dict[Any, int]:
        """The symbols of lengths, as they are in this call."""
        return {
            symbol: int(args[position] if dim is None else args[position].shape[dim])
            for symbol, (position, dim) in self.symbols.items()
        }

    def _placements(self, sizes: Mapping[Any, int]) -> list[tuple[int, Placed, tuple[int, ...]]]:
        """How each output that leaves split lies on the ranks, and its global shape, for the lengths of a call."""
        known, rows = self._last
        if known != sizes:

            def number(length: Length) -> int:
                return length if isinstance(length, int) else int(length.xreplace(sizes))

            rows = [
                (position, Placed(_concrete(type_, number), self.ranks), tuple(map(number, shape)))
                for position, (type_, shape) in self.left.items()
            ]
            self._last = sizes, rows
        return rows


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(a.numel()) and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _cut_at_once(local: Node, name: str) -> Shard | None:
    """How the program of a rank splits an input, ``name`` in the graph of all, if it does nothing else with it."""
    types = [facts(user).type for user in local.users if facts(user).stands_for == name]
    if not types or len(types) < len(local.users) or len(set(map(str, types))) > 1:
        return None
    first = types[0]
    return first if isinstance(first, Shard) and not any(first.sequence.whole) else None


def _concrete(type_: Shard, number: Callable[[Length], int]) -> Shard:
    """The type with numbers for lengths."""
    segments = (replace(s, length=number(s.length), unit=number(s.unit)) for s in type_.sequence.segments)
    return replace(type_, sequence=Tokens(tuple(segments)), outer=number(type_.outer))
