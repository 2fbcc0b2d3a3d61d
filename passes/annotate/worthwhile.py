"""worthwhile: a graph that is split only because those before it were has to be worth it.

Splitting again what a graph break made whole (*carry*) sends nothing, but what the graph returns is gathered.  That
pays if matrices are multiplied on shards in between.  How the outputs were split is in the report, so a graph that runs
whole passes the split on.
"""

from __future__ import annotations

from dataclasses import replace

from fxsp.errors import RunsWhole
from fxsp.passes.base import Pass, Program
from fxsp.passes.graph import facts
from fxsp.passes.work import has_work
from fxsp.types import Replicate

__all__ = ["Worthwhile"]


class Worthwhile(Pass):
    """After this pass a graph with carried splits multiplies matrices on shards."""

    def apply(self, program: Program) -> Program:
        carried = program.carried
        if carried and not _multiplies_shards(program):
            program.report.plan[-len(carried) :] = [replace(record, applied=False) for record in carried]
            raise RunsWhole("the plan says nothing about it, and it has too little to do for splitting it again")
        return program


def _multiplies_shards(program: Program) -> bool:
    return any(
        has_work(node) and any(not isinstance(t, Replicate) for t in decision.results)
        for node in program.whole.graph.nodes
        if (decision := facts(node).decision) is not None
    )
