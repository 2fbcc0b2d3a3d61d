"""Attention that is written out: products and a softmax instead of ``scaled_dot_product_attention``.

It is found by what it computes, on the global graph: a softmax whose input comes from a product of two computed values
(scores), by scaling, masks, biases, a soft cap, casts and views, and whose output is multiplied with a third value over
the dimension of the softmax::

    %matmul   = matmul(%q, %kT)             scores: queries are rows, keys are columns
    %add      = add(%matmul, %mask)
    %softmax  = softmax(%add, -1)           over the columns
    %matmul_1 = matmul(%softmax, %v)        the result

Rows stay split by the tokens of the queries, so keys and values are needed whole.  The general rules would gather
whatever is smallest, which may be the queries; then a softmax over split keys would gather the scores.  Here that is
decided once for the whole of it (:class:`UnfusedProducts`).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from fxsp.lengths import hint
from fxsp.passes.base import Program
from fxsp.passes.graph import Call, facts, reachable, shape_of, tensor_nodes, tensor_value
from fxsp.passes.rules.decide import Decision, decide, locate, weights
from fxsp.passes.rules.families import family, names_of
from fxsp.passes.rules.rule import OpRule
from fxsp.passes.rules.table import rule_of
from fxsp.passes.special.special import Special
from fxsp.report import AttentionRecord
from fxsp.source import node_source
from fxsp.types import Sequence, Shard, Type, product, same_length

__all__ = ["PRODUCTS", "VIEWS", "UnfusedProducts", "Written", "is_computed", "source_of", "unfused_of"]

PRODUCTS = family("product")
VIEWS = family("view")
#: What may stand between a product and a softmax: rows stay rows, columns stay columns.
_PASSED = family("cheap", "cat", "slice", "split") | {torch.ops.aten.dropout.default}
_REMEDY = 'use scaled_dot_product_attention (attn_implementation="sdpa" in transformers), whose cheapest way is chosen'


@dataclass(frozen=True)
class Product:
    """A product of an attention: of queries (left) and keys (right), or of weights (left) and values (right)."""

    node: Node
    rule: OpRule
    #: Positions among the operands of the call.
    left: int
    right: int
    #: The factor of the keys' tokens, and of the queries'.
    column: str
    row: str = ""

    @property
    def operands(self) -> tuple[Node, Node]:
        given = Call(self.node).operands
        return given[self.left], given[self.right]


@dataclass(eq=False)
class Written:
    """One attention that is written out, on the global graph."""

    #: Its first product, and everything from there to the products with values.
    first: Node
    nodes: frozenset[Node]
    #: The products that make scores, first that of queries and keys; those with values.  A linear attention has none.
    scores: list[Product] = field(default_factory=list)
    results: list[Product] = field(default_factory=list)
    #: Operators among them that ``scaled_dot_product_attention`` has no argument for.
    strange: tuple[str, ...] = ()
    #: In the report, where anything of it is split.
    record: AttentionRecord | None = None

    @property
    def place(self) -> str:
        """Where it is in the source, for sentences: ``" at model.py:7"``."""
        source = node_source(self.first)
        return f" at {source}" if source else ""


class Unfused:
    """The attentions of a program that are written out: every softmax over keys, with the products around it."""

    def __init__(self, graph: Graph) -> None:
        order = {node: i for i, node in enumerate(graph.nodes)}
        found = (_around(node, order) for node in graph.nodes if node.target in family("softmax"))
        #: In the order of the graph.
        self.attentions = [one for one in found if one is not None]
        #: A product -> what is known of it, and the attention that it is part of, the first of several.
        products = ((one, p) for one in reversed(self.attentions) for p in reversed((*one.scores, *one.results)))
        self.products = {p.node: (one, p) for one, p in products}
        #: Those that have something split, and linear ones, for the report (*unfused_report* finds them).
        self.reported: list[Written] = []


def unfused_of(program: Program) -> Unfused:
    """The attentions of a program that are written out; found once."""
    if program.unfused is None:
        program.unfused = Unfused(program.graph)
    found: Unfused = program.unfused
    return found


def _around(softmax: Node, order: dict[Node, int]) -> Written | None:
    rank = len(shape_of(softmax))
    if not rank:
        return None
    dim = Call(softmax).dim("dim", rank)
    (source,) = Call(softmax).operands
    before = _followed(source, dim, lambda node, at: _operands(node, at) if node.target in _PASSED else ())
    scores = {
        node: made
        for node, at in before.items()
        if node.target not in _PASSED and (made := _makes_scores(node, at)) is not None
    }
    if not scores:
        return None
    after = _followed(softmax, dim, _users)
    ends = (_makes_result(user, node, at) for node, at in after.items() for user in node.users)
    results = {p.node: p for p in ends if p is not None}
    if not results:
        return None
    inside = {
        *reachable(scores, lambda n: [m for m in n.users if m in before]),
        *reachable([p.operands[0] for p in results.values()], lambda n: [m for m in n.all_input_nodes if m in after]),
    }
    by_place = sorted(inside - set(scores) - {softmax}, key=order.__getitem__)
    names = (Call(node).op._schema.name.partition("::")[2] for node in by_place if node.target not in VIEWS)
    products = [scores[n] for n in sorted(scores, key=order.__getitem__)]
    return Written(
        products[0].node,
        frozenset(inside | {softmax, *results}),
        products,
        list(results.values()),
        tuple(dict.fromkeys(name for name in names if name not in names_of("in_sdpa"))),
    )


def _followed(start: Node, dim: int, near: Callable[[Node, int], Iterable[tuple[Node, int]]]) -> dict[Node, int]:
    """The values that have the dimension ``dim`` of ``start``, and where."""
    at = {start: dim}

    def step(node: Node) -> Iterator[Node]:
        for other, place in near(node, at[node]):
            at.setdefault(other, place)
            yield other

    return {node: at[node] for node in reachable([start], step)}


def _kept(node: Node, i: int) -> dict[int, int]:
    """Dimensions of an operand that are dimensions of the result, and nothing else: which."""
    if node.target in family("cat", "slice", "split"):
        return {d: d for d in range(len(shape_of(Call(node).operands[i])))}
    rule = rule_of(node)
    dims = (rule.operands[i] if rule is not None else None) or ()
    out = rule.results[0] if rule is not None else ()
    return {d: out.index(factors) for d, factors in enumerate(dims) if len(factors) == 1 and factors in out}


def _operands(node: Node, dim: int) -> Iterator[tuple[Node, int]]:
    """The operands that have the dimension ``dim`` of a result, and where."""
    for i, operand in enumerate(Call(node).operands):
        yield from ((operand, at) for at, result in _kept(node, i).items() if result == dim)


def _users(node: Node, dim: int) -> Iterator[tuple[Node, int]]:
    """The results that have the dimension ``dim`` of their operand ``node``, and where."""
    for user in node.users:
        if user.target in _PASSED and tensor_value(user) is not None:
            at = _kept(user, Call(user).operands.index(node)).get(dim)
            if at is not None:
                yield user, at


def _factors(node: Node) -> tuple[OpRule, int, list[set[str]]] | None:
    """Of a product of two values: its rule, the position of the first, and the factors of both."""
    rule = rule_of(node) if node.target in PRODUCTS else None
    if rule is None:
        return None
    first = 1 if node.target in family("addmm") else 0
    sides = [{f for d in dims or () for f in d} for dims in rule.operands[first:]]
    return (rule, first, sides) if len(sides) == 2 else None


def _makes_scores(node: Node, dim: int) -> Product | None:
    """A product in whose result the dimension ``dim`` belongs to one of two computed values: to the keys."""
    known = _factors(node)
    if known is None or len(known[0].results[0][dim]) != 1:
        return None
    rule, first, sides = known
    (column,) = rule.results[0][dim]
    keys = 1 if column in sides[1] else 0
    rows = [f for dims in rule.results[0] for f in dims if f in sides[1 - keys] and f not in sides[keys]]
    if column in sides[1 - keys] or not rows or not is_computed(Call(node).operands[first + keys]):
        return None
    return Product(node, rule, first + 1 - keys, first + keys, column, rows[-1])


def _makes_result(node: Node, weights: Node, dim: int) -> Product | None:
    """A product that sums over the dimension ``dim`` of ``weights``, and of a computed value."""
    known = _factors(node)
    if known is None:
        return None
    rule, first, sides = known
    given = Call(node).operands[first:]
    left = given.index(weights) if weights in given else 0
    dims = rule.operands[first + left]
    if weights not in given or dims is None or len(dims[dim]) != 1:
        return None
    (column,) = dims[dim]
    kept = any(column in d for d in rule.results[0])
    if kept or column not in sides[1 - left] or not is_computed(given[1 - left]):
        return None
    return Product(node, rule, first + left, first + 1 - left, column)


def is_computed(node: Node) -> bool:
    """Whether a value is more than a parameter, seen in another way."""
    node = source_of(node, family("cheap"))
    return not (isinstance(node.meta.get("val"), torch.nn.Parameter) or facts(node).is_parameter)


class UnfusedProducts(Special):
    """Products of attentions that are written out: rows stay split by the tokens of the queries."""

    ops = PRODUCTS

    def decide(self, call: Call, types: list[Type], program: Program) -> Decision | None:
        """A decision by another rule; None for anything else, and where the operator's own will do."""
        found = unfused_of(program).products.get(call.node)
        if found is None:
            return None
        one, it = found
        types, rule = list(types), it.rule
        keys = types[it.right]
        if it.row and not isinstance(types[it.left], Shard):
            placed = locate(keys, rule.operands[it.right], rule.sizes) if isinstance(keys, Shard) else None
            sequence = _split_of_queries(it, keys, program) if placed and placed.factor == it.column else None
            dims = rule.operands[it.left]
            if sequence is None or dims is None:
                return None
            types[it.left] = Shard(dims.index((it.row,)), sequence, origin=f"queries of the attention{one.place}")
        queries = types[it.left]
        located = locate(queries, rule.operands[it.left], rule.sizes) if isinstance(queries, Shard) else None
        if located is None or located.factor == it.column:
            return None
        rule = replace(rule, whole=rule.whole | {it.column}, reduction=rule.reduction - {it.column})
        decision = decide(call, rule, types, *weights(call))
        if not isinstance(keys, Shard) or keys.same_as(decision.operands[it.right]):
            return decision
        what = "keys" if it.row else "values"
        reason = f"the {what} of the attention that is written out{one.place} are needed whole"
        return replace(decision, reason=reason, remedy="" if one.strange else _REMEDY)


def _split_of_queries(it: Product, keys: Type, program: Program) -> Sequence | None:
    """How whole queries are split beside split keys; None if their scores are few, so that these may be gathered."""
    assert isinstance(keys, Shard)
    rows = it.rule.sizes[it.row]
    if same_length(rows, keys.sequence.length) and keys.plain:
        return keys.sequence
    # Queries may come in chunks: what counts are the scores of all of them, and keys and values once.
    source = source_of(it.operands[1])
    chunks = [one for one in unfused_of(program).attentions if source_of(one.scores[0].operands[1]) is source]
    scores = sum(hint(product(shape_of(one.scores[0].node))) for one in chunks)
    values = {source_of(p.operands[1]): p.operands[1] for one in chunks for p in one.results}
    moved = sum(hint(product(shape_of(x))) for x in (it.operands[1], *values.values()))
    return Sequence.of(rows) if scores > moved else None


def source_of(node: Node, through: Container[Any] = VIEWS) -> Node:
    """What a value is a view of, or is made of by other operators of one tensor."""
    while node.target in through and (first := tensor_nodes(node.args)):
        node = first[0]
    return node
