"""The pipeline, and the runner that observes it: all between Dynamo's graph and the program of one rank.

Passes only transform (see :mod:`fxsp.passes.base`); the runner times them, checks what they ensure, and shows the graph
after each to who observes.  A stage, its pass, the file of the pass and its test have one name.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from fxsp.lengths import equal_lengths, sizes_at_hand
from fxsp.passes.accounting.backward import Backward
from fxsp.passes.accounting.device_memory import DeviceMemory
from fxsp.passes.annotate.annotate import Annotate
from fxsp.passes.annotate.carry import Carry
from fxsp.passes.annotate.worthwhile import Worthwhile
from fxsp.passes.attention.degrees import Degrees
from fxsp.passes.attention.lower_attention import LowerAttention
from fxsp.passes.attention.unfused_report import UnfusedReport
from fxsp.passes.base import Pass, Program
from fxsp.passes.capture import Capture
from fxsp.passes.functionalize.functionalize import Functionalize
from fxsp.passes.infer.infer import Infer
from fxsp.passes.masks.masks import Masks
from fxsp.passes.normalize.normalize import Normalize
from fxsp.passes.partition.partition import Partition
from fxsp.passes.propagate.propagate import Propagate
from fxsp.passes.propagate.shifted_losses import ShiftedLosses
from fxsp.passes.propagate.zigzag import Zigzag
from fxsp.passes.verify import verify_graph, verify_local, verify_types
from fxsp.torch_internals import known_equalities, unseen_by_saving_hooks

__all__ = [
    "FORMER_NAMES",
    "PIPELINE",
    "STAGES",
    "Runner",
    "Stage",
    "compile_program",
    "partition_program",
    "stage_named",
]


@dataclass(frozen=True)
class Stage:
    """A pass, and the check of what it ensures."""

    run: Pass
    check: Callable[[Program], None] = verify_graph

    @property
    def name(self) -> str:
        return self.run.name


PIPELINE: tuple[Stage, ...] = (
    # While Dynamo's graph is as Dynamo made it: its nodes are what was recorded of module calls.
    Stage(Capture()),
    Stage(Annotate()),
    # After the plan, which knows best: only where it splits nothing.
    Stage(Carry()),
    Stage(Normalize()),
    Stage(Functionalize()),
    # Before types: a causal mask that became the flag needs none, and what computed it is gone.
    Stage(Masks()),
    # Where no plan was given; masks are what they mean, as they will be when attentions are priced.
    Stage(Infer()),
    # Types are needed before anything is rewritten: a rule reads the global shapes.
    Stage(Propagate(), verify_types),
    # A loss of scores that are split and would be gathered to be cut; types are found once more.
    Stage(ShiftedLosses(), verify_types),
    # Which tokens a rank holds depends on how attentions will run; it changes the types, and nothing else.
    Stage(Zigzag(), verify_types),
    # Conversions and local sizes in one sweep; attention stays one node, because its operands are only now local.
    Stage(Partition(), verify_local),
    # How the outputs were split is known, and nothing was done in vain but the sweep.
    Stage(Worthwhile(), verify_local),
    # Its collectives move local layouts that no later pass may change.
    Stage(LowerAttention(), verify_local),
    # From here on what there is gets counted, and no value changes.
    Stage(Backward()),
    # It counts collectives of both directions, and may find more attentions that do not follow the degrees.
    Stage(UnfusedReport()),
    Stage(Degrees()),
    # Last: it says who writes what is sent, which is no part of what a graph means.
    Stage(DeviceMemory()),
)

#: Every stage that can be printed, in order.
STAGES = tuple(stage.name for stage in PIPELINE)
#: What stages were called before they were called like their passes: these names are understood, too.
FORMER_NAMES = {
    "captured": "capture",
    "annotated": "annotate",
    "normalized": "normalize",
    "functionalized": "functionalize",
    "masked": "masks",
    "propagated": "propagate",
    "shifted": "shifted_losses",
    "laid_out": "zigzag",
    "local": "partition",
    "exchanged": "lower_attention",
    "partitioned": "device_memory",
}


def stage_named(name: str) -> str:
    """The stage of a name, its former one or its own."""
    return FORMER_NAMES.get(name, name)


_FUNCTIONAL = STAGES.index("functionalize") + 1


@dataclass
class Runner:
    """Runs passes; ``observe(name, program)`` is called after each."""

    observe: Callable[[str, Program], None] = lambda name, program: None
    #: Check what each pass ensures (always the types; local shapes on demand, because that runs the graph on fakes).
    check: bool = field(default_factory=lambda: os.environ.get("FXSP_CHECK", "0") == "1")

    def run(self, program: Program, stages: tuple[Stage, ...]) -> Program:
        for stage in stages:
            start = time.perf_counter()
            program = stage.run.apply(program)
            program.report.timings[stage.name] = time.perf_counter() - start
            if self.check or stage.check is verify_types:
                stage.check(program)
            self.observe(stage.name, program)
        return program


def compile_program(program: Program, runner: Runner) -> Program:
    """Dynamo's graph -> the program of one rank; raises :class:`~fxsp.errors.RunsWhole` where it shall stay whole."""
    # A checkpoint around the call counts what is saved in it: not what a trace saves.
    with unseen_by_saving_hooks():
        return partition_program(runner.run(program, PIPELINE[:_FUNCTIONAL]), runner)


def partition_program(program: Program, runner: Runner | None = None) -> Program:
    """An annotated, normalized, functional program -> the program of one rank, with visible collectives."""
    # What tracing has found out about lengths is known now, and holds for all that reads them.
    with equal_lengths(known_equalities(program.gm)), sizes_at_hand(program.sizes):
        return (runner or Runner()).run(program, PIPELINE[_FUNCTIONAL:])
