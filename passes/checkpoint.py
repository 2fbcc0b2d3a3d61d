"""Activation checkpoints: the tags by which AOTAutograd's partitioner saves or recomputes a value.

*normalize* traces the body of a checkpoint in place.  Its nodes get ``meta["recompute"]`` and ``meta["ac_graph_id"]``.
A selective checkpoint has a policy that speaks of operators below autograd (``addmm``); an operator here (``linear``)
is saved if the policy saves one of those that it consists of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
            listener = _Policy(policy)
            assert callable(node.target)
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            with torch_internals.untraced(), listener:
                node.target(*args, **kwargs)
            if listener.saved is not None:
                node.meta["recompute"] = listener.saved


class _Policy(TorchDispatchMode):
    """Asks a policy about each operator that is called."""

    def __init__(self, policy: Callable[..., Any]) -> None:
        super().__init__()
        self.policy = policy
        self.saved: Any = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.saved = self.saved or self.policy(result, func, *args, **(kwargs or {}))
        return result
