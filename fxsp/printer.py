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
from fxsp.source import module_path
from fxsp.types import Length, Ranks, Shard, as_length, ceil_div, product

__all__ = [
    "COLLECTIVES",
    "MARKER",
    "Row",
    "bytes_sent",
    "format_bytes",
    "format_graph",
    "format_rows",
    "fxsp_name",
    "local_shape",
    "op_text",
    "rows",
]

MARKER = "▶"

#: The fxsp operators that communicate.
COLLECTIVES = frozenset(
    {
        "all_reduce",
        "all_to_all",
        "all_to_all_within",
        "gather",
        "gather_sum",
        "gather_used",
        "reduce_grad",
        "reduce_scatter",
        "ring_attention",
    }
)

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
            type=_type_text(node.meta.get("sp")),
            value=_value_text(node, ranks),
            op=op_text(node),
            module=module_path(node),
            sent=bytes_sent(node, ranks),
            stands_for=node.meta.get("global_name", ""),
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
    cells: list[tuple[str, ...]] = [
        (
            MARKER if row.sent is not None else "",
            row.name,
            row.type,
            row.value,
            row.op,
            "" if row.sent is None else format_bytes(row.sent),
            row.module,
        )
        for row in lines
    ]
    values = sum(1 for row in lines if row.op != "input" and not row.op.startswith(("return ", "constant ")))
    total = as_length(sum(sent, start=0))
    head = f"P={ranks.size}, {_count(values, 'value')}, "
    head += f"{_count(len(sent), 'collective')}" + (f" sends {format_bytes(total)} per rank" if sent else "")
    return "\n".join([head.replace("collectives sends", "collectives send"), *_aligned(cells)])


def _aligned(lines: list[tuple[str, ...]]) -> Iterable[str]:
    """Columns of equal width; a very wide operator does not push the columns of all other lines."""
    widths = [max((len(line[i]) for line in lines), default=0) for i in range(4)]
    op_width = min(max((len(line[4]) for line in lines), default=0), 72)
    byte_width = max((len(line[5]) for line in lines), default=0)
    for marker, name, type_, value, op, traffic, module in lines:
        cells = [f"{marker:1}", f"{name:{widths[1]}}", f"{type_:{widths[2]}}", f"{value:{widths[3]}}"]
        text = "  ".join([f"{cells[0]} {cells[1]}", *cells[2:], f"{op:{op_width}}"])
        if byte_width:
            text += f"  {traffic:>{byte_width}}"
        yield (f"{text}  | {module}" if module else text).rstrip()


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


# --- values ----------------------------------------------------------------------------------------------------------


def local_shape(node: torch.fx.Node, ranks: Ranks) -> tuple[Length, ...] | None:
    """The shape of the node's tensor on each rank; None if it is no tensor.

    From ``meta["local_val"]`` where there is one, else from the global value and the type.
    """
    val = _val(node)
    if not isinstance(val, torch.Tensor):
        return None
    return _local_shape(val, None if "local_val" in node.meta else node.meta.get("sp"), ranks)


def _val(node: torch.fx.Node) -> Any:
    for key in ("local_val", "val", "global_val", "example_value"):
        if node.meta.get(key) is not None:
            return node.meta[key]
    return None


def _local_shape(val: torch.Tensor, type_: Any, ranks: Ranks) -> tuple[Length, ...]:
    shape = [as_length(n) for n in val.shape]
    if isinstance(type_, Shard) and type_.dim < len(shape):
        shape[type_.dim] = type_.local_size(ranks.size)
    return tuple(shape)


def _type_text(type_: Any) -> str:
    if isinstance(type_, list | tuple):
        texts = [_type_text(t) for t in type_]
        return texts[0] if len(set(texts)) == 1 else ", ".join(texts)
    return "" if type_ is None else str(type_)


def _value_text(node: torch.fx.Node, ranks: Ranks) -> str:
    if node.op == "output":
        return ""
    val = _val(node)
    types = None if "local_val" in node.meta else node.meta.get("sp")
    if isinstance(val, list | tuple):
        each = types if isinstance(types, list | tuple) else [types] * len(val)
        return ", ".join(_tensor_text(v, t, ranks) for v, t in zip(val, each, strict=False))
    return _tensor_text(val, types, ranks)


def _tensor_text(val: Any, type_: Any, ranks: Ranks) -> str:
    if isinstance(val, torch.Tensor):
        shape = ", ".join(str(n) for n in _local_shape(val, type_, ranks))
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
    if fxsp_name(node) is not None:
        return _fxsp_text(node)
    operands = [_operand(arg) for arg in node.args]
    operands += [f"{key}={_operand(arg)}" for key, arg in node.kwargs.items()]
    return f"{_name(node.target)}({', '.join(operands)})"


def fxsp_name(node: torch.fx.Node) -> str | None:
    """``"gather"`` for a call of ``torch.ops.fxsp.gather``; None for all that is no fxsp operator."""
    if node.op != "call_function" or not torch_internals.is_operator(node.target):
        return None
    namespace, name = torch_internals.schema(node.target).name.split("::")
    return name if namespace == "fxsp" else None


