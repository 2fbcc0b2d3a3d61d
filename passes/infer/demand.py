"""Where tokens come from: a demand that starts at what is expensive, and is carried backward by the rules.

A demand is a type: this dimension of this value shall be split.  It starts at queries of attentions
(``scaled_dot_product_attention``, registered, written out), and where it is asked for at the rows of linear layers and
convolutions; the rules that carry types forward carry it backward, operator by operator.  It ends at the earliest
values that hold the tokens as a dimension of their own, which are *born* there: inputs of the graph, and results of
operators that make tokens (a patchify, a convolution, a concatenation with what is no token).

    %hidden   [1, 4096, 64]   S(1)   born: an input
    %linear   [1, 4096, 128]  S(1)
    %view     [1, 4096, 4, 32]
    %permute  [1, 4, 4096, 32]
    %sdpa                     the demand starts: S(2) of the query

Sizes are read only to know which factor of a dimension is meant, and never compared between values; names are not read.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from fxsp.lengths import hint
from fxsp.passes.attention.operators import ATTENTION_OPS
from fxsp.passes.attention.unfused import unfused_of
from fxsp.passes.base import Program
from fxsp.passes.graph import Call, facts, reachable, shape_of, tensor_value
from fxsp.passes.rules.decide import locate, placed_in
from fxsp.passes.rules.families import family
from fxsp.passes.rules.rule import OpRule
from fxsp.passes.rules.table import rule_of
from fxsp.torch_internals import is_operator
from fxsp.types import Sequence, Shard, same_length

__all__ = ["Birth", "Births", "Seed", "seeds_of_attentions", "seeds_of_work"]

_MOVES_ROWS = family("cat", "slice", "split")


@dataclass(frozen=True)
class Seed:
    """Where a demand starts: a value, the dimension of its tokens, what hangs on it, and in which words."""

    node: Node
    dim: int
    #: Operations that are split if the demand is met.
    work: int
    #: ``"queries of attention"``: several of them are counted in a report.
    what: str
    #: Who asks: the operator.
    of: Node


@dataclass(frozen=True)
class Birth:
    """A value, and the dimension that holds its tokens."""

    node: Node
    dim: int
    #: Tokens in a row that have to stay together.
    unit: int = 1

    @property
    def length(self) -> int:
        """Its tokens, for the inputs at hand."""
        return hint(shape_of(self.node)[self.dim])


@dataclass
class Births:
    """Carries demands back through one graph; what is known of a value is found once."""

    program: Program
    #: Values of which demands know that they are split: nothing is asked of those.
    met: Callable[[Node], bool] = lambda node: False
    _rules: dict[Node, OpRule | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        graph = self.program.graph
        inputs = [n for n in graph.find_nodes(op="placeholder") if tensor_value(n) is not None and not _is_state(n)]
        #: Values that depend on an argument of the program: others are constants, of which a part costs nothing.
        self.varying = set(reachable(inputs, lambda n: n.users))
        #: Values made of arguments by cheap operators (tables of positions): every rank can have them whole.
        self.cheap: set[Node] = set()
        for node in graph.nodes:
            made = node.op == "call_function" and (node.target in family("cheap") or node.target in _MOVES_ROWS)
            if (node.op != "call_function" or made or node.target is operator.getitem) and all(
                n in self.cheap for n in node.all_input_nodes
            ):
                self.cheap.add(node)

    def of(self, seeds: Iterable[Seed]) -> dict[Seed, tuple[Birth, ...]]:
        """The births of each seed's tokens, in the order of the graph; none where nothing holds them."""
        seeds = list(seeds)
        order = {node: i for i, node in enumerate(self.program.graph.nodes)}
        wanted: dict[Node, list[Shard]] = {}
        sources: dict[tuple[Node, int], list[tuple[Node, int]]] = {}
        starts: dict[Seed, tuple[Node, int]] = {}

        def want(node: Node, shard: Shard) -> tuple[Node, int]:
            known = wanted.setdefault(node, [])
            at = next((i for i, s in enumerate(known) if s.same_as(shard)), None)
            if at is None:
                known.append(shard)
                at = len(known) - 1
            return node, at

        for seed in seeds:
            starts[seed] = want(seed.node, Shard(seed.dim, Sequence.of(shape_of(seed.node)[seed.dim])))
        for node in reversed(self.program.graph.nodes):
            for i, shard in enumerate(wanted.get(node, ())):
                sources[node, i] = [want(*demand) for demand in self._back(node, shard)]
        born: dict[tuple[Node, int], frozenset[Birth]] = {}
        for node in sorted(wanted, key=order.__getitem__):
            for i, shard in enumerate(wanted[node]):
                found = frozenset(birth for source in sources[node, i] for birth in born[source])
                unit = shard.sequence.units[0]
                one = same_length(shape_of(node)[shard.dim], 1)
                if not found and shard.plain and isinstance(unit, int) and not one and self._may_be_born(node):
                    found = frozenset((Birth(node, shard.dim, unit),))
                born[node, i] = found
        return {seed: tuple(sorted(born[at], key=lambda b: (order[b.node], b.dim))) for seed, at in starts.items()}

    def _may_be_born(self, node: Node) -> bool:
        if node not in self.varying or tensor_value(node) is None:
            return False
        return node.op != "placeholder" or not any(node in _written(user) for user in node.users)

    def _back(self, node: Node, shard: Shard) -> Iterator[tuple[Node, Shard]]:
        """What has to be split for ``node`` to be split like this."""
        result, (producer, index) = 0, (*node.args[:2], None, None)[:2]
        if node.target is operator.getitem and isinstance(producer, Node) and isinstance(index, int):
            value = producer.meta.get("val")
            if not isinstance(value, (tuple, list)):
                return
            result, node = sum(isinstance(v, torch.Tensor) for v in value[:index]), producer
        if node.op != "call_function" or not is_operator(node.target) or facts(node).island:
            return
        found = [
            (x, s)
            for x, s in self._through(node, result, shard)
            if x in self.varying and tensor_value(x) is not None and not self.met(x)
        ]
        # A table of positions beside what is computed of tokens can be had whole, and cut for nothing.
        dear = [(x, s) for x, s in found if x not in self.cheap]
        yield from dear or found

    def _through(self, node: Node, result: int, shard: Shard) -> Iterator[tuple[Node, Shard]]:
        call = Call(node)
        if node.target in _MOVES_ROWS and call.dim("dim", len(shape_of(call.operands[0]))) == shard.dim:
            for x in call.operands if shard.plain else ():
                if not same_length(shape_of(x)[shard.dim], 0):
                    yield x, Shard(shard.dim, Sequence.of(shape_of(x)[shard.dim]))
            return
        if node.target in ATTENTION_OPS:
            op = ATTENTION_OPS[node.target]
            query = call[op.query]
            tokens = len(shape_of(query)) - 2 if op.heads_first else 1
            if result == op.output and shard.dim == tokens and shard.plain:
                yield query, shard
                return
        rule = self._rule(node)
        if rule is None or result >= len(rule.results):
            return
        placement = locate(shard, rule.results[result], rule.sizes)
        if placement is None or placement.factor in rule.whole | rule.combined:
            return
        for x, dims in zip(call.operands, rule.operands, strict=True):
            placed = None if dims is None else placed_in(placement, dims, rule.sizes)
            if placed is not None:
                yield x, placed

    def _rule(self, node: Node) -> OpRule | None:
        if node not in self._rules:
            self._rules[node] = rule_of(node)
        return self._rules[node]


