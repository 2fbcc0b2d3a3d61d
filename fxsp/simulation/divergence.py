"""Where two programs part: the first value of a partitioned graph that is not that of the whole graph.

Both run in this process, the partitioned one on simulated ranks.  Values are compared in the order in which they are
computed, gradients in the order of the backward pass: a value's gradient, like the value, lies on the ranks in a form
that its type says (that of a whole value is whole, that of a split one split, that of a used one a summand).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from fxsp.lengths import hint
from fxsp.passes.graph import facts, type_of
from fxsp.simulation.compare import copy_of, relative_error, same_random_numbers
from fxsp.simulation.joint import detached, differentiate, run_on_leaves
from fxsp.simulation.machine import assemble, simulate
from fxsp.simulation.reference.lanes import total
from fxsp.source import module_path, node_source
from fxsp.torch_internals import trace_on_fakes
from fxsp.types import Partial, Replicate, Shard, Type, Used, as_length
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
    copies = [copy_of(x, True) for x in inputs]
    both = _Both(local, whole, size, copies, tolerance, _numbers(whole, inputs))
    return _value(both) or ("" if seeds is None else _gradient(both, seeds, deferred))


@dataclass(frozen=True)
class _Both:
    """The partitioned and the whole program, and what they are compared on."""

    local: GraphModule
    whole: GraphModule
    size: int
    inputs: Sequence[Any]
    tolerance: float
    #: What the symbols of the graphs are.
    numbers: Mapping[Any, int]


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


def _value(both: _Both) -> str:
    keeper = _Keeper(both.whole)
    with torch.no_grad(), same_random_numbers():
        keeper.run(*[copy_of(x, False) for x in both.inputs])
    found: list[str] = []

    def look(node: Node, lanes: Sequence[Any]) -> None:
        name = facts(node).stands_for
        expected = keeper.kept.get(name)
        if node.op == "placeholder" or expected is None:
            return  # an input, which may have been written to since
        if found or facts(node).type is None or not all(isinstance(x, Tensor) for x in lanes):
            return
        error = relative_error(assemble(_concrete(type_of(node), both.numbers), lanes), expected)
        if not error <= both.tolerance:
            found.append(f"{node.name}: {type_of(node)} of {name} ({place(node)}), error {error:.1e}")

    with same_random_numbers():
        simulate(both.local, both.size, both.inputs, observe=look)
    return found[0] if found else ""


def _gradient(both: _Both, seeds: Sequence[Tensor | None], deferred: bool) -> str:
    count = len(both.inputs)

    def backward(gm: GraphModule, names: Sequence[str] | None, *args: Any) -> dict[str, Tensor]:
        """Gradients of values that a gradient reaches, by name."""
        keeper = _Keeper(gm)
        outputs, _ = run_on_leaves(keeper.run, args[:count], both.inputs)
        wanted = {n: x for n, x in keeper.kept.items() if x.requires_grad and (names is None or n in names)}
        grads = differentiate(outputs, args[count:], list(wanted.values()))
        return {n: g for n, g in zip(wanted, grads, strict=True) if g is not None}

    with same_random_numbers():
        expected = backward(both.whole, None, *both.inputs, *seeds)
    # One form of each value, the first: the others are made of it, and their gradients arrive in it.
    first: dict[str, str] = {}
    for node in both.local.graph.nodes:
        name = facts(node).stands_for
        if name in expected and isinstance(facts(node).type, (Replicate, Used, Partial, Shard)):
            first.setdefault(name, node.name)
    kept: list[str] = []  # of the local graph, in its order

    def joint(*args: Any) -> tuple[Tensor, ...]:
        found = backward(both.local, list(first.values()), *args)
        kept[:] = found
        return tuple(found.values())

    traced = trace_on_fakes(joint, [*map(detached, both.inputs), *seeds])
    with same_random_numbers():
        results = simulate(traced, both.size, [*both.inputs, *seeds])
    usual = max((g.norm().item() for g in expected.values()), default=0.0)
    nodes = {node.name: node for node in both.local.graph.nodes}
    for i in reversed(range(len(kept))):
        node = nodes[kept[i]]
        name, type_ = facts(node).stands_for, _concrete(type_of(node), both.numbers)
        if node.op == "placeholder" and not (deferred and facts(node).is_parameter):
            type_ = Replicate()
        value = _assembled_gradient(type_, [rank[i] for rank in results])
        error = relative_error(value, expected[name], usual)
        if not error <= both.tolerance:
            return f"the gradient of {node.name}: {type_of(node)} of {name} ({place(node)}), error {error:.1e}"
    return ""


def _assembled_gradient(type_: Type, lanes: Sequence[Tensor]) -> Tensor:
    """The global gradient of a value of this type: summands where the value is used, or lies whole beside shards."""
    if isinstance(type_, Used):
        return assemble(Partial(), lanes)
    if isinstance(type_, Shard):
        return assemble(type_, lanes, total(lanes) if any(type_.sequence.whole) else None)
    return lanes[0]


# --- symbolic lengths, as numbers -------------------------------------------------------------------------------------


def _numbers(whole: GraphModule, inputs: Sequence[Any]) -> dict[Any, int]:
    """What each symbol of the graph is for these inputs."""
    found: dict[Any, int] = {}
    for node, given in zip(whole.graph.find_nodes(op="placeholder"), inputs, strict=True):
        value = node.meta.get("val")
        sizes = zip(value.shape, given.shape, strict=True) if isinstance(value, Tensor) else [(value, given)]
        for size, n in sizes:
            if isinstance(size, torch.SymInt) and isinstance(symbol := as_length(size), sympy.Symbol):
                found[symbol] = int(n)
    return found


def _concrete(type_: Any, numbers: Mapping[Any, int]) -> Any:
    """A type with numbers in place of symbols."""
    if not isinstance(type_, Shard) or not numbers:
        return type_
    segments = tuple(
        replace(s, length=hint(s.length, numbers), unit=hint(s.unit, numbers)) for s in type_.sequence.segments
    )
    return replace(type_, sequence=Tokens(segments), outer=hint(type_.outer, numbers))
