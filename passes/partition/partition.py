"""partition: the global program becomes the program of one rank.

Operands are converted to the types that the decisions want (see ``fxsp.passes.partition.reshard``); calls are
rewritten for local sizes, which are derived again from global shape and type.

Input, with types, and output for two ranks::

    %x: R [2, 5, 8]                             %x
    %annotate(x, shard, 1): S(1, [5])           %shard = fxsp.shard(x, 1, [5])       # [2, 3, 8]
    %flatten(annotate, 0, 1): S(0, 2*[5]*1)     %reshape = reshape(shard, [6, 8])
    return flatten                              %gather = fxsp.gather(...)

After this pass every tensor in the graph is local, except inputs and outputs, which are global and equal on all ranks.
``program.whole`` is the global graph still; a local node ``stands_for`` a value of it.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxsp.capture.graph_breaks import Split
from fxsp.errors import UnsupportedError
from fxsp.passes.attention.unfused_report import mark_written, record_written
from fxsp.passes.base import Pass, Program
from fxsp.passes.functionalize.inplace import written_arguments
from fxsp.passes.graph import Call, facts, is_split, shape_of, tensor_nodes, tensor_value, type_of
from fxsp.passes.partition.reshard import LOW_PRECISION, OUTPUT, Converter, Value
from fxsp.passes.partition.unused import report_idle
from fxsp.passes.propagate.propagate import is_annotate
from fxsp.passes.rules.decide import Decision
from fxsp.passes.rules.families import family
from fxsp.torch_internals import is_wrapper_subclass
from fxsp.types import Partial, Replicate, Shard, Type, Used, as_length

__all__ = ["Partition"]

aten = torch.ops.aten

#: Why whole values are needed at the end.
_WRITTEN = "an input that is written to has its global shape"


class Partition(Pass):
    """After this pass the graph is local: all sizes, all data movement and all reductions are explicit."""

    def apply(self, program: Program) -> Program:
        return _Partitioner(program).run()


class _Partitioner(Converter):
    """Walks the global graph and writes the local one."""

    def run(self) -> Program:
        old = self.program.gm
        report_idle(self.program)
        mark_written(self.program)
        inputs = [n for n in old.graph.nodes if n.op == "placeholder"]
        for node in inputs:
            self._input(node)
        for node in inputs:
            self.build.at(node)
            self.build.learn(self._node_of_input(node), node.meta.get("val"))
        overwriting = False
        for node in old.graph.nodes:
            if node.op != "placeholder":
                self.build.at(node)
                if not overwriting and written_arguments(node):
                    overwriting = True
                    self._before_writes(node)
                self._visit(node)
        # The bookkeeping of conversions may leave forms that nobody used in the end.
        self.graph.eliminate_dead_code(_is_impure)
        left = {node.name for node in self.graph.nodes}
        self.program.report.collectives[:] = [r for r in self.program.report.collectives if r.value in left]
        self.graph.lint()
        gm = GraphModule(old, self.graph, old.__class__.__name__)
        gm.meta.update(old.meta)
        self.program.global_gm = old
        self.program.gm = gm
        return self.program

    # Inputs, outputs and everything that is no call on tensors.

    def _input(self, node: Node) -> None:
        new = self.graph.node_copy(node)
        value = tensor_value(node)
        if value is None:
            self.copies[node] = new
            return
        kind: Type = type_of(node) if is_split(node) else Replicate()
        deferred = self.program.options.deferred and _is_parameter(node) and self.program.training
        if deferred and is_wrapper_subclass(value):
            if value.requires_grad:
                raise UnsupportedError(
                    f"{node.target} is a {type(value).__name__} that requires grad: its gradient is whole on every "
                    "rank, and grad_reduce='defer' would have it summed; freeze it, or leave that option out"
                )
        elif deferred:
            kind = Used(origin="gradients of parameters are left to an outer reducer")
        self.values[node] = Value(node, [(kind, self.typed(new, kind, node))])

    def _node_of_input(self, node: Node) -> Node:
        return self.copies[node] if node in self.copies else self.values[node].forms[0][1]

    def _visit(self, node: Node) -> None:
        self.remedy = ""
        if node.op == "output":
            self._output(node)
        elif is_annotate(node):
            self._annotate(node)
        elif (decision := facts(node).decision) is not None:
            self._call(node, decision)
        elif facts(node).type is not None and node.target is operator.getitem:
            self._getitem(node)
        elif isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool)):
            self._scalar(node)
        else:
            self._whole(node)

    def _output(self, node: Node) -> None:
        self.reason = OUTPUT

        outputs: Any = node.args[0] if isinstance(node.args[0], (list, tuple)) else ()
        self.program.left_split = {
            position: (type_, shape_of(old))
            for position, old in enumerate(outputs)
            if old in self.values and isinstance(type_ := self._left_as(old), Shard)
        }
        self.program.report.split_outputs[:] = _splits_of(outputs)

        def whole(old: Node) -> Any:
            self.ending = old
            if old not in self.values:
                return self.copies[old]
            return self.get(self.values[old], self._left_as(old), kind="output")

        result = torch.fx.map_arg(node.args[0], whole)
        self.graph.output(result).meta.update(node.meta)

    def _left_as(self, old: Node) -> Type:
        """The type of an output: whole, or as it is split where the caller takes it so.

        Of one sequence the next graph finds the length in the shape; lengths of several are guarded as they are, and
        where they are symbols it would be compiled for each of them.
        """
        type_ = type_of(old)
        if not self.program.split_outputs or not isinstance(type_, Shard) or any(type_.sequence.whole):
            return Replicate()
        lengths = (type_.outer, *type_.sequence.lengths, *type_.sequence.units)
        return type_ if type_.is_one_sequence or all(isinstance(n, int) for n in lengths) else Replicate()

    def _before_writes(self, node: Node) -> None:
        """The last nodes, from ``node`` on, overwrite inputs: what they and the output need whole is computed now:
        it may be computed from those inputs.
        """
        while True:
            self.build.at(node)
            self.reason = OUTPUT if node.op == "output" else _WRITTEN
            for old in node.all_input_nodes:
                if old in self.values:
                    self.ending = old
                    self.get(self.values[old], Replicate(), kind="output")
            if node.op == "output":
                return
            node = node.next

    def _annotate(self, node: Node) -> None:
        source = node.args[0]
        assert isinstance(source, Node)
        value = self.values[source]
        if isinstance(type_of(node), Replicate) and not value.wanted:
            value.wanted = str(node.args[4])
        # Another name of the same value: its forms are shared, so that a gather followed by a shard is nothing.
        self.values[node] = value

    def _getitem(self, node: Node) -> None:
        producer, index = node.args
        assert isinstance(producer, Node)
        assert isinstance(index, int)
        made = self.copies[producer]
        if isinstance(made, list) and made[index] is None:
            return  # nobody uses it
        new = made[index] if isinstance(made, list) else self.build.call(operator.getitem, made, index)
        self.values[node] = Value(node, [(type_of(node), self.typed(new, type_of(node), node))])

    def _scalar(self, node: Node) -> None:
        """Sizes keep their global meaning: they are computed again from the sizes of the inputs."""
        if tensor_nodes(node.args):
            value = node.meta["val"]
            expr = as_length(value) if isinstance(value, torch.SymInt) else None
            if expr is not None and (isinstance(expr, int) or expr.free_symbols <= self.build.symbols.keys()):
                self.copies[node] = self.build.size(expr)
                return
        self._whole(node)
        new = self.copies[node]
        self.build.learn(new, node.meta["val"])

    def _whole(self, node: Node) -> None:
        """A node that runs on whole operands: the same on every rank."""
        island = facts(node).island
        self.reason = f"{island}: not opened, it runs whole" if island else f"{node.target} runs on whole operands"
        new = self.graph.node_copy(node, self.argument)
        self._copied(node, new)

    def _copied(self, node: Node, new: Node) -> None:
        if tensor_value(node) is not None:
            self.values[node] = Value(node, [(Replicate(), self.typed(new, Replicate(), node))])
        else:
            self.copies[node] = new

    # Calls.

    def _call(self, node: Node, decision: Decision) -> None:
        call = Call(node)
        self.reason, self.remedy = decision.reason, decision.remedy
        record_written(self.program, node)
        if decision.special is not None:
            results = decision.special.write(self, call, decision)
        elif not all(isinstance(t, Replicate) for t in (*decision.operands, *decision.results)):
            results = self.same_call(call, decision)
        else:
            # The epilogue of a written input is as an output: nobody asked for split data there.
            epilogue = call.op is aten.copy_.default
            self.reason = _WRITTEN if epilogue else self.reason
            self._whole_call(node, "output" if epilogue else "implicit")
            return
        if isinstance(results, list) or isinstance(node.meta["val"], (tuple, list)):
            self.copies[node] = results
        else:
            self.values[node] = Value(node, [(decision.results[0], self.typed(results, decision.results[0], node))])

    def arguments(self, call: Call, decision: Decision) -> dict[str, Any]:
        """The arguments of ``call`` by name, operands local and of the types that ``decision`` asks for."""
        operands: list[Node] = []
        for i, (old, needed) in enumerate(zip(call.operands, decision.operands, strict=True)):
            new = self.get(self.values[old], needed)
            if i in decision.masked[:1] and isinstance(needed, Shard):
                new = self.build.masked(new, shape_of(old), needed)
            operands.append(new)
        # Occurrence by occurrence: one value may be needed in two forms.
        left = iter(operands)
        local = lambda old: self.copies[old] if tensor_value(old) is None else next(left)  # noqa: E731
        return {name: torch.fx.map_arg(value, local) for name, value in call.arguments.items()}

    def same_call(self, call: Call, decision: Decision) -> Node:
        """The same call on these arguments; a summand is wide."""
        new = self.build.same(call, self.arguments(call, decision))
        if isinstance(decision.results[0], Partial) and call.node.meta["val"].dtype in LOW_PRECISION:
            new = self.build.call(aten.to.dtype, new, torch.float32)
        return new

    def _whole_call(self, node: Node, kind: str = "implicit") -> None:
        by_strides = node.args[0] if node.target in family("by_strides") else None

        def argument(old: Node) -> Any:
            new = self.argument(old, kind)
            return self.in_memory_as(new, old) if old is by_strides else new

        self._copied(node, self.graph.node_copy(node, argument))


def _is_parameter(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.nn.Parameter) or facts(node).is_parameter


def _is_impure(node: Node) -> bool:
    return node.is_impure() or node.op in ("placeholder", "output")


def _splits_of(outputs: Any) -> list[tuple[int, Split]]:
    """Positions of outputs that are split before they are gathered for the end of the graph, and how."""
    found = []
    for position, old in enumerate(outputs if isinstance(outputs, (list, tuple)) else []):
        type_ = facts(old).type if isinstance(old, Node) else None
        if isinstance(type_, Shard) and type_.plain:
            first, *rest = type_.sequence.segments
            text = first.length if rest and not first.sharded and isinstance(first.length, int) else -1
            name = next(
                (segment.name for segment in type_.sequence.segments if segment.sharded and segment.name), "tokens"
            )
            found.append((position, Split(type_.dim, text, name)))
    return found
