"""Activation checkpoints: the tags by which AOTAutograd's partitioner saves or recomputes a value.

*normalize* traces the body of a checkpoint in place.  Its nodes get ``meta["recompute"]`` and ``meta["ac_graph_id"]``.
A selective checkpoint has a policy that speaks of operators below autograd (``addmm``); an operator here (``linear``)
is saved if the policy saves one of those that it consists of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from fxsp import torch_internals

__all__ = ["tag_checkpoint"]


def tag_checkpoint(body: torch.fx.GraphModule, nodes: Iterable[torch.fx.Node], number: int) -> None:
    """Tag the nodes that were traced for ``body``; ``number`` increases in program order.  Outer checkpoints win."""
    policy = torch_internals.checkpoint_policy(body)
    for node in nodes:
        if node.op != "call_function":
            continue
        node.meta.update(torch_internals.checkpoint_tags(number))
        if policy is not None and torch_internals.is_operator(node.target):
            saved = _saved(policy, node)
            if saved is not None:
                node.meta["recompute"] = saved


def _saved(policy: Callable[..., Any], node: torch.fx.Node) -> Any:
    """The policy's tag if it saves one of the operators that a node consists of."""
    answers: list[Any] = []
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    assert callable(node.target)
    with (
        torch_internals.untraced(),
        torch_internals.listen(lambda op, args, kwargs, result: answers.append(policy(result, op, *args, **kwargs))),
    ):
        node.target(*args, **kwargs)
    return next((answer for answer in answers if answer is not None), None)
