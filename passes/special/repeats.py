"""Values that repeat others: what is gathered is the value that is repeated.

``repeat_kv`` of transformers writes each key head several times, for its query heads (as shown in
:mod:`fxsp.passes.attention.repeat_kv`).  Gathered as they stand, elements would travel as often.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Node

from fxsp.passes.graph import facts, shape_of, tensor_nodes
from fxsp.passes.rules.families import family
from fxsp.types import Shard, product, quotient

__all__ = ["repeated", "repeats_of"]

#: Of one operand; the same elements, some of them several times.
_VIEWS = family("view", "copy", "repeat_interleave")


def repeats_of(node: Node, held: Callable[[Node], bool] = lambda node: False) -> list[Node]:
    """``[node, ..., x]``: each is a view of the next, and ``x`` is split, and smaller or ``held``; else ``[node]``.

    ``held`` says which values are whole anyway: nothing is sent for their views.
    """
    chain, best = [node], 1
    while node.target in _VIEWS:
        operands = list(tensor_nodes((node.args, list(node.kwargs.values()))))
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
