"""A graph as text: one line per value, the same text on every rank.

Example, a linear layer on two ranks (marker, name, type, local shape, operator, bytes sent, module)::

    P=2, 4 values, 1 collective sends 32 B per rank
      x       R          f32[1, 4, 4]  input
      shard   S(1, [4])  f32[1, 2, 4]  shard(x, 1, [4], rank)             | proj
      linear  S(1, [4])  f32[1, 2, 4]  linear(shard, w)                   | proj
    ▶ gather  R          f32[1, 4, 4]  gather(linear, 1, [4], rank)  32 B
                                       return gather
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxsp import torch_internals
from fxsp.inspection.wire import bytes_sent, format_bytes, length_of
from fxsp.kernels.ops import op_of
from fxsp.passes.graph import Call, facts, value_of
from fxsp.source import module_path
from fxsp.types import Length, Ranks, as_length, shape_on_rank

__all__ = ["MARKER", "Row", "count_text", "format_graph", "format_rows", "op_text", "rows"]

MARKER = "▶"

_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
    torch.complex64: "c64",
    torch.complex128: "c128",
}


@dataclass(frozen=True)
class Row:
    """One line of a printed graph."""

    name: str
    #: The sharding type, the value with its local shape, and the operator with its operands, as text.
    type: str
    value: str
    op: str
    module: str
    #: Bytes that each rank sends; None if it is no collective.
    sent: Length | None = None
    #: The value of the global program that this one is a form of.
    stands_for: str = ""


def rows(gm: torch.fx.GraphModule, ranks: Ranks) -> list[Row]:
    """The lines of a graph, as data; of ``ranks`` only the number matters."""
    return [
        Row(
            name="" if node.op == "output" else node.name,
            type=_type_text(facts(node).type),
            value=_value_text(node, ranks),
            op=op_text(node),
            module=module_path(node),
            sent=bytes_sent(node, ranks),
            stands_for=facts(node).stands_for,
        )
        for node in gm.graph.nodes
    ]


def format_graph(gm: torch.fx.GraphModule, ranks: Ranks) -> str:
    """The graph as text: per value its type, dtype and local shape, operator, bytes sent per rank, and module path.

    Collectives carry a marker.  Of ``ranks`` only the number matters: the rank is printed as the word.
    """
    return format_rows(rows(gm, ranks), ranks)


def format_rows(lines: Sequence[Row], ranks: Ranks) -> str:
    """The text of :func:`format_graph` from its lines."""
    sent = [row.sent for row in lines if row.sent is not None]
    values = sum(1 for row in lines if row.op != "input" and not row.op.startswith(("return ", "constant ")))
    total = as_length(sum(sent, start=0))
    head = f"P={ranks.size}, {count_text(values, 'value')}, "
    head += f"{count_text(len(sent), 'collective')}" + (f" sends {format_bytes(total)} per rank" if sent else "")
    return "\n".join([head.replace("collectives sends", "collectives send"), *_aligned(lines)])


def _aligned(lines: Sequence[Row]) -> Iterable[str]:
    """Columns of equal width; a very wide operator does not push the columns of all other lines."""
    traffic = ["" if row.sent is None else format_bytes(row.sent) for row in lines]
    name, type_, value, op = (
        max((len(getattr(row, column)) for row in lines), default=0) for column in ("name", "type", "value", "op")
    )
    width = max(map(len, traffic), default=0)
    for row, sent in zip(lines, traffic, strict=True):
        text = f"{MARKER if sent else '':1} {row.name:{name}}  {row.type:{type_}}  {row.value:{value}}"
        text += f"  {row.op:{min(op, 72)}}" + (f"  {sent:>{width}}" if width else "")
        yield (f"{text}  | {row.module}" if row.module else text).rstrip()


def count_text(n: int, noun: str) -> str:
    """``"1 value"``, ``"2 values"``."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


# --- values ----------------------------------------------------------------------------------------------------------


def _type_text(type_: Any) -> str:
    if isinstance(type_, list | tuple):
        texts = [_type_text(t) for t in type_]
        return texts[0] if len(set(texts)) == 1 else ", ".join(texts)
    return "" if type_ is None else str(type_)


