"""Key/value heads that are repeated for the query heads: they are exchanged as they are, and repeated afterwards.

Models with grouped queries often spell them out (``repeat_kv`` of transformers)::

    %unsqueeze = unsqueeze(%k, 2)                       [B, 2, 1, S, D]
    %expand    = expand(%unsqueeze, [B, 2, 4, S, D])
    %reshape   = reshape(%expand, [B, 8, S, D])
    %sdpa      = scaled_dot_product_attention(%q, %reshape, ...)

which would move each key and value four times.  The same question is asked of the global graph, where the method is
chosen, and of the local one, where the exchange is written.

Of any value that repeats others (:func:`repeats_of`) what is gathered is the value that is repeated.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Node

from fxsp.passes.builder import Builder
from fxsp.passes.graph import Call, facts, global_value, shape_of, tensor_nodes
from fxsp.passes.rules.families import family
from fxsp.types import Length, Shard, as_length, product, quotient, same_length

__all__ = ["chain_of", "repeat_heads", "repeated", "repeated_heads", "repeats_of"]

aten = torch.ops.aten
#: Of one operand; the same elements, some of them several times.
_VIEWS = family("view", "copy", "repeat_interleave")


def repeated_heads(node: Node) -> tuple[Node, int]:
    """``(x, n)``: ``node`` is ``x``, ``[B, H, S, D]``, with each head ``n`` times in a row; ``(node, 1)`` if not so."""
    *_, last = chain_of(node)
    if last is node:
        return node, 1
    heads, all_heads = _shape(last)[1], _shape(node)[1]
    assert isinstance(heads, int)
    assert isinstance(all_heads, int)
    return last, all_heads // heads


def chain_of(node: Node) -> list[Node]:
    """``node``, the views between, and the tensor whose heads it repeats; ``node`` alone if it repeats none."""
    end = _skip_copies(node)
    chain = [node] if end is node else [node, end]
    if end.target in family("repeat_interleave"):
        call, x = Call(end), _argument(end)
        known = len(_shape(x)) == 4 and isinstance(call["repeats"], int) and call["dim"] in (1, -3)
        return [*chain, x] if known else [node]
    expanded = _skip_copies(_argument(end)) if end.target in family("reshape") else end
    if end is expanded or expanded.target not in family("expand"):
        return [node]
    grouped = _argument(expanded)
    if grouped.target not in family("reshape"):
        return [node]
    x = _argument(grouped)
    shapes = [_shape(n) for n in (x, grouped, expanded, node)]
    if [len(s) for s in shapes] != [4, 5, 5, 4]:
        return [node]
    (batch, heads, tokens, width), times = shapes[0], shapes[2][2]
    if not all(isinstance(n, int) for n in (heads, times, shapes[3][1])):
        return [node]
    found = [n for shape in shapes[1:] for n in shape]
    wanted = [batch, heads, 1, tokens, width, batch, heads, times, tokens, width, batch, heads * times, tokens, width]
    return [*chain, expanded, grouped, x] if all(map(same_length, found, wanted)) else [node]


def repeat_heads(build: Builder, x: Node, times: int) -> Node:
    """``[B, H, S, D]`` -> ``[B, H * times, S, D]``, each head ``times`` times in a row."""
    if times == 1:
        return x
    grouped = build.call(aten.unsqueeze.default, x, 2)
    expanded = build.call(aten.expand.default, grouped, [-1, -1, times, -1, -1])
    return build.call(aten.flatten.using_ints, expanded, 1, 2)


def _skip_copies(node: Node) -> Node:
    while node.target in family("copy"):
        node = _argument(node)
    return node


def _argument(node: Node) -> Node:
    first = node.args[0]
    assert isinstance(first, Node)
    return first


def _shape(node: Node) -> tuple[Length, ...]:
    """The global shape; of a node without one (an input of the local graph), nothing."""
    value = global_value(node)
    return tuple(as_length(n) for n in value.shape) if isinstance(value, torch.Tensor) else ()


def repeats_of(node: Node, held: Callable[[Node], bool] = lambda node: False) -> list[Node]:
    """``[node, ..., x]``: each is a view of the next, and ``x`` is split, and smaller or ``held``; else ``[node]``.

    ``held`` says which values are whole anyway: nothing is sent for their views.
    """
    chain, best = [node], 1
    while node.target in _VIEWS:
        operands = tensor_nodes((node.args, node.kwargs))
        if len(operands) != 1 or not isinstance(facts(operands[0]).type, Shard):
            break
        (node,) = operands
        chain.append(node)
        if _times(chain[best - 1], node) is not None or held(node):
            best = len(chain)
    return chain[:best]


def repeated(node: Node) -> tuple[Node, int]:
    """``(x, n)``: a value repeats the elements of ``x`` ``n`` times; ``(node, 1)`` if it repeats none."""
    source = repeats_of(node)[-1]
    times = _times(node, source)
    return (source, times) if source is not node and times is not None else (node, 1)


def _times(node: Node, source: Node) -> int | None:
    """How much larger a value is than ``source``, where that is known and more than once."""
    times = quotient(product(shape_of(node)), product(shape_of(source)))
    return times if isinstance(times, int) and times > 1 else None
