"""What a candidate costs: one forward pass of a rank (in training, a step) as the types say that it will run.

Of each call of the global graph with its types: operations, and bytes that it writes, by the part of the tokens that a
rank has; bytes that the conversions of its operands send, as *partition* will write them, and those of the way that was
chosen for an attention.  Together, on a device::

    seconds = operations / flops + bytes written / memory + bytes sent / bandwidth + messages * latency

The backward pass counts twice the operations and writes of the forward pass, and sends what was sent the other way
round; parameters that are used with shards have gradients to sum.  All that is read is equal on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from fxsp.cost.flops import bytes_of, shapes
from fxsp.lengths import hint
from fxsp.machine import Travel
from fxsp.passes.attention.question import AttentionChoice
from fxsp.passes.base import Program
from fxsp.passes.graph import Call, Decision, facts, tensor_nodes
from fxsp.passes.propagate.propagate import is_annotate
from fxsp.passes.work import work_of
from fxsp.torch_internals import is_operator, schema
from fxsp.types import Partial, Replicate, Shard, Type, Used

__all__ = ["Price", "Pricing"]

#: What a conversion is for a link; others exchange.
_KIND = {"gather": "all_gather", "all_reduce": "all_reduce", "reduce_scatter": "all_reduce"}


@dataclass(frozen=True)
class Price:
    """Of one rank, forward and (in training) backward."""

    seconds: float
    #: Operations of one forward pass, on a rank and on one device.
    operations: int
    total: int
    #: Bytes that it sends, and in how many messages.
    sent: int
    messages: int
    #: Values that an operator needs whole.
    gathers: int = 0

    @property
    def part(self) -> float:
        """The operations of a rank, of one device's."""
        return self.operations / self.total if self.total else 1.0

    def __str__(self) -> str:
        gathers = f", {self.gathers} implicit gathers" if self.gathers else ""
        return f"{self.part:.0%} of the operations per rank, {self.sent} bytes sent{gathers}"


@dataclass
class _Static:
    """What does not depend on types: of a call."""

    node: Node
    operands: list[Node]
    work: int
    written: int


@dataclass
class Pricing:
    """Prices one program under several assignments of types."""

    program: Program
    #: Nodes whose work is whole, as the last price found them, the most work first.
    whole: list[tuple[int, Node]] = field(default_factory=list)
    #: Values that it found to be gathered because an operator needs all tokens, and the dimension of these.
    gathered: list[tuple[Node, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        graph, number = self.program.graph, self.program.number

        shape_of = shapes(lambda node: node.meta.get("val"), number)
        self._calls: list[_Static] = []
        self._bytes: dict[Node, int] = {}
        for node in graph.nodes:
            tensors = (v for v in tree_leaves(node.meta.get("val")) if isinstance(v, torch.Tensor))
            self._bytes[node] = sum(bytes_of(value, number) for value in tensors)
            if node.op != "call_function" or is_annotate(node) or not is_operator(node.target):
                continue
            views = any(result.alias_info is not None for result in schema(node.target).returns)
            written = 0 if views else self._bytes[node]
            self._calls.append(_Static(node, Call(node).operands, work_of(node, shape_of), written))
        values = (v for n in graph.nodes for v in tree_leaves(n.meta.get("val")) if isinstance(v, torch.Tensor))
        kind = next((v.device.type for v in values), "cpu")
        options = self.program.options
        self._machine = options.machine_for(kind, self.program.ranks.size)
        self.total = sum(call.work for call in self._calls)
        self.works = {call.node: call.work for call in self._calls}

    def work(self, node: Node) -> int:
        """Operations of a call on one device."""
        return self.works.get(node, 0)

    def undivided(self) -> Price:
        """Every rank computes everything."""
        self.gathered = []
        return self._price(self.total, sum(call.written for call in self._calls), [])

    def price(self) -> Price:
        """With the types that *propagate* has found."""
        size, training = self.program.ranks.size, self.program.training
        operations = written = 0
        travels: list[Travel] = []
        self.whole, self.gathered = [], []
        done: set[tuple[Node, str]] = set()

        def convert(x: Node, need: Type, *, implicit: bool) -> None:
            have = facts(x).type
            kind, moved = _conversion(have, need, self._bytes.get(x, 0), size, free=facts(x).free)
            if not kind or (x, kind) in done:
                return
            done.add((x, kind))
            if kind == "used":
                if not training or not x.meta["val"].requires_grad:
                    return
                travels.append(Travel("all_reduce", size, 1, moved))
                return
            twice = 2 if training and x.meta["val"].requires_grad else 1
            travels.append(Travel(_KIND.get(kind, "all_to_all"), size, twice, twice * moved))
            if isinstance(have, Shard) and kind == "gather" and implicit:
                self.gathered.append((x, have.dim))

        for call in self._calls:
            decision = facts(call.node).decision
            if decision is None:
                operations, written = operations + call.work, written + call.written
                continue
            split = _part(decision, size)
            operations += int(call.work * split)
            written += int(call.written * split)
            if call.work and split == 1:
                self.whole.append((call.work, call.node))
            for x, need in zip(call.operands, decision.operands, strict=True):
                convert(x, need, implicit=True)
            if isinstance(decision.detail, AttentionChoice):
                travels.extend(decision.detail.way.travels)
        for x in tensor_nodes(self.program.graph.output_node().args):
            convert(x, Replicate(), implicit=False)
        self.whole.sort(key=lambda item: -item[0])
        return self._price(operations, written, travels)

    def _price(self, operations: int, written: int, travels: list[Travel]) -> Price:
        passes, device = 3 if self.program.training else 1, self._machine.device
        computing = operations / device.flops + written / device.bandwidth
        seconds = passes * computing + self._machine.seconds(travels)
        sent, messages = sum(hint(t.sent) for t in travels), sum(t.messages for t in travels)
        return Price(seconds, operations, self.total, sent, messages, len(self.gathered))


def _part(decision: Decision, size: int) -> float:
    """The part of a call that a rank runs: its rows of the tokens, pads included, of all."""
    shards: Iterable[Type] = (*decision.results, *decision.operands)
    detail = decision.detail
    if isinstance(detail, AttentionChoice):
        sequence = detail.queries or detail.keys
        return 1.0 if sequence is None else hint(sequence.local_length(size)) / hint(sequence.length)
    shard = next((t for t in shards if isinstance(t, Shard)), None)
    if shard is None:
        return 1.0
    return hint(shard.sequence.local_length(size)) / hint(shard.sequence.length)


def _conversion(have: object, need: Type, total: int, size: int, *, free: bool) -> tuple[str, int]:
    """What makes one type of another, and the bytes that each rank sends; ``total`` are those of the whole value."""
    others = (size - 1) / size
    if isinstance(have, Partial):
        if isinstance(need, Shard):
            return "reduce_scatter", int(total * others)
        return ("", 0) if isinstance(need, Partial) else ("all_reduce", int(2 * total * others))
    if isinstance(have, Shard):
        if free or (isinstance(need, Shard) and have.same_as(need)):
            return "", 0
        if isinstance(need, Shard):
            return f"reshard {need}", int(total / size * others)
        return "gather", int(total * others)
    if isinstance(need, Used):
        return "used", int(2 * total * others)
    return "", 0
