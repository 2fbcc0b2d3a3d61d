"""Values and gradients of a partitioned graph on simulated ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxsp.simulation.joint import joint_graph
from fxsp.simulation.machine import simulate

__all__ = ["simulate_with_grads"]


def simulate_with_grads(
    gm: torch.fx.GraphModule,
    size: int,
    inputs: Sequence[Any],
    grad_outputs: Sequence[torch.Tensor | None] | None = None,
) -> tuple[list[list[Any]], list[list[torch.Tensor]]]:
    """Forward and backward of every rank: ``(outputs[rank], input_grads[rank])``.

    ``grad_outputs`` are the global gradients of the flattened outputs (ones if None; None for one that has no
    gradient), the same on every rank, as the gradient of a whole value is.  ``input_grads`` has one tensor for each
    input that requires grad, in order.  To call it repeatedly for one graph, keep
    :func:`~fxsp.simulation.joint.joint_graph` and :func:`simulate` that.
    """
    outputs = simulate(gm, size, inputs)
    if grad_outputs is None:
        grad_outputs = [torch.ones_like(x) if isinstance(x, torch.Tensor) else None for x in outputs[0]]
    joint = joint_graph(gm, inputs, grad_outputs)
    results = simulate(joint, size, [*inputs, *grad_outputs])
    count = len(outputs[0])
    return [r[:count] for r in results], [r[count:] for r in results]
