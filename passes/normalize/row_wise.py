"""Operators on a frozen tensor subclass, in training: do they treat every row alone, forward and backward?

What autograd differentiates there is the operator on the subclass (see :mod:`fxsp.passes.normalize.subclasses`), so
the graph must have that, and not what it is made of.  Whether it may run on some of the rows is seen from what it is
made of, traced with its gradient::

    %rows = annotate(%x, shard, 1)
    %t = aten.t(%qdata)
    ...
    return (%out, %gradient)

Types are propagated through that.  If nothing has to be gathered or summed, and both results are rows, the operator may
have the rule that it has for plain tensors.  If not (activations that are quantized by the maximum over all tokens), it
is an island.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from fxsp import torch_internals
from fxsp.kernels.ops import fxsp_ops
from fxsp.passes.base import Program
from fxsp.passes.graph import Call, facts, type_of
from fxsp.passes.propagate.propagate import Propagate
from fxsp.passes.rules.families import family
from fxsp.torch_internals import is_wrapper_subclass
from fxsp.types import Ranks, Shard

__all__ = ["is_row_wise"]

aten = torch.ops.aten


def is_row_wise(node: Node) -> bool:
    """Whether an operator on ``x`` and a frozen subclass, and its gradient, treat every row of ``x`` alone."""
    x, *others = [n.meta["val"] for n in node.all_input_nodes]
    if node.target not in family("row_product") or node.kwargs or node.args[0] is not node.all_input_nodes[0]:
        return False
    if (
        is_wrapper_subclass(x)
        or not x.is_floating_point()
        or any(is_wrapper_subclass(v) and v.requires_grad for v in others)
    ):
        return False
    op: Any = node.target

    def both(x: Any, gradient: Any, *others: Any) -> list[Any]:
        left = iter(others)
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            out = op(leaf, *(next(left) if isinstance(a, Node) else a for a in node.args[1:]))
        if not out.requires_grad:
            return [out]
        return [out.detach(), *torch.autograd.grad(out, leaf, gradient)]

    others = [v if is_wrapper_subclass(v) else v.detach() for v in others]
    gm = torch_internals.trace_opened(both, [x.detach(), node.meta["val"].detach(), *others])
    return all(_keeps_rows(gm, dim) for dim in range(x.ndim - 1))


def _keeps_rows(gm: torch.fx.GraphModule, dim: int) -> bool:
    """Whether rows along ``dim`` of the first two inputs stay rows, to the results."""
    graph = torch.fx.Graph()
    nodes: dict[Node, Node] = {}
    for i, node in enumerate(gm.graph.nodes):
        nodes[node] = new = graph.node_copy(node, nodes.__getitem__)
        if i < 2:
            nodes[node] = graph.call_function(fxsp_ops.annotate.default, (new, "shard", dim, -1, "rows"))
            nodes[node].meta["val"] = node.meta["val"]
    Propagate().apply(Program(torch.fx.GraphModule(gm, graph), Ranks(0, 2, "rows")))
    for node in graph.nodes:
        decision = facts(node).decision
        if decision is not None:
            for operand, needed in zip(Call(node).operands, decision.operands, strict=True):
                if isinstance(type_of(operand), Shard) and not isinstance(needed, Shard):
                    return False
    return all(_is_rows(facts(n).type, dim) for n in graph.output_node().all_input_nodes)


def _is_rows(type_: Any, dim: int) -> bool:
    return isinstance(type_, Shard) and type_.plain and type_.dim == dim
