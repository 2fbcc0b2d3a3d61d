"""Dynamo's graph as the program of one rank, or as it was; and what is said of it.  All who compile enter here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from fxsp import torch_internals
from fxsp.config import Options
from fxsp.errors import RunsWhole, UnsupportedError
from fxsp.inner import needs_values
from fxsp.inspection.stages import StageWriter
from fxsp.passes.annotate.annotate import remove_annotations
from fxsp.passes.base import Program
from fxsp.passes.graph import facts
from fxsp.passes.pipeline import Runner, compile_program
from fxsp.passes.verify import infer_local
from fxsp.report import Report
from fxsp.said import say_degrees, say_gathers, say_outputs, say_share, say_unsharded
from fxsp.types import Ranks, Shard, shape_on_rank

__all__ = ["compile_graph", "give_local_values", "is_training", "local_examples"]


def compile_graph(
    gm: GraphModule,
    inputs: Sequence[Any],
    options: Options,
    ranks: Ranks,
    stages: StageWriter | None = None,
    root: torch.nn.Module | None = None,
    arrivals: Mapping[int, Shard] | None = None,
    split_outputs: bool = False,
) -> tuple[Report, Program | None]:
    """Dynamo's graph as the program of one rank, up to the inner compiler; no program where it stays whole.

    ``root`` is the module that the plan is for, where that is known; what is unsupported in it stays whole, too.
    ``arrivals`` are the types of inputs, by position, of which there are but the rows of this rank; ``inputs`` have
    their global shapes nevertheless.  ``split_outputs`` says that outputs may stay split (``program.left_split``).
    Where it stays whole, ``gm`` computes what it did before, and the report says why.
    """
    writer = stages or StageWriter(options.print, ranks)
    program = Program(gm, ranks, training=is_training(inputs), options=options, inputs=inputs, root=root)
    program.arrivals, program.split_outputs = arrivals or {}, split_outputs or options.outputs == "split"
    report = program.report
    try:
        compile_program(program, Runner(writer.stage))
    except UnsupportedError as error:
        # A split that no plan asked for here is no reason to refuse anything.
        if not isinstance(error, RunsWhole) and not program.carried and not program.inferring and root is None:
            raise
        report.runs_whole(str(error))
        remedy = error.remedy if isinstance(error, RunsWhole) else RunsWhole.REMEDY
        if remedy is not None:
            say_unsharded(report, remedy, first=ranks.rank == 0)
        remove_annotations(gm)
        return report, None
    torch_internals.carry_dynamo_facts(gm, program.gm)
    if needs_values(options.inner):
        # AOTAutograd traces the local graph again; without it the local values have to be known here.
        give_local_values(program)
    say_gathers(program.report, first=program.ranks.rank == 0)
    say_share(program)
    say_outputs(program)
    say_degrees(program)
    return report, program


def give_local_values(program: Program) -> None:
    """The fakes of one rank as those of the program's nodes, for an inner compiler that traces nothing itself."""
    infer_local(program)
    for node in program.graph.nodes:
        node.meta["val"] = facts(node).local


def local_examples(inputs: Sequence[Any], program: Program) -> list[Any]:
    """The inputs of a program as one rank has them: of those that arrive split, fakes of local shape."""
    found = list(inputs)
    for position, type_ in program.arrivals.items():
        value = inputs[position]
        mode = torch_internals.fake_mode_of(value)
        shape = shape_on_rank(value.shape, type_, program.ranks.size)
        with mode:
            local = torch.empty(
                [torch_internals.symbolic_size(n, mode) for n in shape], dtype=value.dtype, device=value.device
            )
        found[position] = local.requires_grad_(value.requires_grad)
    return found


def is_training(inputs: Sequence[Any]) -> bool:
    """Whether gradients may be asked for."""
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)
