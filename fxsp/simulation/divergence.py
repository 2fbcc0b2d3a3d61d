"""Where two programs part: the first value of a partitioned graph that is not that of the whole graph.

Both run in this process, the partitioned one on simulated ranks.  Values are compared in the order in which they are
computed, gradients in the order of the backward pass: a value's gradient, like the value, lies on the ranks in a form
that its type says (that of a whole value is whole, that of a split one split, that of a used one a summand).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from fxsp.passes.graph import facts, type_of
from fxsp.simulation.compare import relative_error, same_random_numbers
from fxsp.simulation.machine import assemble, simulate
from fxsp.source import module_path, node_source
from fxsp.torch_internals import trace_on_fakes
from fxsp.types import Length, Partial, Replicate, Shard, Type, Used, as_length
from fxsp.types import Sequence as Tokens

__all__ = ["first_difference", "place"]


def place(node: Node) -> str:
    """``"blocks.0.attn, model.py:12"``."""
    return f"{module_path(node) or 'the root module'}, {node_source(node) or 'no source line'}"


def first_difference(
    local: GraphModule,
    whole: GraphModule,
    size: int,
    inputs: Sequence[Any],
    seeds: Sequence[Tensor | None] | None,
    tolerance: float,
    deferred: bool = False,
) -> str:
    """The first value that differs, else the first gradient, in words; nothing if all agree.

    ``local`` is a partitioned graph (whose nodes say which value they stand for), ``whole``
    the typed graph that it was made from; ``seeds`` are the gradients of its outputs (None: values only);
    ``deferred``: gradients of parameters are left as summands.
    """
    numbers = _numbers(whole, inputs)
    return _value(local, whole, size, inputs, tolerance, numbers) or (
        _gradient(local, whole, size, inputs, seeds, tolerance, numbers, deferred) if seeds is not None else ""
    )


class _Keeper(Interpreter):
    """Runs a graph and keeps every tensor that a node computes."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.kept: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and n.op != "output":
            self.kept[n.name] = value
        return value


def _value(
    local: GraphModule,
    whole: GraphModule,
    size: int,
    inputs: Sequence[Any],
    tolerance: float,
    numbers: dict[sympy.Symbol, int],
) -> str:
    keeper = _Keeper(whole)
    with torch.no_grad(), same_random_numbers():
        keeper.run(*[x.detach().clone() if isinstance(x, Tensor) else x for x in inputs])
    found: list[str] = []

    def look(node: Node, lanes: Sequence[Any]) -> None:
        expected = keeper.kept.get(facts(node).stands_for)
        if node.op == "placeholder" or expected is None:
            return  # an input, which may have been written to since
        if found or facts(node).type is None or not all(isinstance(x, Tensor) for x in lanes):
            return
        error = relative_error(assemble(_concrete(type_of(node), numbers), lanes), expected)
        if not error <= tolerance:
            name = facts(node).stands_for
            found.append(f"{node.name}: {type_of(node)} of {name} ({place(node)}), error {error:.1e}")

    with same_random_numbers():
        simulate(local, size, inputs, observe=look)
    return found[0] if found else ""


