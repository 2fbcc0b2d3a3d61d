"""Results of a normalized graph that lie in memory otherwise than Dynamo recorded.

Which kernel an attention gets, and so how its result lies in memory, may differ between the two traces (a
``sdpa_kernel`` context around it is no part of an operator).  Where nothing but the strides differs, the result is laid
in memory as recorded::

    return %sdpa            %permute = permute(%sdpa, [0, 1, 2, 3])
                            %contiguous = contiguous(%permute)
                            return %contiguous
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_flatten, tree_unflatten

from fxsp.lengths import hint
from fxsp.passes.builder import Writer
from fxsp.types import as_length, product, same_length

__all__ = ["restride"]

aten = torch.ops.aten


def restride(
    gm: GraphModule, mode: Any, index: int, want: torch.Tensor, same: Callable[[Any, Any], bool]
) -> torch.Tensor | None:
    """Lay output ``index`` of ``gm`` in memory as ``want`` says, in place; its new value, or None if that cannot be.

    ``same(a, b)`` compares strides.
    """
    shape, strides = ([as_length(n) for n in facts] for facts in (want.shape, want.stride()))
    order = sorted(range(len(shape)), key=lambda d: (-hint(strides[d]), d))
    if not _fills_memory([(shape[d], strides[d]) for d in order]):
        return None
    output = gm.graph.output_node()
    leaves, spec = tree_flatten(output.args[0])
    node = leaves[index]
    if not isinstance(node, Node):
        return None
    writer = Writer(gm.graph, mode)
    writer.at(output)
    with writer.on_behalf_of(node):
        new = writer.call(aten.clone.default, writer.permuted(node, order), memory_format=torch.contiguous_format)
        new = writer.permuted(new, [order.index(d) for d in range(len(order))])
    if not same(tuple(new.meta["val"].stride()), tuple(want.stride())):
        return None
    leaves[index] = new
    output.args = (tree_unflatten(leaves, spec),)
    value = new.meta["val"]
    assert isinstance(value, torch.Tensor)
    return value


def _fills_memory(dims: list[tuple[Any, Any]]) -> bool:
    """Whether dimensions ``(size, stride)``, outermost first, are those of a dense tensor."""
    step: Any = 1
    for size, stride in reversed(dims):
        if not same_length(size, 1) and not same_length(stride, step):
            return False
        step = product((step, size))
    return True