def _value_text(node: torch.fx.Node, ranks: Ranks) -> str:
    if node.op == "output":
        return ""
    val = value_of(node)
    types = None if facts(node).local is not None else facts(node).type
    if isinstance(val, list | tuple):
        each = types if isinstance(types, list | tuple) else [types] * len(val)
        return ", ".join(_tensor_text(v, t, ranks) for v, t in zip(val, each, strict=False))
    return _tensor_text(val, types, ranks)


def _tensor_text(val: Any, type_: Any, ranks: Ranks) -> str:
    if isinstance(val, torch.Tensor):
        shape = ", ".join(str(n) for n in shape_on_rank(val.shape, type_, ranks.size))
        return f"{_DTYPES.get(val.dtype, str(val.dtype).removeprefix('torch.'))}[{shape}]"
    return "" if val is None else str(val)


# --- operators -------------------------------------------------------------------------------------------------------


def op_text(node: torch.fx.Node) -> str:
    """The node's operator and operands in short form, ``linear(x, w)``; the same on every rank."""
    if node.op == "placeholder":
        return "input"
    if node.op == "output":
        outputs = node.args[0] if isinstance(node.args[0], list | tuple) else [node.args[0]]
        return "return " + ", ".join(_operand(out) for out in outputs)
    if node.op == "get_attr":
        return f"constant {node.target}"
    if node.target is operator.getitem:
        return f"{_operand(node.args[0])}[{_operand(node.args[1])}]"
    if (op := op_of(node)) is not None:
        return _fxsp_text(op.name, node)
    operands = [_operand(arg) for arg in node.args]
    operands += [f"{key}={_operand(arg)}" for key, arg in node.kwargs.items()]
    return f"{_name(node.target)}({', '.join(operands)})"


def _fxsp_text(op: str, node: torch.fx.Node) -> str:
    """Segments in the notation of the types; no group, no size, and the rank is a word."""
    arguments = Call(node).given
    operands = []
    for name, value in arguments.items():
        if name == "rank":
            operands.append("rank")
        elif name == "lengths":
            whole, head_tail = (arguments.get(kind) or [False] * len(value) for kind in ("whole", "head_tail"))
            operands.append(_segments(value, whole, head_tail, arguments.get("units") or [1] * len(value)))
        elif name == "zero_pads":
            operands += ["zero_pads"] if value else []
        elif name not in ("whole", "head_tail", "units", "size", "group"):
            operands.append(_operand(value))
    return f"{op}({', '.join(operands)})"


def _segments(lengths: Any, whole: Any, head_tail: Any, units: Any) -> str:
    texts, sizes = (
        [str(_operand(n) if (known := length_of(n)) is None else known) for n in x] for x in (lengths, units)
    )
    kinds = [" whole" if w else " head-tail" if h else "" for w, h in zip(whole, head_tail, strict=True)]
    by = ["" if size == "1" else f" by {size}" for size in sizes]
    parts = [text + kind + unit for text, kind, unit in zip(texts, kinds, by, strict=False)]
    return f"[{'|'.join(parts)}]"


def _name(target: Any) -> str:
    if isinstance(target, str):
        return target
    if torch_internals.is_operator(target):
        namespace, name = torch_internals.schema(target).name.split("::")
        return name if namespace == "aten" else f"{namespace}.{name}"
    return str(getattr(target, "__name__", target))


def _operand(arg: Any) -> str:
    if isinstance(arg, torch.fx.Node):
        return arg.name
    if isinstance(arg, list | tuple):
        return f"[{', '.join(_operand(a) for a in arg)}]"
    if isinstance(arg, torch.dtype):
        return _DTYPES.get(arg, str(arg).removeprefix("torch."))
    if isinstance(arg, slice):
        return ":".join("" if part is None else _operand(part) for part in (arg.start, arg.stop, arg.step))
    if isinstance(arg, float):
        return f"{arg:.6g}"
    if isinstance(arg, torch.device | torch.layout | torch.memory_format):
        return str(arg).removeprefix("torch.")
    return repr(arg) if isinstance(arg, str) else str(arg)
