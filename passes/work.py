"""How much a call does: which operators are worth running on shards for their own sake, and their operations."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

from torch.fx import Node

from fxsp.cost.flops import Shape, attention_flops, node_flops
from fxsp.passes.attention.operators import ATTENTION_OPS
from fxsp.passes.graph import Call, facts, tensor_nodes
from fxsp.passes.rules.families import family
from fxsp.passes.rules.table import RULES
from fxsp.passes.rules.whole import WHOLE
from fxsp.torch_internals import is_operator, is_pointwise, schema

__all__ = ["has_work", "operands_of", "work_of"]


def has_work(node: Node) -> bool:
    """Whether a call does so much per element that running it on every rank costs more than gathering its result."""
    if node.target in ATTENTION_OPS:
        return True
    return node.target in family("work")


def work_of(node: Node, shape_of: Callable[[Any], Shape | None]) -> int:
    """Floating-point operations, known or guessed; 0 for what moves or maps elements."""
    if node.target in ATTENTION_OPS and not (known := node_flops(node, shape_of)):
        op, call = ATTENTION_OPS[node.target], Call(node)
        shapes = [shape_of(call[name]) for name in (op.query, op.key, op.value)]
        if all(shape is not None and len(shape) == 4 for shape in shapes):
            q, k, v = (tuple(op.laid(shape)) for shape in shapes)  # type: ignore[arg-type]
            return attention_flops(q, k, v, causal=op.causal_in(call))  # type: ignore[arg-type]
        return known
    return node_flops(node, shape_of) or (_guessed(node, shape_of) if _is_unknown(node) else 0)


def _is_unknown(node: Node) -> bool:
    if node.target is operator.getitem or "val" not in node.meta:
        return False
    if not is_operator(node.target):
        return bool(facts(node).island)
    name = schema(node.target).name
    if node.target in RULES or is_pointwise(node.target) or name.startswith(("fxsp::", "fxsp_local::")):
        return False
    if node.target in family("cat", "slice", "split"):
        return False
    views = any(result.alias_info is not None for result in schema(node.target).returns)
    return not views and not {name, f"{name}.{schema(node.target).overload_name}"} & WHOLE.keys()


def _guessed(node: Node, shape_of: Callable[[Any], Shape | None]) -> int:
    shapes = [shape for n in operands_of(node) if (shape := shape_of(n))]
    return max((2 * math.prod(shape) * shape[-1] for shape in shapes), default=0)


def operands_of(node: Node) -> list[Node]:
    """The tensors that a call reads."""
    return tensor_nodes((node.args, node.kwargs))
