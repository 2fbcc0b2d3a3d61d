"""Writing operator calls: new nodes with their metadata."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Node

from fxsp import torch_internals
from fxsp.errors import UnsupportedError
from fxsp.passes.graph import facts
from fxsp.source import describe

__all__ = ["Writer", "erase_unused"]

aten = torch.ops.aten

#: Metadata that a new node does not take over from the node it is written for.
_OWN_META = ("val", "tensor_meta", "example_value", "unbacked_bindings")


class Writer:
    """Writes nodes with their metadata: values by running the operator on fakes, origin from the ``origin`` node."""

    def __init__(self, graph: torch.fx.Graph, mode: Any) -> None:
        self.graph = graph
        self.mode = mode
        self.before: Node | None = None
        self.origin: Node | None = None

    def at(self, node: Node) -> None:
        """Write before ``node`` from now on, and on its behalf."""
        self.before = self.origin = node

    @contextlib.contextmanager
    def on_behalf_of(self, origin: Node | None) -> Iterator[None]:
        """Nodes written meanwhile take their origin from another node."""
        before, self.origin = self.origin, origin or self.origin
        try:
            yield
        finally:
            self.origin = before

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """A ``call_function`` node with its metadata."""
        node = self.write(target, *args, **kwargs)
        self.refresh(node)
        return node

    def write(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """The same, but without ``meta["val"]``."""
        assert self.before is not None
        assert self.origin is not None
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        node.meta.update({k: v for k, v in self.origin.meta.items() if k not in _OWN_META})
        return node

    def refresh(self, node: Node) -> None:
        """Compute ``meta["val"]`` from the arguments' values."""
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        assert callable(node.target)
        try:
            with self.mode, torch_internals.python_dispatch(), torch.no_grad():
                node.meta["val"] = node.target(*args, **kwargs)
        except Exception as error:
            raise UnsupportedError(
                f"{describe(self.origin)} writes in place; as a value, {node.target} fails: "
                f"{type(error).__name__}: {error}"
            ) from error

    def sizes(self, node: Node) -> list[Any]:
        """The sizes of a tensor as arguments: ints, and ``sym_size`` nodes where they are symbolic."""
        shape = node.meta["val"].shape
        return [
            size if isinstance(size, int) else self.call(aten.sym_size.int, node, d) for d, size in enumerate(shape)
        ]


def erase_unused(graph: torch.fx.Graph) -> None:
    """Erase dead code, but not in the bodies of islands, as torch's own method does: what has no user there, the end of
    a functorch level say, is needed all the same.
    """
    for node in reversed(graph.nodes):
        if not node.users and not node.is_impure() and not facts(node).island:
            graph.erase_node(node)
