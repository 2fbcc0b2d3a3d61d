"""Nodes of the graph that Dynamo made: what they stand for, where something may be put, and who writes to them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxsp import torch_internals
from fxsp.passes.graph import Call
from fxsp.torch_internals import Opaque
from fxsp.types import as_length, same_length

__all__ = ["all_described", "copy_origin", "described", "example_of", "input_size", "place_after", "written_by"]


def example_of(node: fx.Node) -> Any:
    """The fake value that Dynamo has for a node; None if it has none."""
    return node.meta.get("example_value")


def copy_origin(old: fx.Node, new: fx.Node) -> None:
    """``new`` stands where ``old`` does: in its module, on its line."""
    new.meta.update({key: old.meta[key] for key in ("nn_module_stack", "stack_trace") if key in old.meta})


def described(value: Any) -> str:
    """A value in a few words: ``[1, 24, 64]`` for a tensor."""
    if isinstance(value, fx.Node):
        example = example_of(value)
        if isinstance(example, torch.Tensor):
            return f"[{', '.join(str(size) for size in example.shape)}]"
        return f"a {type(example).__name__}"
    if isinstance(value, Opaque):
        return value.why
    if isinstance(value, (list, tuple, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    return repr(value)


def all_described(values: list[Any]) -> str:
    """Several values, each in a few words."""
    return ", ".join(described(value) for value in values)


def place_after(graph: fx.Graph, value: fx.Node, end: fx.Node | None = None) -> fx.Node:
    """The node after which something may stand that needs ``value`` and follows ``end``: never among the inputs."""
    place = value if end is None or end < value else end
    return list(graph.find_nodes(op="placeholder"))[-1] if place.op == "placeholder" else place


def input_size(graph: fx.Graph, number: Any) -> Any:
    """An input of ``graph`` that is the symbolic ``number``, or ``(input, dim)`` where a size of it is; else None.

    Dynamo writes the size of a tensor anew where it is used: a node for it may come late, or be gone.
    """
    for node in graph.find_nodes(op="placeholder"):
        example = example_of(node)
        if isinstance(example, torch.SymInt) and _same(example, number):
            return node
        if isinstance(example, torch.Tensor):
            dims = (dim for dim, size in enumerate(example.shape) if _same(size, number))
            if (dim := next(dims, None)) is not None:
                return node, dim
    return None


def _same(a: Any, b: Any) -> bool:
    """Whether both are one symbolic number, by its expression: no guard."""
    return isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt) and same_length(as_length(a), as_length(b))


_IN_PLACE = frozenset(
    getattr(operator, name)
    for name in (
        *("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
        *("iand", "ior", "ixor", "ilshift", "irshift"),
    )
)


def written_by(graph: fx.Graph, node: fx.Node) -> list[fx.Node]:
    """The nodes that write to the storage of ``node``: an annotation is a copy, and would not see what they write."""
    storage = torch_internals.storage_key(example_of(node))
    return [
        writer
        for writer in graph.nodes
        for target in _written(writer)
        if isinstance(example_of(target), torch.Tensor) and torch_internals.storage_key(example_of(target)) == storage
    ]


def _written(node: fx.Node) -> list[fx.Node]:
    """The arguments that a node of Dynamo's graph writes to."""
    first = [arg for arg in node.args[:1] if isinstance(arg, fx.Node)]
    out = node.kwargs.get("out")
    outs = [o for o in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(o, fx.Node)]
    if node.op == "call_method":
        name = str(node.target)
        in_place = (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__iadd__", "__imul__")
        return outs + (first if in_place else [])
    if node.op != "call_function":
        return []
    if torch_internals.is_operator(node.target):
        return Call(node).written
    name = getattr(node.target, "__name__", "")
    in_place = (name.endswith("_") and not name.endswith("__")) or node.target in _IN_PLACE
    return outs + (first if in_place or node.kwargs.get("inplace") is True else [])
