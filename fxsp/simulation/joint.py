"""Forward and backward of one rank as one graph, to be simulated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxsp import torch_internals
from fxsp.torch_internals import is_wrapper_subclass

__all__ = ["joint_graph"]


def joint_graph(
    gm: torch.fx.GraphModule, inputs: Sequence[Any], grad_outputs: Sequence[torch.Tensor | None]
) -> torch.fx.GraphModule:
    """One rank's forward and backward as a graph ``(*inputs, *grad_outputs) -> (*outputs, *input_grads)``.

    It is what autograd does on a rank: ``gm`` is run and differentiated as it stands, and fxsp operators stay opaque
    nodes whose derivatives are their registered ones.  Traced on fakes: no process group is needed.  Gradients are
    those of the inputs that require grad; one that does not exist is a tensor of zeros.
    """
    requires_grad = [isinstance(x, torch.Tensor) and x.requires_grad for x in inputs]
    count = len(inputs)

    def joint(*args: Any) -> tuple[Any, ...]:
        with torch.enable_grad():
            leaves = [
                x.detach().requires_grad_() if need else x for x, need in zip(args[:count], requires_grad, strict=True)
            ]
            # In-place operators of the program must not meet leaves.
            values = [
                x.clone() if need and not is_wrapper_subclass(x) else x
                for x, need in zip(leaves, requires_grad, strict=True)
            ]
            for subclass in filter(is_wrapper_subclass, values):
                torch_internals.record_inner(subclass)
            outputs = pytree.tree_leaves(torch.fx.Interpreter(gm).run(*values))
        pairs = [
            (out, grad)
            for out, grad in zip(outputs, args[count:], strict=True)
            if grad is not None and isinstance(out, torch.Tensor) and out.requires_grad
        ]
        wanted = [x for x, need in zip(leaves, requires_grad, strict=True) if need]
        grads: Sequence[torch.Tensor | None] = [None] * len(wanted)
        if pairs and wanted:
            grads = torch.autograd.grad([p[0] for p in pairs], wanted, [p[1] for p in pairs], allow_unused=True)
        filled = [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, grads, strict=True)]
        detached = [out.detach() if isinstance(out, torch.Tensor) else out for out in outputs]
        return (*detached, *filled)

    examples = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
    return torch_internals.trace_on_fakes(joint, [*examples, *grad_outputs])
