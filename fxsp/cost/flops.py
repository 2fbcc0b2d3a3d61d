"""Floating-point operations of a graph: matrix products, convolutions and attention, the work of a forward pass.

A multiplication and an addition are two operations, as in ``torch.utils.flop_counter``, whose formulas serve the
operators that it knows; those that stay whole at our level (``linear``, ``matmul``, ``scaled_dot_product_attention``)
are counted here.  Elementwise work is not counted: it costs memory traffic, not arithmetic.

A causal attention (by its flag) computes the pairs with ``key <= query``; with a mask, whatever is in it, all pairs.
Counted is what a rank really does: pads, and rows that are the same on every rank, count on each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node
from torch.utils.flop_counter import flop_registry

from fxsp.kernels.attention.ring_blocks import pairs_of
from fxsp.passes.graph import facts
from fxsp.passes.rules.rule import Call
from fxsp.torch_internals import is_operator, packet_of, schema, symint_hint

__all__ = ["FORMULAS", "Shape", "attention_flops", "node_flops", "ring_flops"]

Shape = tuple[int, ...]
#: The shape of a tensor node, as numbers; None for anything else.
ShapeOf = Callable[[Any], Shape | None]


def attention_flops(q: Shape, k: Shape, v: Shape, *, causal: bool) -> int:
    """``[..., m, d], [..., n, d], [..., n, e]``: two products over the allowed pairs of queries and keys."""
    m, n = q[-2], k[-2]
    pairs = m * n
    if causal:  # the flag means the upper left corner: query i sees keys 0..i
        full = min(m, n)
        pairs = full * (full + 1) // 2 + (m - full) * n
    return 2 * _numel(q[:-2]) * pairs * (q[-1] + v[-1])


def _numel(shape: Shape) -> int:
    product = 1
    for n in shape:
        product *= n
    return product


def _linear(call: Call, shape_of: ShapeOf) -> int:
    x, weight = shape_of(call["input"]), shape_of(call["weight"])
    assert x is not None
    assert weight is not None
    return 2 * _numel(x) * (weight[0] if len(weight) > 1 else 1)


def _matmul(call: Call, shape_of: ShapeOf) -> int:
    a, out = shape_of(call["self"]), shape_of(call.node)
    assert a is not None
    assert out is not None
    return 2 * _numel(out) * a[-1]


def _attention(call: Call, shape_of: ShapeOf) -> int:
    q, k, v = (shape_of(call[name]) for name in ("query", "key", "value"))
    assert q is not None
    assert k is not None
    assert v is not None
    return attention_flops(q, k, v, causal=bool(call.get("is_causal")))


def _convolution(call: Call, shape_of: ShapeOf) -> int:
    """The weight is ``[out, in / groups, *kernel]``: every output element is a sum over all but its first dimension."""
    weight, out = shape_of(call["weight"]), shape_of(call.node)
    assert weight is not None
    assert out is not None
    return 2 * _numel(out) * _numel(weight[1:])


def _transposed_convolution(call: Call, shape_of: ShapeOf) -> int:
    weight, x = shape_of(call["weight"]), shape_of(call["input"])
    assert weight is not None
    assert x is not None
    return 2 * _numel(x) * _numel(weight[1:])


def _einsum(call: Call, shape_of: ShapeOf) -> int:
    """Twice the product of all sizes: what contracting all operands at once costs, for two operands what it costs."""
    operands = call["tensors"]
    letters: dict[str, int] = {}
    left = call["equation"].replace(" ", "").partition("->")[0].split(",")
    for subscripts, operand in zip(left, operands, strict=True):
        shape = shape_of(operand)
        assert shape is not None
        hidden = len(shape) - len(subscripts.replace("...", ""))
        expanded = subscripts.replace("...", "".join(chr(0x3B1 + i) for i in range(hidden)))
        for letter, n in zip(expanded, shape, strict=True):
            letters[letter] = max(letters.get(letter, 1), n)
    return 2 * _numel(tuple(letters.values())) if len(operands) > 1 else 0


def ring_flops(node: Node, shape_of: ShapeOf, rank: int) -> int:
    """The blocks that ``rank`` computes in an ``fxsp.ring_attention``; a causal ring gives each rank others."""
    call = Call(node)
    q, v = shape_of(call["q"]), shape_of(call["v"])
    assert q is not None
    assert v is not None
    queries, keys = (
        (
            tuple(map(_length, call[f"{x}_lengths"])),
            tuple(call[f"{x}_whole"]),
            tuple(call[f"{x}_head_tail"]),
            tuple(map(_length, call[f"{x}_units"])),
        )
        for x in "qk"
    )
    ulysses, size = call["ulysses"], call["size"]
    window = None if call["window"] is None else _length(call["window"])
    pairs = pairs_of(queries, keys, bool(call["causal"]), ulysses, size // ulysses, rank // ulysses, window)
    return 2 * q[0] * q[1] * pairs * (q[-1] + v[-1])


def _length(size: Any) -> int:
    """A length among the arguments; one that a node computes counts as the hint of its value."""
    return symint_hint(facts(size).local) if isinstance(size, Node) else int(size)


def _merged(call: Call, shape_of: ShapeOf) -> int:
    """Whole queries, and the keys of a rank, pads too."""
    q, k, v = (shape_of(call[name]) for name in "qkv")
    assert q is not None
    assert k is not None
    assert v is not None
    return attention_flops(q, k, v, causal=False)


def _busiest_of_a_ring(call: Call, shape_of: ShapeOf) -> int:
    return ring_flops(call.node, shape_of, call["size"] - 1)


#: Name of an operator -> its count; entries may be added for operators of one's own.
FORMULAS: dict[str, Callable[[Call, ShapeOf], int]] = {
    "aten::linear": _linear,
    "aten::matmul": _matmul,
    "aten::einsum": _einsum,
    "aten::scaled_dot_product_attention": _attention,
    "fxsp_local::dropped_attention": _attention,
    "fxsp_local::banded_attention": _attention,
    "fxsp::merged_attention": _merged,
    "fxsp::ring_attention": _busiest_of_a_ring,
    **{f"aten::conv{n}d": _convolution for n in (1, 2, 3)},
    **{f"aten::conv_transpose{n}d": _transposed_convolution for n in (1, 2, 3)},
}


def node_flops(node: Node, shape_of: ShapeOf) -> int:
    """Floating-point operations of one node; 0 for what moves or maps elements."""
    if node.op != "call_function" or not is_operator(node.target):
        return 0
    formula = FORMULAS.get(schema(node.target).name)
    if formula is not None:
        return formula(Call(node), shape_of)
    known: Mapping[Any, Any] = flop_registry
    count = known.get(packet_of(node.target))
    if count is None:
        return 0
    stand_ins = {
        n: torch.empty(shape, device="meta") for n in node.all_input_nodes if (shape := shape_of(n)) is not None
    }
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: stand_ins.get(n, n))
    return int(count(*args, **kwargs, out_val=torch.empty(shape_of(node) or (), device="meta")))
