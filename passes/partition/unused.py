"""Plan entries without effect: a split that is lost before anything worth splitting ran on it.

A graph input, or what is cheap to compute from inputs, can be had whole without communication.  So no gather is
reported where a convolution, say, takes a split input whole; but what follows then runs whole on every rank, and that
is what the report has to say.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from fxsp.errors import StrictError
from fxsp.passes.attention.operators import ATTENTION_OPS
from fxsp.passes.base import Program
from fxsp.passes.graph import facts, type_of
from fxsp.passes.propagate.propagate import is_annotate
from fxsp.passes.rules.decide import Decision
from fxsp.passes.work import has_work
from fxsp.report import GatherRecord
from fxsp.source import module_path, node_source
from fxsp.types import Shard

__all__ = ["report_idle"]


def report_idle(program: Program) -> None:
    """Record an implicit gather, of no bytes, for every operator that ends such a split; an error under ``strict``."""
    reported: set[Node] = set()
    for node in program.graph.nodes:
        if not is_annotate(node) or node.args[1] != "shard" or not isinstance(type_of(node), Shard):
            continue
        for taker, reason in _takers(node):
            if taker not in reported:
                reported.add(taker)
                _record(program, taker, f"{reason}; nothing of {node.args[4]} runs on shards before it")


def _takers(annotation: Node) -> list[tuple[Node, str]]:
    """The calls that take whole what is split by ``annotation``; none if some work is done on its shards."""
    found: list[tuple[Node, str]] = []
    for node in _split_from(annotation):
        for user in node.users:
            decision = facts(user).decision
            if not isinstance(decision, Decision):
                continue
            if _is_split(user):
                if has_work(user):
                    return []
            elif facts(node).free and decision.reason and _leads_to_work(user):
                found.append((user, decision.reason))
    return found


def _leads_to_work(node: Node) -> bool:
    """Whether ``node``, or what is computed from its result, does something worth splitting, up to an attention: that
    may take a mask as it likes.
    """
    seen, queue = {node}, [node]
    for one in queue:
        if one.target in ATTENTION_OPS:
            continue
        if has_work(one):
            return True
        queue += [user for user in one.users if user not in seen]
        seen.update(queue)
    return False


def _split_from(annotation: Node) -> Iterator[Node]:
    """``annotation`` and the values computed from it that are split."""
    seen, queue = {annotation}, [annotation]
    for node in queue:
        yield node
        queue += [user for user in node.users if user not in seen and _is_split(user)]
        seen.update(queue)


def _is_split(node: Node) -> bool:
    type_ = facts(node).type
    return isinstance(type_, Shard) or (isinstance(type_, tuple) and any(isinstance(t, Shard) for t in type_))


def _record(program: Program, node: Node, reason: str) -> None:
    record = GatherRecord(str(node.target), module_path(node), node_source(node), reason, 0)
    if program.options.strict:
        raise StrictError(f"implicit gather: {record}. With strict=True this is an error: annotate a later value")
    program.report.implicit_gathers.append(record)
