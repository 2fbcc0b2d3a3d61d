"""Floating-point operations of a graph: matrix products, convolutions and attention, the work of a forward pass.

A multiplication and an addition are two operations, as in ``torch.utils.flop_counter``, whose formulas serve the
operators that it knows; those that stay whole at our level (``linear``, ``matmul``, ``scaled_dot_product_attention``)
are counted here.  Elementwise work is not counted: it costs memory traffic, not arithmetic.

A causal attention (by its flag) computes the pairs with ``key <= query``; with a mask, whatever is in it, all pairs.
Counted is what a rank really does: pads, and rows that are the same on every rank, count on each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch.fx import Node
from torch.utils.flop_counter import flop_registry

from fxsp.kernels.counts import attention_flops
from fxsp.kernels.op import sizes_of
from fxsp.kernels.ops import record_of
from fxsp.lengths import hint
from fxsp.passes.graph import Call, facts
from fxsp.torch_internals import is_operator, packet_of, schema

__all__ = ["FORMULAS", "Shape", "attention_flops", "bytes_of", "node_flops", "shapes"]

Shape = tuple[int, ...]
#: The shape of a node that is a tensor, as numbers: the operands of what :data:`FORMULAS` counts are.
ShapeOf = Callable[[Any], Shape]


def shapes(value_of: Callable[[Node], Any], number: Callable[[Any], int]) -> Callable[[Any], Shape | None]:
    """What reads the shape of a node from its value, as numbers; None for what is no tensor."""

    def shape_of(node: Any) -> Shape | None:
        value = value_of(node) if isinstance(node, Node) else None
        return tuple(map(number, value.shape)) if isinstance(value, torch.Tensor) else None

    return shape_of


def bytes_of(value: torch.Tensor, number: Callable[[Any], int]) -> int:
    """The bytes of a tensor; ``number`` reads a size."""
    return prod(map(number, value.shape)) * value.element_size()


def _linear(call: Call, shape_of: ShapeOf) -> int:
    x, weight = shape_of(call["input"]), shape_of(call["weight"])
    return 2 * prod(x) * (weight[0] if len(weight) > 1 else 1)


def _matmul(call: Call, shape_of: ShapeOf) -> int:
    return 2 * prod(shape_of(call.node)) * shape_of(call["self"])[-1]


def _attention(call: Call, shape_of: ShapeOf) -> int:
    q, k, v = (shape_of(call[name]) for name in ("query", "key", "value"))
    return attention_flops(q, k, v, causal=bool(call.get("is_causal")))


def _convolution(call: Call, shape_of: ShapeOf) -> int:
    """The weight is ``[out, in / groups, *kernel]``: every output element is a sum over all but its first dimension."""
    return 2 * prod(shape_of(call.node)) * prod(shape_of(call["weight"])[1:])


def _transposed_convolution(call: Call, shape_of: ShapeOf) -> int:
    return 2 * prod(shape_of(call["input"])) * prod(shape_of(call["weight"])[1:])


def _einsum(call: Call, shape_of: ShapeOf) -> int:
    """Twice the product of all sizes: what contracting all operands at once costs, for two operands what it costs."""
    operands = call["tensors"]
    letters: dict[str, int] = {}
    left = call["equation"].replace(" ", "").partition("->")[0].split(",")
    for subscripts, operand in zip(left, operands, strict=True):
        shape = shape_of(operand)
        hidden = len(shape) - len(subscripts.replace("...", ""))
        expanded = subscripts.replace("...", "".join(chr(0x3B1 + i) for i in range(hidden)))
        for letter, n in zip(expanded, shape, strict=True):
            letters[letter] = max(letters.get(letter, 1), n)
    return 2 * prod(letters.values()) if len(operands) > 1 else 0


def _length(size: Node) -> int | None:
    """A length that a node computes counts as the hint of its value."""
    value = facts(size).local
    return None if value is None else hint(value)


#: Name of an operator -> its count; entries may be added for operators of one's own.
FORMULAS: dict[str, Callable[[Call, ShapeOf], int]] = {
    "aten::linear": _linear,
    "aten::matmul": _matmul,
    "aten::einsum": _einsum,
    "aten::scaled_dot_product_attention": _attention,
    **{f"aten::conv{n}d": _convolution for n in (1, 2, 3)},
    **{f"aten::conv_transpose{n}d": _transposed_convolution for n in (1, 2, 3)},
}


def node_flops(node: Node, shape_of: Callable[[Any], Shape | None], rank: int | None = None) -> int:
    """Floating-point operations of one node, on ``rank`` (None: the busiest one); 0 for what moves or maps elements."""
    if node.op != "call_function" or not is_operator(node.target):
        return 0

    def stand_in(n: Node) -> Any:
        return None if (shape := shape_of(n)) is None else torch.empty(shape, device="meta")

    op = record_of(node.target)
    if op is not None:
        if op.flops is None:
            return 0
        return op.flops(sizes_of(node, 0, lambda n: _length(n) if (x := stand_in(n)) is None else x), rank)
    formula = FORMULAS.get(schema(node.target).name)
    if formula is not None:
        return formula(Call(node), shape_of)  # type: ignore[arg-type]
    known: Mapping[Any, Any] = flop_registry
    count = known.get(packet_of(node.target))
    if count is None:
        return 0
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n if (x := stand_in(n)) is None else x)
    return int(count(*args, **kwargs, out_val=torch.empty(shape_of(node) or (), device="meta")))
