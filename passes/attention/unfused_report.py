"""unfused_report: what attention that is written out sends, and linear attention.

Linear attention is found once types are known: a product that sums over split tokens (of keys and values), whose sum
over the ranks is multiplied with split values (the queries)::

    %matmul   = matmul(%kT, %v)             P: a rank's summand of the sums of keys and values
    %matmul_1 = matmul(%q, %matmul)         S(1, [5])

Every node of an attention is marked before the graph is partitioned, so that the collectives that are written for its
nodes can be told from others.  They stay listed where they are; an attention's record says how many bytes are its own.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from fxsp.machine import Machine, Travel
from fxsp.passes.attention.choose import choose
from fxsp.passes.attention.cost import said
from fxsp.passes.attention.degrees import note_degree
from fxsp.passes.attention.question import Question
from fxsp.passes.attention.repeat_kv import repeated
from fxsp.passes.attention.unfused import PRODUCTS, VIEWS, Written, is_computed, source_of, unfused_of
from fxsp.passes.base import Pass, Program
from fxsp.passes.graph import Call, decision_of, facts, is_split, mark, reachable, shape_of, type_of
from fxsp.passes.rules.decide import locate
from fxsp.passes.rules.families import family
from fxsp.report import AttentionRecord
from fxsp.source import module_path, node_source
from fxsp.types import Length, Partial, Shard, as_length, product, quotient, same_length

__all__ = ["GATHERED", "LINEAR", "LOCAL", "SCORES", "WHOLE", "UnfusedReport", "mark_written", "record_written"]

#: Methods of attentions that are written out.
GATHERED = "gather_kv (written out)"
LOCAL = "local (written out)"
SCORES = "gathered scores (written out)"
WHOLE = "whole (written out)"
LINEAR = "linear"


def mark_written(program: Program) -> None:
    """Mark the nodes of attentions that are written out, before partitioning."""
    unfused = unfused_of(program)
    parts = ((one, (*one.scores, *one.results)) for one in unfused.attentions)
    found = [one for one, products in parts if any(is_split(x) for p in products for x in (p.node, *p.operands))]
    taken = {node for one in found for node in one.nodes}
    others = (node for node in program.graph.nodes if node not in taken)
    found += [Written(node, nodes) for node in others if (nodes := _linear(node)) is not None]
    unfused.reported = found
    for one in found:
        one.record = AttentionRecord(module_path(one.first) or program.report.root, node_source(one.first))
        for node in one.nodes:
            mark(node, written_attention=one)


def record_written(program: Program, node: Node) -> None:
    """Add the record of the attention that begins with ``node`` to the report, if one does."""
    one: Written | None = facts(node).written_attention
    if one is not None and one.record is not None and one.first is node:
        program.report.attentions.append(one.record)


def _linear(first: Node) -> frozenset[Node] | None:
    """The nodes of the linear attention whose sums of keys and values are made by ``first``."""
    if first.target not in PRODUCTS or not isinstance(facts(first).type, Partial):
        return None
    operands = Call(first).operands
    if len(operands) != 2 or not all(is_computed(x) for x in operands):
        return None
    inside = list(reachable([first], lambda n: [u for u in n.users if u.target in family("cheap") and not is_split(u)]))
    ends = [
        user
        for node in inside
        for user in node.users
        if user.target in PRODUCTS
        and is_split(user)
        and any(is_split(x) for x in user.all_input_nodes if x is not node)
    ]
    if not ends:
        return None
    return frozenset({*inside, *ends, *_normalizers(operands)})


def _normalizers(operands: list[Node]) -> Iterator[Node]:
    """Sums of the keys alone, by which the result is divided, and what takes them."""
    sources = {source_of(x) for x in operands}
    for node in sources:
        for view in (node, *(u for u in node.users if u.target in VIEWS)):
            for total in view.users:
                if total.target in family("sum") and isinstance(facts(total).type, Partial):
                    yield from (total, *total.users)


class UnfusedReport(Pass):
    """After this pass the records of attentions that are written out are complete."""

    def apply(self, program: Program) -> Program:
        found: list[Written] = program.unfused.reported if program.unfused is not None else []
        of = {node.name: facts(node).written_attention for node in program.graph.nodes} if found else {}
        for one in found:
            _complete(one, of, program)
        return program


def _complete(one: Written, of: dict[str, Written | None], program: Program) -> None:
    record = one.record
    assert record is not None
    forward, backward = (
        [r.bytes for r in records if of.get(r.value) is one]
        for records in (program.report.collectives, program.report.backward)
    )
    record.method = _method(one)
    record.bytes, back = (as_length(sum(sent, start=0)) for sent in (forward, backward))
    # Messages, the bytes of the backward pass, and the time: as for other attentions.
    moved = Travel("all_gather", program.ranks.size, len(forward) + len(backward), as_length(record.bytes + back))
    seconds = _machine(one.first, program).seconds([moved])
    record.detail = said(len(forward), back if program.training else None, len(backward), seconds)
    if record.method == LINEAR:
        record.detail += "; sums of keys and values over the tokens"
    elif record.method == GATHERED:
        record.rejected = _instead(one, program)
    if record.method in (GATHERED, SCORES, WHOLE):
        note_degree(program, one.first, record.method, (), "this attention is written out, and is not exchanged")


def _machine(node: Node, program: Program) -> Machine:
    return program.options.machine_for(node.meta["val"].device.type, program.ranks.size)


def _method(one: Written) -> str:
    if not one.scores:
        return LINEAR
    scores = one.scores[0]
    type_, rule = type_of(scores.node), scores.rule
    if not isinstance(type_, Shard):
        return WHOLE
    placed = locate(type_, rule.results[0], rule.sizes)
    if placed is not None and placed.factor == scores.column:
        return SCORES
    others = [p.operands[1] for p in (*one.scores, *one.results)]
    gathered = placed is not None and placed.factor == scores.row and any(map(is_split, others))
    return GATHERED if gathered else LOCAL


def _instead(one: Written, program: Program) -> tuple[tuple[str, str], ...]:
    """What ``scaled_dot_product_attention`` would cost in its place."""
    name = "scaled_dot_product_attention"
    if one.strange:
        return ((name, f"it has no {', '.join(one.strange)} between scores and result"),)
    question = _question(one, program)
    best = choose(question)[0] if question is not None else None
    if best is None or question is None:
        return ()
    return ((name, f"would be {best.name}: {best.text(_machine(one.first, program))}"),)


def _question(one: Written, program: Program) -> Question | None:
    """The same attention with queries ``[B, H, S, D]``, keys and values with the heads that they have."""
    scores, result = one.scores[0], one.results[0]
    (query, key), value = scores.operands, result.operands[1]
    rule, keys = scores.rule, type_of(key)
    queries = decision_of(scores.node).operands[scores.left]
    if not isinstance(queries, Shard) or not isinstance(keys, Shard):
        return None
    batch = [f for dims in rule.results[0] for f in dims if f not in (scores.row, scores.column)]
    rows, columns = rule.sizes[scores.row], rule.sizes[scores.column]
    lead = [rule.sizes[f] for f in batch]
    b, h = _heads(query, lead, rows)
    width, shapes = quotient(product(shape_of(query)), product((*lead, rows))), []
    for operand in (key, value):
        times = repeated(operand)[1]
        heads, wide = quotient(h, times), quotient(product(shape_of(operand)), product((b, h, columns)))
        if width is None or heads is None or wide is None:
            return None  # keys for all heads in one, or broadcast in other ways
        shapes.append((b, heads, columns, wide))
    k, v = shapes
    if width is None or not same_length(k[1], v[1]):
        return None
    repeat = h // k[1] if isinstance(h, int) and isinstance(k[1], int) else 1
    like = query.meta["val"]
    return Question((b, h, rows, width), k, v, queries.sequence, keys.sequence, like, repeat, program)


def _heads(query: Node, lead: list[Length], rows: Length) -> tuple[Length, Length]:
    """Batch and heads of an attention; where they are one dimension, they are looked for before it was made."""
    if len(lead) != 1:
        return product(lead[:-1]), product(lead[-1:])
    while query.target in VIEWS and len(shape_of(query)) != 4:
        query = query.all_input_nodes[0]
    shape = list(shape_of(query))
    at = next((i for i, n in enumerate(shape[:-1]) if same_length(n, rows)), None)
    if len(shape) == 4 and at is not None:
        batch, heads = (n for i, n in enumerate(shape[:-1]) if i != at)
        if same_length(product((batch, heads)), lead[0]):
            return batch, heads
    return 1, lead[0]
