"""Tensor subclasses in a re-trace: quantized weights are seen through to the plain tensors that they are made of.

A wrapper subclass (it has ``__tensor_flatten__``) stays one input of the graph.  What it is made of is read from it by
``getattr``, and what its ``__torch_function__`` and ``__torch_dispatch__`` make of an operator is what is recorded::

    %weight : placeholder                                        # Int8Tensor [32, 32]
    %qdata = getattr(%weight, "qdata")                           # i8 [32, 32]
    %scale = getattr(%weight, "scale")
    %t = aten.t(%qdata)
    ...

So the rules see every operator that runs: a scale that is the maximum over all tokens is a reduction over tokens,
although the model says ``linear``.

``__torch_function__`` acts above autograd: it is opened at all times, and what it calls is differentiated as in eager
code.  ``__torch_dispatch__`` acts below: what autograd differentiates is the operator on the subclass, and what
``__torch_dispatch__`` makes of it has other derivatives (of a rounding: none).  It is opened where no gradient is
recorded; elsewhere the operator stays one node, as AOTAutograd traces it: on rows, if it is proven that it treats every
row alone (:mod:`fxsp.passes.normalize.row_wise`), else as an island that runs whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from fxsp import torch_internals
from fxsp.errors import UnsupportedError
from fxsp.passes.graph import mark, reachable
from fxsp.passes.normalize.row_wise import is_row_wise
from fxsp.torch_internals import is_wrapper_subclass

__all__ = ["holds_subclass", "mark_islands", "refuse_custom_functions", "refuse_unrecorded", "see_through"]

#: Why an operator on a subclass is not opened, for the fact ``island``.
_ISLAND = "an operator on a {}, whose gradients are made below autograd"


def holds_subclass(values: Any) -> bool:
    """Whether one of these values (nested, or not) is a wrapper subclass."""
    return any(is_wrapper_subclass(leaf) for leaf in tree_leaves(values))


def see_through(recorder: torch_internals.Recorder, op: Any, args: Any, kwargs: Any) -> Any:
    """Run one operator, and record it, or what a subclass among its operands makes of it."""
    records_gradients = torch.is_grad_enabled()
    if recorder.records_gradients and not records_gradients:  # the code of the subclass says so, for itself

        def detach(x: torch.Tensor) -> Any:
            plain = x.requires_grad and not is_wrapper_subclass(x)
            return recorder.record(torch.ops.aten.detach.default, (x,), {}) if plain else x

        args, kwargs = tree_map_only(torch.Tensor, detach, (args, kwargs))
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    subclasses = [leaf for leaf in leaves if is_wrapper_subclass(leaf)]
    if not subclasses:
        if _is_made_of_others(op):
            with recorder.above_autograd():
                return op.decompose(*args, **kwargs)
        return recorder.record(op, args, kwargs)
    kind = type(subclasses[0]).__name__
    if torch_internals.schema(op).is_mutable:
        raise UnsupportedError(f"{op} writes to, or beside, a {kind}")
    if not records_gradients or not any(leaf.requires_grad for leaf in leaves):
        with recorder.below_autograd(*subclasses):
            return op(*args, **kwargs)
    if not all(map(recorder.has, subclasses)):
        raise UnsupportedError(f"{op} on a {kind} that the traced code makes, while gradients are recorded")
    result = recorder.record(op, args, kwargs)
    made = [leaf for leaf in tree_leaves(result) if is_wrapper_subclass(leaf)]
    if made and len(subclasses) < len(leaves):
        raise UnsupportedError(f"{op} of a {kind} and others gives a {type(made[0]).__name__}")
    with recorder.above_autograd():
        for leaf in made:
            torch_internals.record_inner(leaf)
    return result


def _is_made_of_others(op: Any) -> bool:
    """Whether it is an operator of a library that only calls others (of torchao, say), for which there is no rule."""
    namespace = torch_internals.schema(op).name.partition("::")[0]
    return namespace not in ("aten", "fxsp", "prim", "prims") and torch_internals.is_composite(op)


def mark_islands(graph: torch.fx.Graph) -> None:
    """Operators that were recorded with a subclass as operand run whole, or on rows, if they treat each alone.

    Grad mode is a matter of operands, not of places: its markers, from the code of subclasses, go.
    """
    for node in list(graph.nodes):
        if torch_internals.is_set_grad(node.target):
            graph.erase_node(node)
        if torch_internals.is_operator(node.target):
            kinds = [type(v).__name__ for n in node.all_input_nodes if is_wrapper_subclass(v := n.meta.get("val"))]
            if kinds and is_row_wise(node):
                mark(node, row_wise=True)
            elif kinds:
                mark(node, island=_ISLAND.format(kinds[0]))


def refuse_unrecorded(outputs: list[Any]) -> None:
    """A result of the graph has to be a node of it: UnsupportedError."""
    for index, value in enumerate(outputs):
        if is_wrapper_subclass(value) and not torch_internals.is_recorded(value):
            raise UnsupportedError(f"output {index} is a {type(value).__name__} that the traced code makes")


def refuse_custom_functions(results: Any, what: str) -> None:
    """A subclass may call a custom ``autograd.Function``, whose backward a trace loses: UnsupportedError."""
    ends = [x.grad_fn for x in tree_leaves(results) if isinstance(x, torch.Tensor) and x.grad_fn is not None]
    for function in reachable(ends, lambda f: [before for before, _ in f.next_functions if before is not None]):
        if name := torch_internals.custom_function(function):
            raise UnsupportedError(f"{what} runs {name}, the backward pass of which a trace does not see")