def _gradient(
    local: GraphModule,
    whole: GraphModule,
    size: int,
    inputs: Sequence[Any],
    seeds: Sequence[Tensor | None],
    tolerance: float,
    numbers: dict[sympy.Symbol, int],
    deferred: bool,
) -> str:
    nodes = {node.name: node for node in local.graph.nodes}
    kept: list[str] = []  # of the local graph, in its order

    def backward(gm: GraphModule, names: Sequence[str] | None, *args: Any) -> dict[str, Tensor]:
        """Gradients of values that a gradient reaches, by name."""
        keeper = _Keeper(gm)
        with torch.enable_grad():
            leaves = [
                x.detach().requires_grad_(y.requires_grad) if isinstance(x, Tensor) else x
                for x, y in zip(args[: len(inputs)], inputs, strict=True)
            ]
            values = [x.clone() if isinstance(x, Tensor) and x.requires_grad else x for x in leaves]
            outputs = tree_leaves(keeper.run(*values))
        given = zip(outputs, args[len(inputs) :], present, strict=True)
        pairs = [(x, g) for x, g, exists in given if exists and x.requires_grad]
        wanted = {n: x for n, x in keeper.kept.items() if x.requires_grad and (names is None or n in names)}
        grads = torch.autograd.grad(
            [x for x, _ in pairs], list(wanted.values()), [g for _, g in pairs], allow_unused=True
        )
        return {n: g for n, g in zip(wanted, grads, strict=True) if g is not None}

    present = [s is not None for s in seeds]
    filled = [s if s is not None else torch.zeros([]) for s in seeds]
    with same_random_numbers():
        expected = backward(whole, None, *inputs, *filled)
    # One form of each value, the first: the others are made of it, and their gradients arrive in it.
    first: dict[str, str] = {}
    for node in local.graph.nodes:
        name = facts(node).stands_for
        if name in expected and isinstance(facts(node).type, (Replicate, Used, Partial, Shard)):
            first.setdefault(name, node.name)

    def joint(*args: Any) -> tuple[Tensor, ...]:
        found = backward(local, list(first.values()), *args)
        kept[:] = found
        return tuple(found.values())

    examples = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
    traced = trace_on_fakes(joint, [*examples, *filled])
    with same_random_numbers():
        results = simulate(traced, size, [*inputs, *filled])
    usual = max((g.norm().item() for g in expected.values()), default=0.0)
    for i in reversed(range(len(kept))):
        node = nodes[kept[i]]
        lanes = [rank[i] for rank in results]
        type_ = _concrete(type_of(node), numbers)
        if node.op == "placeholder" and not (deferred and facts(node).is_parameter):
            type_ = Replicate()
        value = _assembled_gradient(type_, lanes)
        error = relative_error(value, expected[facts(node).stands_for], usual)
        if not error <= tolerance:
            name = facts(node).stands_for
            return f"the gradient of {node.name}: {type_of(node)} of {name} ({place(node)}), error {error:.1e}"
    return ""


def _assembled_gradient(type_: Type, lanes: Sequence[Tensor]) -> Tensor:
    """The global gradient of a value of this type: summands where the value is used, or lies whole beside shards."""
    if isinstance(type_, Used):
        return assemble(Partial(), lanes)
    if isinstance(type_, Shard) and any(type_.sequence.whole):
        # A whole segment's gradient is a summand on each rank: gather it as shards do, whole segments summed.
        total = [assemble(Partial(), lanes)] * len(lanes)
        return _mixed(type_, lanes, total)
    return assemble(Replicate() if isinstance(type_, Partial) else type_, lanes)


def _mixed(type_: Shard, lanes: Sequence[Tensor], total: Sequence[Tensor]) -> Tensor:
    """Rows of split segments from ``lanes``, of whole ones from ``total``."""
    mine, summed = assemble(type_, lanes), assemble(type_, total)
    dim = type_.dim
    shape = mine.shape
    tokens = (*shape[:dim], int(type_.outer), -1, *shape[dim + 1 :])
    split, whole = mine.reshape(tokens), summed.reshape(tokens)
    start = 0
    pieces = []
    for segment in type_.sequence.segments:
        source = split if segment.sharded else whole
        pieces.append(source.narrow(dim + 1, start, int(segment.length)))
        start += int(segment.length)
    return torch.cat(pieces, dim + 1).reshape(shape)


# --- symbolic lengths, as numbers -------------------------------------------------------------------------------------


def _numbers(whole: GraphModule, inputs: Sequence[Any]) -> dict[sympy.Symbol, int]:
    """What each symbol of the graph is for these inputs."""
    found: dict[sympy.Symbol, int] = {}
    for node, given in zip(whole.graph.find_nodes(op="placeholder"), inputs, strict=True):
        value = node.meta.get("val")
        if isinstance(value, Tensor) and isinstance(given, Tensor):
            sizes = list(zip(value.shape, given.shape, strict=True))
        else:
            sizes = [(value, given)]
        for size, n in sizes:
            symbol = as_length(size) if isinstance(size, (int, torch.SymInt)) else None
            if isinstance(symbol, sympy.Symbol):
                found[symbol] = int(n)
    return found


def _concrete(type_: Any, numbers: dict[sympy.Symbol, int]) -> Any:
    """A type with numbers in place of symbols."""
    if not isinstance(type_, Shard) or not numbers:
        return type_

    def number(length: Length) -> int:
        return (
            length
            if isinstance(length, int)
            else int(length.xreplace({s: sympy.Integer(n) for s, n in numbers.items()}))
        )

    segments = tuple(
        dataclasses.replace(s, length=number(s.length), unit=number(s.unit)) for s in type_.sequence.segments
    )
    tokens: Tokens = dataclasses.replace(type_.sequence, segments=segments)
    return dataclasses.replace(type_, sequence=tokens, outer=number(type_.outer))
