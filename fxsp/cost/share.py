"""How much of a graph's work runs on shards: what says that a plan applied, and split nothing of weight.

Work is arithmetic (:mod:`fxsp.cost.flops`).  An operator that nothing is known about counts as if it multiplied its
largest operand by a square matrix, so that a layer in one operator weighs what a layer does.  A graph without any of
these is measured by the elements that its operators write; elementwise ones are computed whole where that saves a
gather.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch.fx import Node

from fxsp.cost.flops import Shape, shapes
from fxsp.passes.base import Program
from fxsp.passes.graph import facts
from fxsp.passes.propagate.propagate import is_annotate
from fxsp.passes.rules.decide import Decision
from fxsp.passes.rules.families import family
from fxsp.passes.work import operands_of, work_of
from fxsp.source import module_path, node_source
from fxsp.torch_internals import schema
from fxsp.types import Partial, Shard

__all__ = ["LEAST", "Share", "on_shards", "share_of"]

#: A plan that puts less of the work on shards than this is said to split nothing of weight.
LEAST = 0.05


@dataclass(frozen=True)
class Share:
    """Of one graph: all its work, what of it runs on shards, and the operators that do the rest on every rank."""

    total: int = 0
    split: int = 0
    #: Operator, module and source line -> work, the largest first.
    whole: dict[tuple[str, str, str], int] = field(default_factory=dict)

    @property
    def part(self) -> float:
        """Between 0 and 1; 1 for a graph that has nothing to do."""
        return self.split / self.total if self.total else 1.0

    def holders(self, root: str) -> str:
        """The operators that hold most of the work, in words."""
        shown = [
            f"{op} in {module or root}{f' ({source})' if source else ''} has {work / self.total:.0%}"
            for (op, module, source), work in list(self.whole.items())[:3]
        ]
        return ", ".join(shown)


def share_of(program: Program) -> Share:
    """The share of a partitioned program; sizes that are symbols count as those that were traced."""
    nodes = [n for n in program.whole.graph.nodes if n.op == "call_function" and not is_annotate(n)]
    shape_of = shapes(lambda node: node.meta.get("val"), program.number)
    known = _sum(nodes, lambda n: work_of(n, shape_of), on_shards)
    if known.total:
        return known
    # What is cheap is computed whole where that saves a gather, whatever its type says.
    names = {facts(n).stands_for for n in program.graph.nodes if isinstance(facts(n).type, (Shard, Partial))}
    return _sum(nodes, lambda n: _written(n, shape_of), lambda n: n.name in names)


def _sum(nodes: list[Node], work: Callable[[Node], int], on_shards: Callable[[Node], bool]) -> Share:
    total = split = 0
    whole: dict[tuple[str, str, str], int] = {}
    for node in nodes:
        count = work(node)
        total += count
        if count and on_shards(node):
            split += count
        elif count:
            key = str(node.target), module_path(node), node_source(node)
            whole[key] = whole.get(key, 0) + count
    return Share(total, split, dict(sorted(whole.items(), key=lambda item: -item[1])))


def on_shards(node: Node) -> bool:
    """Whether a call of the global graph runs on each rank's part of something."""
    decision = facts(node).decision
    return isinstance(decision, Decision) and any(
        isinstance(t, (Shard, Partial)) for t in (*decision.operands, *decision.results)
    )


def _written(node: Node, shape_of: Callable[[Any], Shape | None]) -> int:
    """Elements of the result of what computes something from tensors; views, and what is cheap, count nothing."""
    if facts(node).decision is None or not operands_of(node) or node.target in family("cheap"):
        return 0
    if any(result.alias_info is not None for result in schema(node.target).returns):
        return 0
    shape = shape_of(node)
    return 0 if shape is None else prod(shape)