def _arguments(node: torch.fx.Node) -> dict[str, Any]:
    """The operands of an operator by name."""
    names = [argument.name for argument in torch_internals.schema(node.target).arguments]
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _fxsp_text(node: torch.fx.Node) -> str:
    """Segments in the notation of the types; no group, no size, and the rank is a word."""
    arguments = _arguments(node)
    operands = []
    for name, value in arguments.items():
        if name == "rank":
            operands.append("rank")
        elif name == "lengths":
            kinds = (arguments.get(kind) or [False] * len(value) for kind in ("whole", "head_tail"))
            operands.append(_segments(value, *kinds))
        elif name == "zero_pads":
            operands += ["zero_pads"] if value else []
        elif name not in ("whole", "head_tail", "size", "group"):
            operands.append(_operand(value))
    return f"{fxsp_name(node)}({', '.join(operands)})"


def _segments(lengths: Any, whole: Any, head_tail: Any) -> str:
    texts = [str(_operand(n) if (known := _length(n)) is None else known) for n in lengths]
    kinds = [" whole" if w else " head-tail" if h else "" for w, h in zip(whole, head_tail, strict=True)]
    parts = [text + kind for text, kind in zip(texts, kinds, strict=False)]
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


# --- traffic ---------------------------------------------------------------------------------------------------------


def bytes_sent(node: torch.fx.Node, ranks: Ranks) -> Length | None:
    """Bytes that each rank sends in this node; None if it is no collective (or its operand's shape is unknown: 0).

    all-to-all: ``(P-1)/P`` of the operand; gather: the rank's rows of split segments to ``P-1`` others;
    reduce-scatter: everyone else's rows; all-reduce: ``2 (P-1)/P`` of the operand.  Sums of half precision travel as
    float32.  Pads are counted: they travel.
    """
    name = fxsp_name(node)
    if name not in COLLECTIVES:
        return None
    if "fxsp_bytes" in node.meta:  # the pass that made it has counted
        return as_length(node.meta["fxsp_bytes"])
    operand = node.args[0]
    shape = local_shape(operand, ranks) if isinstance(operand, torch.fx.Node) else None
    val = _val(operand) if isinstance(operand, torch.fx.Node) else None
    if shape is None or val is None:
        return 0
    size, item = ranks.size, val.element_size()
    if name in ("all_reduce", "reduce_grad", "reduce_scatter") and val.dtype in (torch.float16, torch.bfloat16):
        item = 4
    if name == "all_to_all":
        return _part(product((*shape, item)), size - 1, size)
    if name == "all_to_all_within":
        return as_length(product((*shape[1:], item)) * (shape[0] - 1))
    if name == "ring_attention":
        return _rotations(node, ranks)
    if name in ("all_reduce", "reduce_grad"):
        return _part(product((*shape, item)), 2 * (size - 1), size)
    arguments = _arguments(node)
    dim = arguments["dim"]
    rows: Length = 0
    for length, whole in zip(arguments["lengths"], arguments["whole"], strict=True):
        n = _length(length)
        if n is None:  # a size that nobody described: all rows travel, at most
            rows = shape[dim]
            break
        if not whole:
            rows = rows + ceil_div(n, size)
        elif name == "gather_sum":  # summed by an all-reduce
            rows = rows + _part(2 * n, 1, size)
    others = [n for i, n in enumerate(shape) if i != dim]
    return product((*others, as_length(rows), item, size - 1))


def _rotations(node: torch.fx.Node, ranks: Ranks) -> Length:
    """A ring sends the split rows of keys and values once for each other place."""
    arguments = _arguments(node)
    shapes = [local_shape(arguments[name], ranks) for name in ("k", "v")]
    if shapes[0] is None or shapes[1] is None:
        return 0
    rows: Length = 0
    size, ulysses = ranks.size, arguments["ulysses"]
    dealt = arguments.get("k_head_tail") or [False] * len(arguments["k_whole"])
    for length, whole, head_tail in zip(arguments["k_lengths"], arguments["k_whole"], dealt, strict=True):
        n = _length(length)
        if not whole:
            parts = 2 if head_tail else 1
            rows = rows + (0 if n is None else parts * ulysses * ceil_div(n, parts * size))
    width = as_length(shapes[0][3] + shapes[1][3])
    item = _val(arguments["k"]).element_size()
    return product((*shapes[0][:2], as_length(rows), width, item, size // ulysses - 1))


def _length(arg: Any) -> Length | None:
    value = _val(arg) if isinstance(arg, torch.fx.Node) else arg
    return None if value is None else as_length(value)


def _part(total: Length, numerator: int, denominator: int) -> Length:
    """``total * numerator / denominator``, rounded up."""
    return ceil_div(as_length(total * numerator), denominator)


def format_bytes(n: Any) -> str:
    """``"96 B"``, ``"1.5 KiB"``, ``"3.0 MiB"``; a symbolic number stays a formula."""
    if not isinstance(n, int | float):
        return f"{n} B"
    if n < 1024:
        return f"{n:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        n = n / 1024
        if n < 1024 or unit == "GiB":
            break
    return f"{n:.1f} {unit}"
