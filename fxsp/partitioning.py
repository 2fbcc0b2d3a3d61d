"""Dynamo's graph as the program of one rank: all between capture and the inner compiler, and what is said of it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule

from fxsp import torch_internals
from fxsp.capture.capture import capture
from fxsp.config import Options
from fxsp.errors import UnshardedWarning, UnsupportedError
from fxsp.inner import needs_values
from fxsp.inspection.stages import StageWriter
from fxsp.passes.annotate.annotate import annotate
from fxsp.passes.annotate.carry import carry, is_worth_splitting
from fxsp.passes.base import Program
from fxsp.passes.functionalize.functionalize import functionalize
from fxsp.passes.graph import facts, mark
from fxsp.passes.normalize.normalize import normalize
from fxsp.passes.pipeline import STAGES, Runner, partition_program
from fxsp.passes.propagate.propagate import is_annotate
from fxsp.passes.verify import infer_local
from fxsp.process_groups import missing_group
from fxsp.report import Report
from fxsp.said import EMPTY_PLAN, say_degrees, say_gathers, say_outputs, say_share, say_unsharded
from fxsp.source import input_name
from fxsp.types import Ranks

__all__ = ["compile_graph", "is_training"]


def compile_graph(
    gm: GraphModule,
    inputs: Sequence[Any],
    options: Options,
    ranks: Ranks,
    stages: StageWriter | None = None,
    root: torch.nn.Module | None = None,
) -> tuple[Report, Program | None]:
    """Dynamo's graph as the program of one rank, up to the inner compiler; no program where it stays whole.

    ``root`` is the module that the plan is for, where that is known; what is unsupported in it stays whole, too.
    Where it stays whole, ``gm`` computes what it did before, and the report says why.
    """
    _check_stages(options)
    report = Report()
    captured = capture(gm, options.plan, root)
    report.notes.extend(captured.notes)
    if captured.root is not None:
        report.root = type(captured.root).__name__
    translation = torch_internals.Translation.current()
    report.notes.extend(translation.said() if translation is not None else [])
    report.outputs.extend(map(input_name, translation.output_names(gm)) if translation is not None else [])
    runner = stages or StageWriter(options.print, ranks)
    runner.text("captured", gm, report)
    if captured.entries is None:
        report.unsharded = "no plan: give options={'plan': ...}, or the model a _sp_plan or _cp_plan"
        if ranks.size > 1:
            warnings.warn(UnshardedWarning(f"this graph is not split. {report.unsharded}"), stacklevel=2)
        return report, None
    report.plan.extend(annotate(gm, captured, captured.entries, ranks))
    carried = carry(gm, captured, captured.entries) if ranks.size > 1 else []
    report.plan.extend(carried)
    runner.text("annotated", gm, report)
    if ranks.size == 1:
        missing = "" if ranks.group else missing_group()
        report.unsharded = f"one rank. {missing}" if missing else "one rank" if captured.entries else EMPTY_PLAN
        return report, None
    if not any(record.applied for record in report.plan):
        single = next((record for record in report.plan if record.single), None)
        if single is not None:  # a step of decoding: as right as can be, so no warning
            report.unsharded = f"there is nothing to split: of {single.entry}, {single.detail}"
            return report, None
        report.unsharded = "no entry of the plan applies to this graph" if captured.entries else EMPTY_PLAN
        say_unsharded(report)
        return report, None
    try:
        strict = options.strict and not carried
        program = _partition(gm, inputs, replace(options, strict=strict), ranks, report, runner)
    except UnsupportedError as error:
        # A split that the plan did not ask for here is no reason to refuse anything.
        if not getattr(error, "whole_graph", False) and not carried and root is None:
            raise
        report.unsharded = str(error)
        say_unsharded(report)
        _remove_annotations(gm)
        return report, None
    if carried and not is_worth_splitting(program):
        report.unsharded = "the plan says nothing about it, and it has too little to do for splitting it again"
        report.plan[-len(carried) :] = [replace(record, applied=False) for record in carried]
        report.collectives.clear()
        report.backward.clear()
        report.implicit_gathers.clear()
        say_unsharded(report)
        _remove_annotations(gm)
        return report, None
    say_gathers(report)
    say_share(program, options.strict and not carried)
    say_outputs(program, options.strict and not carried)
    say_degrees(program)
    return report, program


def is_training(inputs: Sequence[Any]) -> bool:
    """Whether gradients may be asked for."""
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)


def _partition(
    gm: GraphModule,
    inputs: Sequence[Any],
    options: Options,
    ranks: Ranks,
    report: Report,
    runner: StageWriter,
) -> Program:
    start = time.perf_counter()
    try:
        normal = normalize(gm, inputs)
        report.timings["normalized"] = time.perf_counter() - start
        runner.text("normalized", normal, report)
        start = time.perf_counter()
        normal = functionalize(normal)
        report.timings["functionalized"] = time.perf_counter() - start
    except UnsupportedError as error:
        # Nothing is known about the types of such a graph: it can still run whole.
        error.whole_graph = True  # type: ignore[attr-defined]
        raise
    for node, value in zip(normal.graph.find_nodes(op="placeholder"), inputs, strict=True):
        mark(node, is_parameter=isinstance(value, torch.nn.Parameter))
    runner.text("functionalized", normal, report)
    program = Program(
        normal,
        ranks,
        report,
        training=is_training(inputs),
        options=options,
    )
    program = partition_program(program, Runner(runner.watch, runner.program))
    torch_internals.carry_dynamo_facts(gm, program.gm)
    if needs_values(options.inner):
        # AOTAutograd traces the local graph again; without it the local values have to be known here.
        infer_local(program)
        for node in program.graph.nodes:
            node.meta["val"] = facts(node).local
    return program


def _check_stages(options: Options) -> None:
    from fxsp.errors import OptionError
    from fxsp.plan import did_you_mean, listing

    for stage in options.print:
        if stage not in STAGES:
            raise OptionError(
                f"option 'print' names a stage {stage!r} that does not exist.{did_you_mean(stage, STAGES)}\n"
                f"  Stages: {listing(STAGES)}"
            )


def _remove_annotations(gm: GraphModule) -> None:
    for module in gm.modules():
        if not isinstance(module, GraphModule):
            continue
        for node in list(module.graph.nodes):
            if is_annotate(node):
                node.replace_all_uses_with(node.args[0])
                module.graph.erase_node(node)
        module.recompile()
