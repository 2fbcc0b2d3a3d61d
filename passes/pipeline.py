"""The pipeline, and the runner that observes it.

Passes only transform (see :mod:`fxsp.passes.base`); the runner times them, checks what they ensure, and keeps the
printed stages that were asked for.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from fxsp.passes.accounting.backward import backward_collectives
from fxsp.passes.accounting.device_memory import DeviceMemory
from fxsp.passes.attention.degrees import report_degrees
from fxsp.passes.attention.lower import LowerAttention
from fxsp.passes.attention.unfused_report import report_written
from fxsp.passes.base import Pass, Program
from fxsp.passes.masks.masks import Masks
from fxsp.passes.partition.partition import Partition
from fxsp.passes.propagate.propagate import Propagate
from fxsp.passes.propagate.shifted_losses import ShiftedLosses
from fxsp.passes.propagate.zigzag import Layout
from fxsp.passes.verify import verify_graph, verify_local, verify_types
from fxsp.torch_internals import known_equalities
from fxsp.types import equal_lengths

__all__ = ["PIPELINE", "STAGES", "Runner", "Stage", "partition_program"]


@dataclass(frozen=True)
class Stage:
    """A pass, what the graph is called after it, and the check of what the pass ensures."""

    run: Pass
    result: str
    check: Callable[[Program], None]


PIPELINE: tuple[Stage, ...] = (
    # Before types: a causal mask that became the flag needs none, and what computed it is gone.
    Stage(Masks(), "masked", verify_graph),
    # Types are needed before anything is rewritten: a rule reads the global shapes.
    Stage(Propagate(), "propagated", verify_types),
    # A loss of scores that are split and would be gathered to be cut; types are found once more.
    Stage(ShiftedLosses(), "shifted", verify_types),
    # Which tokens a rank holds depends on how attentions will run; it changes the types, and nothing else.
    Stage(Layout(), "laid_out", verify_types),
    # Conversions and local sizes in one sweep; attention stays one node, because its operands are only now local.
    Stage(Partition(), "local", verify_local),
    # Its collectives move local layouts that no later pass may change.
    Stage(LowerAttention(), "exchanged", verify_local),
    # Last: it counts what there is, and changes no value.
    Stage(DeviceMemory(), "partitioned", verify_graph),
)

#: Every stage that can be printed, in order; the first four are made before the pipeline runs.
STAGES = ("captured", "annotated", "normalized", "functionalized", *(s.result for s in PIPELINE))


@dataclass
class Runner:
    """Runs passes; ``observe(name, program)`` is called after each for the stages in ``watch``."""

    watch: frozenset[str] = frozenset()
    observe: Callable[[str, Program], None] | None = None
    #: Check what each pass ensures (always the types; local shapes on demand, because that runs the graph on fakes).
    check: bool = field(default_factory=lambda: os.environ.get("FXSP_CHECK", "0") == "1")

    def run(self, program: Program, stages: tuple[Stage, ...] = PIPELINE) -> Program:
        for stage in stages:
            start = time.perf_counter()
            program = stage.run.apply(program)
            program.report.timings[stage.result] = time.perf_counter() - start
            if self.check or stage.check is verify_types:
                stage.check(program)
            self.stage(stage.result, program)
        return program

    def stage(self, name: str, program: Program) -> None:
        if self.observe is not None and name in self.watch:
            self.observe(name, program)


def partition_program(program: Program, runner: Runner | None = None) -> Program:
    """An annotated, normalized, functional program -> the program of one rank, with visible collectives."""
    with equal_lengths(known_equalities(program.gm)):
        program = (runner or Runner()).run(program)
        program.report.backward.extend(backward_collectives(program))
        report_written(program)
        report_degrees(program)
    return program
