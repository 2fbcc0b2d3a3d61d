"""What *functionalize* knows of memory: who owns it, who sees it, and which values share it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from fxsp import torch_internals
from fxsp.passes.functionalize.views import View
from fxsp.passes.normalize.retrace import is_annotation
from fxsp.types import as_length, same_length

__all__ = ["Storage", "Tensor", "all_keys", "keys_of", "same_strides"]


@dataclass(eq=False)
class Storage:
    """A tensor that owns memory, and what it holds now."""

    root: Node
    value: Node
    #: Writes to slices that are not part of ``value`` yet.
    pending: list[tuple[View, Node]] = field(default_factory=list)
    version: int = 0
    #: How many tensors see it.
    tensors: int = 0
    #: When it was first written to, among all writes of the graph.
    first: int = 0
    #: The last operator that wrote to it.
    writer: Node | None = None


@dataclass(eq=False)
class Tensor:
    """What a Python variable refers to: a storage seen through views."""

    storage: Storage
    chain: tuple[View, ...]
    #: A node with its facts (shape, strides), for messages and comparisons.
    node: Node
    #: The version of the storage that ``seen`` shows; -1: nothing yet.
    version: int = -1
    seen: Node | None = None


def all_keys(graph: torch.fx.Graph) -> dict[Node, set[int]]:
    """The storages of each node's value.  An annotation is a copy as an operator, but it stands for its argument."""
    stands_for: dict[int, int] = {}
    keys: dict[Node, set[int]] = {}
    for node in graph.nodes:
        if is_annotation(node.target):
            (whole,) = keys[node.args[0]]
            stands_for.update(dict.fromkeys(keys_of(node), whole))
        keys[node] = {stands_for.get(key, key) for key in keys_of(node)}
    return keys


def keys_of(node: Node) -> set[int]:
    """The storages of a node's present value."""
    tensors = [v for v in tree_leaves(node.meta.get("val")) if isinstance(v, torch.Tensor)]
    return {torch_internals.storage_key(v) for v in tensors if v.layout == torch.strided}


def same_strides(a: Node, b: Node) -> bool:
    """Whether two values of the same shape lie in memory in the same way."""
    x, y = a.meta["val"], b.meta["val"]
    return x.ndim == y.ndim and all(
        same_length(as_length(p), as_length(q))
        for size, p, q in zip(x.shape, x.stride(), y.stride(), strict=True)
        if not isinstance(size, int) or size > 1
    )
