"""The forms of a value: whole, used, split one way or another, and the conversions between them.

Every value of the global program is kept in the forms that someone needs; a conversion is made once per value.  What a
conversion costs, and why it is needed, goes to the report; one that nobody asked for is an *implicit gather*.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from fxsp.errors import RunsWhole, StrictError, UnsupportedError
from fxsp.kernels.counts import reduced_bytes, split_bytes
from fxsp.kernels.lowering import known_dense
from fxsp.passes.attention.operators import ATTENTION_OPS
from fxsp.passes.attention.repeat_kv import repeats_of
from fxsp.passes.base import Program
from fxsp.passes.builder import Builder, memory_order
from fxsp.passes.graph import facts, is_split, mark, reachable, shape_of, tensor_nodes
from fxsp.passes.rules.families import family
from fxsp.passes.special.likes import is_constant, write_like
from fxsp.report import GatherRecord
from fxsp.source import module_path, node_source, place
from fxsp.torch_internals import is_wrapper_subclass
from fxsp.types import Length, Partial, Replicate, Shard, Type, Used, as_length, product, same_length

__all__ = ["LOW_PRECISION", "Converter", "Value"]

aten = torch.ops.aten
#: Sums over ranks of these are accumulated in float32.
LOW_PRECISION = (torch.float16, torch.bfloat16)
#: Why an output is gathered.
OUTPUT = "a graph output has its global shape"


@dataclass
class Value:
    """One value of the global program in the forms that exist of it; the first is the one it was computed in."""

    node: Node
    forms: list[tuple[Type, Node]] = field(default_factory=list)
    #: The plan entry that asks for the whole value: gathering it is not implicit.
    wanted: str = ""

    def find(self, type_: Type) -> Node | None:
        for have, node in self.forms:
            if have.same_as(type_) if isinstance(have, Shard) else type(have) is type(type_):
                return node
        return None


class Converter:
    """Values and their forms in the local graph under construction."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.ranks = program.ranks
        self.graph = Graph()
        self.build = Builder(self.graph, program.ranks, program.report, training=program.training)
        self.values: dict[Node, Value] = {}
        #: Nodes that are copied as they are: scalars, submodules, tuples of several results.
        self.copies: dict[Node, Any] = {}
        #: Why the call at hand needs its operands as it does.
        self.reason = ""
        #: What would avoid that, where it is known.
        self.remedy = ""
        #: Values that become whole whoever needs them first.
        self.outputs = frozenset(program.graph.output_node().all_input_nodes)
        #: The output that is being made whole.
        self.ending: Node | None = None

    def argument(self, old: Node, kind: str = "implicit") -> Any:
        return self.get(self.values[old], Replicate(), kind) if old in self.values else self.copies[old]

    def typed(self, new: Node, type_: Type, old: Node) -> Node:
        mark(new, type=type_, whole=old.meta["val"], stands_for=old.name)
        if isinstance(type_, Shard):
            new.meta.pop("val", None)
        return new

    def get(self, value: Value, needed: Type, kind: str = "implicit") -> Node:
        """``value`` in the needed form; conversions are made once per value."""
        found = value.find(needed)
        if found is not None:
            return found
        tensor = value.node.meta["val"]
        if isinstance(needed, Used):
            differentiable = self.build.training and (tensor.dtype.is_floating_point or tensor.dtype.is_complex)
            differentiable = differentiable and not is_wrapper_subclass(tensor)  # used as it is only if it is frozen
            if not differentiable:
                return self.get(value, Replicate(), kind)
            split = any(isinstance(have, Shard) for have, _ in value.forms)
            if split and value.find(Replicate()) is None and not self._whole_for_free(value):
                new = self._gather(value, kind, used=True)
            else:
                new = self.build.use(self.get(value, Replicate(), kind))
        elif isinstance(needed, Replicate):
            new = self._make_whole(value, kind)
        elif isinstance(needed, Shard):
            new = self._shard(value, needed, kind)
        else:
            raise UnsupportedError(f"a value cannot become {needed}")
        self.typed(new, needed, value.node)
        value.forms.append((needed, new))
        return new

    def _shard(self, value: Value, needed: Shard, kind: str) -> Node:
        if is_constant(value.node):
            return write_like(self.build, value.node, needed, self.copies)
        self.reason = self.reason or f"it is {value.forms[0][0]}, and is needed as {needed}"
        return self.build.shard(self.get(value, Replicate(), kind), shape_of(value.node), needed)

    def _leave(self, x: Node, shape: tuple[Length, ...]) -> Node:
        """A used value as a replicated one: the same data, its gradient shared out over the ranks."""
        if shape:
            return self.build.leave(x, shape[0])
        row = self.build.call(aten.reshape.default, x, [1])
        return self.build.call(aten.reshape.default, self.build.leave(row, 1), [])

    def _whole_for_free(self, value: Value, depth: int = 4) -> bool:
        """Whether cheap operators compute the whole value from what is whole already: inputs, or gathered values."""
        node = value.node
        if facts(node).free or is_constant(node):
            return True
        if depth == 0 or node.target not in family("cheap", "cat", "slice"):
            return False
        operands = [self.values[n] for n in node.all_input_nodes if n in self.values]
        return all(v.find(Replicate()) is not None or self._whole_for_free(v, depth - 1) for v in operands)

    def _make_whole(self, value: Value, kind: str) -> Node:
        type_, node = value.forms[0]
        if isinstance(type_, Partial):
            new = self.build.all_reduce(node)
            dtype = value.node.meta["val"].dtype
            sent = reduced_bytes(product(shape_of(value.node)), dtype, self.ranks.size)
            self.build.record("all_reduce", new, sent, "sum over the ranks")
            return self.build.call(aten.to.dtype, new, dtype) if dtype in LOW_PRECISION else new
        used = value.find(Used())
        if used is not None:
            # The data is there already (a gather whose result is used with shards, a parameter): no second gather.
            return self._leave(used, shape_of(value.node))
        if is_constant(value.node):
            return write_like(self.build, value.node, Replicate(), self.copies)
        if self._whole_for_free(value):
            # Computing cheap operators again costs less than any communication.
            old = value.node
            return self.graph.node_copy(old, self.argument)
        return self._gather(value, kind, used=False)

    def _gather(self, value: Value, kind: str, *, used: bool) -> Node:
        type_, node = next((t, n) for t, n in value.forms if isinstance(t, Shard))
        old, shape, size = value.node, shape_of(value.node), self.ranks.size
        sent = (size - 1) * split_bytes(shape, type_, old.meta["val"].element_size(), size)
        reason = self.reason
        if kind == "implicit" and old in self.outputs:
            kind, reason = "output", OUTPUT
        elif not value.wanted and len(chain := repeats_of(old, self._is_held)) > 1:
            return self._repeat(chain, Used() if used else Replicate(), kind)
        self._report_gather(value, kind, reason, sent)
        exposed, dim, back = self.build.expose(node, shape, type_)
        new = self.build.gather(exposed, dim, type_.sequence, used=used)
        for key in ("stack_trace", "nn_module_stack"):  # an output has no place of its own
            if not self._has_place() and key in old.meta:
                new.meta.setdefault(key, old.meta[key])
        self.build.record("all_gather", new, sent, value.wanted or reason, type_.sequence)
        return self._laid_out(back(new, type_.sequence.length), value, type_.dim)

    def _is_held(self, old: Node) -> bool:
        """Whether a value is whole, or will be; keys and values of an attention are, by whatever view it takes them."""
        have, user = self.values[old], self.build.origin
        if old in self.outputs or (user is not None and facts(user).written_attention is not None):
            return True
        return have.find(Replicate()) is not None or have.find(Used()) is not None

    def _repeat(self, chain: list[Node], needed: Type, kind: str) -> Node:
        """A whole value by views of the whole of a smaller one, the last of ``chain``."""
        new = self.get(self.values[chain[-1]], needed, kind)
        for old in reversed(chain[:-1]):
            found = self.values[old].find(needed)
            if found is not None:
                new = found
                continue
            if old.target in family("reshape", "expand"):
                op = aten.reshape.default if old.target in family("reshape") else aten.expand.default
                new = self.build.call(op, new, self.build.sizes(shape_of(old)))
            else:
                mapping = {**self.copies, **dict.fromkeys(tensor_nodes((old.args, old.kwargs)), new)}
                args, kwargs = torch.fx.map_arg((old.args, old.kwargs), mapping.__getitem__)
                new = self.build.call(old.target, *args, **kwargs)
            if old is not chain[0]:  # that one is kept by who asked for it
                self.values[old].forms.append((needed, self.typed(new, needed, old)))
        return new

    def _has_place(self) -> bool:
        origin = self.build.origin
        return origin is not None and bool(node_source(origin))

    def _laid_out(self, x: Node, value: Value, tokens: int) -> Node:
        """A gathered value (its tokens are outermost in memory) with the dimensions in the order of the global value.

        What runs on it next may depend on that: random numbers are drawn in the order of memory, the branches of a
        ``cond`` must agree, and code outside of the graph may take a view of an output.  Attention does not care.
        """
        if all(user.target in ATTENTION_OPS for user in value.node.users):
            return x
        given, shape = value.node.meta["val"], shape_of(value.node)
        order = list(range(len(shape))) if 0 in map(as_length, given.stride()) else memory_order(given)
        real = [d for d in order if not same_length(shape[d], 1)]
        return x if real == sorted(real, key=lambda d: (d != tokens, d)) else self.build.dense(x, order)

    def in_memory_as(self, x: Node, old: Node) -> Node:
        """``x``, the whole value of ``old``, with the very strides of ``old``."""
        value = old.meta["val"]
        if known_dense(value) and as_length(value.storage_offset()) == 0:
            return self.build.dense(x, memory_order(value))
        if _reads_shards(old):
            raise RunsWhole(
                f"as_strided in {place(old)} "
                "reads memory around a value that is split: use a slice, an expand or an unfold instead"
            )
        return x

    def _report_gather(self, value: Value, kind: str, reason: str, sent: Length) -> None:
        if value.wanted:
            return
        user = self.build.origin
        assert user is not None
        record = GatherRecord(
            op=str(user.target) if user.op == "call_function" else user.op,
            module=module_path(user if kind == "implicit" else value.node) or self.program.report.root,
            source=node_source(user if kind == "implicit" else value.node),
            reason=f"{reason}: {self.remedy}" if kind == "implicit" and self.remedy else reason,
            bytes=sent,
            kind=kind,
            name=self._output_name(value.node) if kind == "output" else "",
            value=value.node.name,
        )
        if self.program.options.strict and kind == "implicit":
            remedy = self.remedy or (
                "annotate the value with a SequenceParallelOutput before this operator, or leave its tokens whole"
            )
            raise StrictError(f"implicit gather: {record}. With strict=True this is an error: {remedy}.")
        self.program.report.implicit_gathers.append(record)

    def _output_name(self, node: Node) -> str:
        """What the program calls an output, or the input that is overwritten; ``""`` if that is not known."""
        node = node if node in self.outputs or self.ending is None else self.ending
        names = self.program.report.outputs
        values = self.program.graph.output_node().args[0]
        positions = [i for i, n in enumerate(values) if n is node] if isinstance(values, (list, tuple)) else []
        return next((names[i] for i in positions if i < len(names) and names[i]), "")


def _reads_shards(node: Node) -> bool:
    """Whether anything that ``node`` is computed from is split."""
    return any(map(is_split, reachable([node], lambda n: n.all_input_nodes)))
