"""What makes q, k and v of the projections: the bias, norms and rotary embeddings in front of an exchange.

They are not kernels of ours: Inductor fuses elementwise operators and norms into what reads them, and so into the pack
of q, k, v where that is left to it (see :mod:`fxsp.passes.accounting.device_memory`).  Here they are found and named,
for that decision and for the report.

A producer is an operator between a product of matrices (``linear``, ``matmul``, ``einsum``, a convolution) and the
attention.  A bias is one only if it is added by an operator of its own: that of ``linear`` is part of the product.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from fxsp.passes.graph import Call, facts, global_value, reachable
from fxsp.passes.rules.families import family
from fxsp.passes.work import has_work
from fxsp.torch_internals import is_operator, is_pointwise, schema
from fxsp.types import Shard

__all__ = ["producers_of"]

aten = torch.ops.aten

#: A norm that is spelled out has one statistic and one root.
_NORMS, _MEANS, _ROOTS = family("normalizes"), family("statistic"), family("root")
_CASTS, _JOINS = family("cast"), family("join")
_MOVES = family("view", "moves") | {operator.getitem}
#: What turns pairs of neighbours, beside slices with a step; halves are turned by ``cat``.
_PAIRS, _TURNS = family("pairs"), family("turns_pair")


def producers_of(operands: Mapping[str, Node]) -> tuple[str, ...]:
    """``("q, k: rms_norm, rotary (half-split)",)`` for local operands by name; empty: products, and views of them."""
    found: dict[tuple[str, ...], list[str]] = {}
    for name, node in operands.items():
        made = _names(_between(node))
        if made:
            found.setdefault(made, []).append(name)
    return tuple(f"{', '.join(sorted(names, key='qkv'.index))}: {', '.join(made)}" for made, names in found.items())


def _between(node: Node) -> list[Node]:
    """The operators from the last products to ``node``, itself included, in the order of the graph."""

    def before(x: Node) -> Iterable[Node]:
        types = ((n, facts(n).type) for n in x.all_input_nodes)
        return [n for n, t in types if (t is None or isinstance(t, (Shard, tuple))) and _passes(n)]

    seen = reachable(filter(_passes, [node]), before)
    # What no product leads to (a rotary table) is read by a producer, and is none.
    data: dict[Node, None] = {}
    for x in sorted(seen):
        if any(has_work(n) or n in data for n in x.all_input_nodes):
            data[x] = None
    return list(data)


def _passes(node: Node) -> bool:
    """Whether what is before ``node`` is still on the way to the attention."""
    if node.op != "call_function" or has_work(node):
        return False
    if any(node.target in kind for kind in (_NORMS, _MEANS, _CASTS, _JOINS, _MOVES)):
        return True
    return is_operator(node.target) and is_pointwise(node.target)


def _names(nodes: Sequence[Node]) -> tuple[str, ...]:
    """What these operators are, in the words of models."""
    targets = {node.target for node in nodes}
    names = list(dict.fromkeys(schema(node.target).name.partition("::")[2] for node in nodes if node.target in _NORMS))
    if not names and targets & _MEANS and targets & _ROOTS:
        names.append("norm")
    joins = [node for node in nodes if node.target in _JOINS]
    pairs = bool(targets & _PAIRS) or any(map(_steps, nodes))
    if targets & _TURNS and aten.mul.Tensor in targets and (joins or pairs):
        names.append("rotary (interleaved)" if pairs else "rotary (half-split)")
    elif joins:
        names.append("cat")
    if any(node.target is aten.cat.default and _of_tokens(node) for node in joins) and "cat" not in names:
        names.append("cat")
    if not names and any(_computes(node) for node in nodes):
        names.append("elementwise")
    return tuple(names)


def _steps(node: Node) -> bool:
    """Whether a slice takes, or writes, every other element."""
    return is_operator(node.target) and Call(node).get("step") == 2


def _of_tokens(node: Node) -> bool:
    """Whether a ``cat`` puts tokens of segments side by side."""
    type_ = facts(node).type
    value, dim = facts(node).whole, node.args[1] if len(node.args) > 1 else 0
    if not isinstance(type_, Shard) or not isinstance(value, Tensor) or not isinstance(dim, int):
        return False
    return bool(dim % value.dim() == type_.dim)


def _computes(node: Node) -> bool:
    """Whether a node makes other numbers; a cast to what a value is does not."""
    if node.target in _CASTS:
        values = [global_value(n) for n in (node, *node.all_input_nodes[:1])]
        return len({getattr(value, "dtype", None) for value in values}) > 1
    return is_operator(node.target) and is_pointwise(node.target)
