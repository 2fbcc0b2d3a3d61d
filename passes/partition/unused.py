"""Plan entries without effect: a split that is lost before anything worth splitting ran on it.

A graph input, or what is cheap to compute from inputs, can be had whole without communication.  So no gather is
reported where a convolution, say, takes a split input whole; but what follows then runs whole on every rank, and that
is what the report has to say.
"""

from __future__ import annotations

from torch.fx import Node

from fxsp.errors import StrictError
from fxsp.passes.attention.operators import ATTENTION_OPS
from fxsp.passes.base import Program
from fxsp.passes.graph import facts, is_split, reachable, type_of
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
    for node in reachable([annotation], lambda n: filter(is_split, n.users)):
        for user in node.users:
            decision = facts(user).decision
            if not isinstance(decision, Decision):
                continue
            if is_split(user):
                if has_work(user):
                    return []
            elif facts(node).free and decision.reason and _leads_to_work(user):
                found.append((user, decision.reason))
    return found


def _leads_to_work(node: Node) -> bool:
    """Whether ``node``, or what is computed from its result, does something worth splitting, up to an attention: that
    may take a mask as it likes.
    """
    found = reachable([node], lambda n: n.users, stop=lambda n: n.target in ATTENTION_OPS)
    return any(has_work(one) and one.target not in ATTENTION_OPS for one in found)


def _record(program: Program, node: Node, reason: str) -> None:
    record = GatherRecord(str(node.target), module_path(node), node_source(node), reason, 0)
    if program.options.strict:
        raise StrictError(f"implicit gather: {record}. With strict=True this is an error: annotate a later value")
    program.report.implicit_gathers.append(record)
