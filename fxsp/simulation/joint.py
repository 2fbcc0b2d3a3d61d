"""Forward and backward of one rank as one graph, to be simulated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fxsp import torch_internals
from fxsp.torch_internals import is_wrapper_subclass

__all__ = ["detached", "differentiate", "joint_graph", "run_on_leaves"]


def differentiate(
    outputs: Sequence[Any], grads: Sequence[Tensor | None], wanted: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """The gradients of ``wanted``; ``grads`` are those of the outputs.  None: there is no gradient."""
    pairs = [
        (x, g) for x, g in zip(outputs, grads, strict=True) if g is not None and getattr(x, "requires_grad", False)
    ]
    if not pairs or not wanted:
        return [None] * len(wanted)
    return torch.autograd.grad([x for x, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)


def run_on_leaves(run: Callable[..., Any], args: Sequence[Any], inputs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """What ``run`` gives for ``args``, flat, and the leaves behind it: those require grad that do so in ``inputs``."""
    requires_grad = [isinstance(x, Tensor) and x.requires_grad for x in inputs]
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() if need else x for x, need in zip(args, requires_grad, strict=True)]
        # In-place operators of the program must not meet leaves.
        values = [
            x.clone() if need and not is_wrapper_subclass(x) else x
            for x, need in zip(leaves, requires_grad, strict=True)
        ]
        return tree_leaves(run(*values)), leaves


def joint_graph(
    gm: torch.fx.GraphModule, inputs: Sequence[Any], grad_outputs: Sequence[Tensor | None]
) -> torch.fx.GraphModule:
    """One rank's forward and backward as a graph ``(*inputs, *grad_outputs) -> (*outputs, *input_grads)``.

    It is what autograd does on a rank: ``gm`` is run and differentiated as it stands, and fxsp operators stay opaque
    nodes whose derivatives are their registered ones.  Traced on fakes: no process group is needed.  Gradients are
    those of the inputs that require grad; one that does not exist is a tensor of zeros.
    """
    count = len(inputs)

    def run(*values: Any) -> Any:
        for subclass in filter(is_wrapper_subclass, values):
            torch_internals.record_inner(subclass)
        return torch.fx.Interpreter(gm).run(*values)

    def joint(*args: Any) -> tuple[Any, ...]:
        outputs, leaves = run_on_leaves(run, args[:count], inputs)
        wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        grads = differentiate(outputs, args[count:], wanted)
        filled = [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, grads, strict=True)]
        return (*map(detached, outputs), *filled)

    return torch_internals.trace_on_fakes(joint, [*map(detached, inputs), *grad_outputs])


def detached(value: Any) -> Any:
    """A tensor without its history; anything else as it is."""
    return value.detach() if isinstance(value, Tensor) else value