def seeds_of_attentions(program: Program, work: Any) -> list[Seed]:
    """The queries, and the keys, of every attention; ``work(node)`` are its operations."""
    found: list[Seed] = []
    for node in program.graph.nodes:
        if node.target in ATTENTION_OPS:
            op, call = ATTENTION_OPS[node.target], Call(node)
            for name, what, part in ((op.query, "queries", work(node)), (op.key, "keys", 0)):
                shape = shape_of(call[name])
                if len(shape) > 2:
                    found.append(Seed(call[name], len(shape) - 2 if op.heads_first else 1, part, what, node))
    for one in unfused_of(program).attentions:
        for scores in one.scores:
            rule = rule_of(scores.node)
            for at, factor, what, part in (
                (scores.left, scores.row, "queries", work(scores.node)),
                (scores.right, scores.column, "keys", 0),
            ):
                dims = rule.operands[at] if rule is not None else None
                if dims is not None and (factor,) in dims:
                    x = Call(scores.node).operands[at]
                    found.append(Seed(x, dims.index((factor,)), part, what, scores.node))
    return [seed for seed in found if not same_length(shape_of(seed.node)[seed.dim], 1)]


def seeds_of_work(nodes: Iterable[Node], work: Any, varying: Container[Node]) -> list[Seed]:
    """The rows of linear layers and convolutions: of each the longest dimension that its result has from an input.

    ``varying`` are the values that depend on an input.  Of a value of two dimensions these are its rows, else not the
    first dimension, which is a batch.
    """
    found = []
    for node in nodes:
        rule, value = rule_of(node), tensor_value(node)
        if rule is None or value is None or not is_operator(node.target):
            continue
        operands = Call(node).operands
        kept = [
            d
            for d, factors in enumerate(rule.results[0])
            if len(factors) == 1
            and factors[0] not in rule.whole
            and any(
                dims is not None and factors in dims and x in varying
                for x, dims in zip(operands, rule.operands, strict=True)
            )
            and (d > 0 or value.ndim < 3)
        ]
        lengths = shape_of(node)
        kept = [d for d in kept if hint(lengths[d]) > 1]
        if kept:
            dim = max(kept, key=lambda d: (hint(lengths[d]), -d))
            found.append(Seed(node, dim, work(node), "rows", node))
    return found


def _is_state(node: Node) -> bool:
    """Whether it is a parameter or buffer of the model."""
    return facts(node).is_state


def _written(user: Node) -> list[Node]:
    return Call(user).written if user.op == "call_function" and is_operator(user.target) else []
