"""What the operators of fxsp send: which ones communicate, on which local shapes, and how many bytes."""

from __future__ import annotations

from typing import Any

import torch

from fxsp import torch_internals
from fxsp.passes.graph import facts, value_of
from fxsp.types import Length, Ranks, Shard, as_length, ceil_div, product, quotient

__all__ = [
    "COLLECTIVES",
    "arguments_of",
    "bytes_sent",
    "format_bytes",
    "fxsp_name",
    "length_of",
    "local_shape",
    "shape_on_rank",
]

#: The fxsp operators that communicate.
COLLECTIVES = frozenset(
    {
        "all_reduce",
        "all_reduce_extreme",
        "all_to_all",
        "all_to_all_within",
        "at_extreme_backward",
        "gather",
        "gather_sum",
        "gather_used",
        "merged_attention",
        "reduce_grad",
        "reduce_scatter",
        "ring_attention",
    }
)


def local_shape(node: torch.fx.Node, ranks: Ranks) -> tuple[Length, ...] | None:
    """The shape of the node's tensor on each rank; None if it is no tensor.

    From the ``local`` value where it is known, else from the global value and the type.
    """
    val = value_of(node)
    if not isinstance(val, torch.Tensor):
        return None
    return shape_on_rank(val, None if facts(node).local is not None else facts(node).type, ranks)


def shape_on_rank(val: torch.Tensor, type_: Any, ranks: Ranks) -> tuple[Length, ...]:
    """The shape on each rank of a global value of this type."""
    shape = [as_length(n) for n in val.shape]
    if isinstance(type_, Shard) and type_.dim < len(shape):
        shape[type_.dim] = type_.local_size(ranks.size)
    return tuple(shape)


def fxsp_name(node: torch.fx.Node) -> str | None:
    """``"gather"`` for a call of ``torch.ops.fxsp.gather``; None for all that is no fxsp operator."""
    if node.op != "call_function" or not torch_internals.is_operator(node.target):
        return None
    namespace, name = torch_internals.schema(node.target).name.split("::")
    return name if namespace == "fxsp" else None


def arguments_of(node: torch.fx.Node) -> dict[str, Any]:
    """The operands of an operator by name."""
    names = [argument.name for argument in torch_internals.schema(node.target).arguments]
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def bytes_sent(node: torch.fx.Node, ranks: Ranks) -> Length | None:
    """Bytes that each rank sends in this node; None if it is no collective (or its operand's shape is unknown: 0).

    all-to-all: ``(P-1)/P`` of the operand; gather: the rank's rows of split segments to ``P-1`` others;
    reduce-scatter: everyone else's rows; all-reduce: ``2 (P-1)/P`` of the operand.  Sums of half precision travel as
    float32.  Pads are counted: they travel.
    """
    name = fxsp_name(node)
    if name not in COLLECTIVES:
        return None
    if facts(node).sent is not None:  # the pass that made it has counted
        return as_length(facts(node).sent)
    operand = node.args[0]
    shape = local_shape(operand, ranks) if isinstance(operand, torch.fx.Node) else None
    val = value_of(operand) if isinstance(operand, torch.fx.Node) else None
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
    if name == "merged_attention":
        value = local_shape(arguments_of(node)["v"], ranks)
        # The log-sum-exps are two numbers each, fp32 at least.
        width = as_length((0 if value is None else value[-1]) + 2 * max(1, 4 // item))
        return product((*shape[:-1], width, item, size - 1))
    if name == "at_extreme_backward" and not arguments_of(node)["ties"]:
        return 0
    if name in ("all_reduce_extreme", "at_extreme_backward"):  # halves travel as float32, counts as int32
        item = max(item, 4) if val.dtype.is_floating_point and name == "all_reduce_extreme" else 4
        item = 1 if val.dtype == torch.bool else item
        return _part(product((*shape, item)), 2 * (size - 1), size)
    if name in ("all_reduce", "reduce_grad"):
        return _part(product((*shape, item)), 2 * (size - 1), size)
    arguments = arguments_of(node)
    dim = arguments["dim"]
    rows: Length = 0
    for length, whole in zip(arguments["lengths"], arguments["whole"], strict=True):
        n = length_of(length)
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
    arguments = arguments_of(node)
    shapes = [local_shape(arguments[name], ranks) for name in ("k", "v")]
    if shapes[0] is None or shapes[1] is None:
        return 0
    rows: Length = 0
    size, ulysses = ranks.size, arguments["ulysses"]
    dealt = arguments.get("k_head_tail") or [False] * len(arguments["k_whole"])
    units = arguments.get("k_units") or [1] * len(arguments["k_whole"])
    for length, whole, head_tail, unit in zip(arguments["k_lengths"], arguments["k_whole"], dealt, units, strict=True):
        n, w = length_of(length), length_of(unit) or 1
        if not whole:
            parts = 2 if head_tail else 1
            n = None if n is None else quotient(n, w)
            rows = rows + (0 if n is None else w * parts * ulysses * ceil_div(n, parts * size))
    width = as_length(shapes[0][3] + shapes[1][3])
    item = value_of(arguments["k"]).element_size()
    return product((*shapes[0][:2], as_length(rows), width, item, size // ulysses - 1))


def length_of(arg: Any) -> Length | None:
    """The length that an argument stands for; None if nobody described it."""
    value = value_of(arg) if isinstance(arg, torch.fx.Node) else arg
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
