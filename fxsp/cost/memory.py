"""Activation memory of a graph, by following which values live: an estimate, the same way for one device and a rank.

Counted are the values that the graph computes (inputs and parameters are not), in the order of the graph; a view shares
the memory of what it looks at, and a value dies with its last use.  In training every value that is no view is kept for
the backward pass: an upper bound, since what autograd saves, and what a compiler computes again, is decided later.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

from fxsp.torch_internals import storage_key

__all__ = ["bytes_of", "peak_bytes"]


def bytes_of(value: torch.Tensor, number: Callable[[Any], int]) -> int:
    """The bytes of a tensor; ``number`` reads a size."""
    return prod(map(number, value.shape)) * value.element_size()


def peak_bytes(graph: Graph, value_of: Callable[[Node], Any], number: Callable[[Any], int], *, training: bool) -> int:
    """The largest sum of bytes that live at once; ``value_of`` has a node's fake value, ``number`` reads a size."""
    nodes: list[Node] = list(graph.nodes)
    index = {node: i for i, node in enumerate(nodes)}
    inputs: set[int] = set()
    size_of: dict[int, int] = {}
    last: dict[int, int] = {}
    keys: list[list[int]] = []
    for i, node in enumerate(nodes):
        own = []
        for value in tree_leaves(value_of(node)) if node.op != "output" else ():
            if isinstance(value, torch.Tensor):
                storage = storage_key(value)
                own.append(storage)
                if node.op in ("placeholder", "get_attr"):
                    inputs.add(storage)
                size_of[storage] = max(size_of.get(storage, 0), bytes_of(value, number))
                last[storage] = i
        keys.append(own)
        for used in node.all_input_nodes:
            for storage in keys[index[used]]:
                last[storage] = i
    alive = peak = 0
    born: set[int] = set()
    dying: dict[int, list[int]] = {}
    for storage, i in last.items():
        dying.setdefault(i, []).append(storage)
    for i, own in enumerate(keys):
        for storage in own:
            if storage not in born and storage not in inputs:
                born.add(storage)
                alive += size_of[storage]
        peak = max(peak, alive)
        if not training:
            alive -= sum(size_of[storage] for storage in dying.get(i, ()) if storage in born)
    return peak
