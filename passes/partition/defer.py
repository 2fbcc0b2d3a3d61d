"""Summands for an outer reducer that takes the mean over the ranks: each counts as often as there are ranks.

Input, of two ranks, whose gradient of ``w`` is this rank's summand (``grad_reduce="defer"``)::

    %w : placeholder[target=w]
    %linear : call_function[target=aten.linear.default](args = (%shard, %w))

Output::

    %w : placeholder[target=w]
    %scale_grad : call_function[target=fxsp.scale_grad.default](args = (%w, 2))
    %linear : call_function[target=aten.linear.default](args = (%shard, %scale_grad))

Afterwards the mean of a parameter's gradients over the ranks is its gradient, as it is of gradients that are whole on
every rank.  It is the last thing that is done to a graph, after the pipeline.
"""

from __future__ import annotations

from torch.fx import GraphModule

from fxsp.kernels.ops import fxsp_ops
from fxsp.passes.functionalize.inplace import written_arguments
from fxsp.passes.graph import facts, global_value, mark

__all__ = ["scale_summands"]


def scale_summands(gm: GraphModule, size: int) -> None:
    """Multiply the gradients of parameters by ``size``, in place."""
    inputs = gm.graph.find_nodes(op="placeholder")
    for node in inputs:
        if not facts(node).is_parameter or not getattr(global_value(node), "requires_grad", False):
            continue
        # What the graph returns, or writes to, is the parameter itself.
        users = [user for user in node.users if user.op != "output" and node not in written_arguments(user)]
        if not users:
            continue
        with gm.graph.inserting_after(inputs[-1]):
            new = gm.graph.call_function(fxsp_ops.scale_grad.default, (node, size))
        new.meta.update(node.meta)
        mark(new, is_parameter=False)
        for user in users:
            user.replace_input_with(node, new)
    gm.graph.lint()
    gm.recompile()
