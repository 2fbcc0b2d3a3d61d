"""device_memory: what each attention moves through device memory, and which packs a compiler shall fuse.

The graph of one rank stays as it is, but for a flag: a ``pack_heads`` whose operands are made by elementwise operators
and norms (see :mod:`fxsp.passes.accounting.prologue`) is left to the compiler, which writes what they make straight
into the send buffer; any other is a kernel of our own.  By count this is never worse: a kernel of ours would read
again what was just written.

Counted from the graph, by the table in :mod:`fxsp.passes.accounting.memory_traffic`, at the lengths that were traced.
 After this pass ``report.attentions[i].memory`` and ``.producers`` are known of every attention.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxsp.kernels.ops import fxsp_ops
from fxsp.passes.accounting.memory_traffic import attended, attention_output, costs, is_attention
from fxsp.passes.accounting.prologue import producers_of
from fxsp.passes.base import Pass, Program
from fxsp.passes.graph import facts, global_value
from fxsp.report import AttentionRecord, Memory, Move
from fxsp.torch_internals import is_operator, schema
from fxsp.types import Sequence, Shard, shape_on_rank

__all__ = ["DeviceMemory"]

aten = torch.ops.aten
_PACK = fxsp_ops.pack_heads.default


class DeviceMemory(Pass):
    """After this pass the report says what each attention moves, and packs are spelled for who will write them."""

    def apply(self, program: Program) -> Program:
        groups: dict[AttentionRecord, list[Node]] = {}
        for node in program.graph.nodes:
            record = facts(node).attention_record
            if record is not None:
                groups.setdefault(record, []).append(node)
        number = program.number
        known: dict[Any, Memory] = {}
        for record, nodes in groups.items():
            attention = next(filter(is_attention, nodes), None)
            if attention is None:
                continue
            found = _Attention(nodes, attention, program.ranks.size, number)
            key = found.description()
            if key not in known:
                known[key] = found.memory()
            moves = tuple(replace(move, value=nodes[int(move.value)].name) for move in known[key].moves)
            made = producers_of(found.operands)
            for node in nodes:
                if made and node.target is _PACK:
                    node.args = (*node.args[:4], True)
            record.memory, record.producers = Memory(moves), made
        program.gm.recompile()
        return program


def _is_size(node: Node) -> bool:
    """Whether a node is a number: a size, or computed from sizes."""
    if isinstance(global_value(node), (Tensor, tuple, list)):
        return False
    if node.op != "call_function":
        return isinstance(global_value(node), torch.SymInt)
    return node.target is aten.sym_size.int or not (is_operator(node.target) or node.target is operator.getitem)


def _joins_widths(node: Node) -> bool:
    """Whether tensors are put side by side: keys and values by widths, or q, k and v by heads (``[u, L, B, h, D]``)."""
    return node.target is aten.cat.default and node.args[1:] in ((-1,), (3,))


class _Attention:
    """The nodes of one attention, run on tensors without data, at the lengths that were traced."""

    def __init__(self, nodes: list[Node], attention: Node, size: int, number: Callable[[Any], int]) -> None:
        self.nodes, self.attention, self.size, self.number = nodes, attention, size, number
        self.inside = inside = set(nodes)
        #: Node -> the tensors that pass through it: those that the attention reads from it, or what it wrote.
        self.tensors: dict[Node, str] = {}
        for node in reversed(nodes):
            for x, names in self._reads(node):
                self.tensors[x] = "".join(n for n in "qkv" if n in self.tensors.get(x, "") + names)
        #: The local q, k and v: what was there before.
        self.operands = {name: node for node, names in self.tensors.items() if node not in inside for name in names}
        self.tensors[attention] = "o"
        for node in nodes:
            if node not in self.tensors and any(self.tensors.get(x) == "o" for x in node.all_input_nodes):
                self.tensors[node] = "o"
        self.values: dict[Node, Any] = {}

    def _reads(self, node: Node) -> list[tuple[Node, str]]:
        """The operands of a node before the attention, and what of q, k, v is in each."""
        if node is self.attention:
            return attended(node)
        names = self.tensors.get(node, "")
        side_by_side: Any = node.args[0] if node.target is _PACK or _joins_widths(node) else ()
        if names and len(names) == len(side_by_side):
            return list(zip(side_by_side, names, strict=True))
        return [(x, names) for x in node.all_input_nodes if names and not _is_size(x)]

    def description(self) -> Any:
        """What the count depends on: attentions that look the same move the same."""
        place = {node: i for i, node in enumerate(self.nodes)}

        def text(node: Node) -> str:
            if node in place:
                return f"%{place[node]}"
            if node not in self.tensors:
                return str(self._value(node)) if _is_size(node) else "a mask"
            x = self._value(node)
            return f"{list(x.shape)} {x.dtype} {self._sequence(node)}"

        return tuple((node.target, repr(torch.fx.map_arg((node.args, node.kwargs), text))) for node in self.nodes)

    def memory(self) -> Memory:
        moves = []
        for i, node in enumerate(self.nodes):
            if node not in self.tensors:
                continue
            operands = {x: self._value(x) for x in node.all_input_nodes if x in self.tensors}
            for cost in costs(node, self._value(node), operands, self.size):
                tensors = cost.tensors or self.tensors[node]
                tokens, rows = self._grows_with(node, tensors, cost.rows)
                op = schema(node.target).name.partition("::")[2] if is_operator(node.target) else node.name
                passes = len(tensors) * cost.reads, len(tensors) * cost.writes
                moves.append(Move(op, str(i), tensors, *passes, cost.bytes, tokens, rows))
        return Memory(tuple(moves))

    def _sequence(self, node: Node) -> Sequence | None:
        type_ = facts(node).type
        return type_.sequence if isinstance(type_, Shard) else None

    def _grows_with(self, node: Node, tensors: str, rows: str) -> tuple[Sequence | None, str]:
        """The tokens that the bytes of a node are proportional to, and whether their pads count."""
        tokens = self._sequence(self.operands["q" if tensors == "o" else tensors[0]])
        value = self._value(node)
        if tokens is None or rows or not isinstance(value, Tensor):
            return tokens, rows or "local"
        local, real = self.number(tokens.local_length(self.size)), self.number(tokens.length)
        elements = sum(self._per_token(name) for name in tensors)
        if value.numel() % (elements * local) == 0:
            return tokens, "local"
        if not any(tokens.whole) and value.numel() * self.size % (elements * real) == 0:
            return tokens, "real"
        return None, ""

    def _per_token(self, name: str) -> int:
        """Elements of one token, of all heads."""
        node = self.operands["q" if name == "o" else name]
        x, type_ = self._value(node), facts(node).type
        elements = x.numel() // x.shape[type_.dim if isinstance(type_, Shard) else -2]
        return (
            int(elements // x.shape[-1] * self._value(self.operands["v"]).shape[-1]) if name == "o" else int(elements)
        )

    def _value(self, node: Node) -> Any:
        if node not in self.values:
            self.values[node] = self._run(node) if node.op == "call_function" else self._given(node)
        return self.values[node]

    def _run(self, node: Node) -> Any:
        if node is self.attention:
            q, _, v = (self._value(x) for x, _ in attended(node))
            return attention_output(node, q, v, global_value(self.operands["q"]).device.type)
        if not _is_size(node) and not (node in self.inside and node in self.tensors):
            return self._given(node)
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), self._value)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _given(self, node: Node) -> Any:
        """An input, or a local operand, without data; a size as a number."""
        value, type_ = global_value(node), facts(node).type
        if not isinstance(value, Tensor):
            return self.number(value)
        shape = [self.number(n) for n in shape_on_rank(value.shape, type_, self.size)]
        return torch.empty(shape, dtype=value.dtype, device="meta")
