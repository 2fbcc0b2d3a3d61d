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

from fxsp.kernels.lowering import known_dense
from fxsp.passes.builder import Writer, memory_order

__all__ = ["restride"]


def restride(
    gm: GraphModule, mode: Any, index: int, want: torch.Tensor, same: Callable[[Any, Any], bool]
) -> torch.Tensor | None:
    """Lay output ``index`` of ``gm`` in memory as ``want`` says, in place; its new value, or None if that cannot be.

    ``same(a, b)`` compares strides.
    """
    if not known_dense(want):
        return None
    output = gm.graph.output_node()
    leaves, spec = tree_flatten(output.args[0])
    node = leaves[index]
    if not isinstance(node, Node):
        return None
    writer = Writer(gm.graph, mode)
    writer.at(output)
    with writer.on_behalf_of(node):
        new = writer.dense(node, memory_order(want))
    if not same(tuple(new.meta["val"].stride()), tuple(want.stride())):
        return None
    leaves[index] = new
    output.args = (tree_unflatten(leaves, spec),)
    value = new.meta["val"]
    assert isinstance(value, torch.Tensor)
    return value
