"""Splits from earlier graphs become markers in this one, where the plan itself says nothing about it.

Input, the second graph of a block with a graph break in it (no plan entry names a value of this graph)::

    %l_stack0_ : placeholder[target=L_stack0_]
    %y : call_function[target=torch.relu](args = (%l_stack0_,))

Output::

    %l_stack0_ : placeholder[target=L_stack0_]
    %annotate : call_function[target=fxsp.annotate.default](args = (%l_stack0_, shard, 1, -1, <root>[x]: ...))
    %y : call_function[target=torch.relu](args = (%annotate,))

Afterwards a graph that the plan does not split is split like those before it; the graph computes what it did before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fxsp import torch_internals
from fxsp.capture.graph_breaks import Split, same_view
from fxsp.capture.module_calls import Captured
from fxsp.capture.resolve import ResolvedEntry, resolve_plan
from fxsp.errors import RunsWhole
from fxsp.kernels.ops import fxsp_ops
from fxsp.passes.annotate.annotate import remove_annotations
from fxsp.passes.annotate.dynamo_graph import written_by
from fxsp.passes.base import Pass, Program
from fxsp.passes.normalize.islands import closed_nodes
from fxsp.plan import PlanEntry, SequenceParallelInput
from fxsp.process_groups import missing_group
from fxsp.report import PlanRecord

__all__ = ["Carry", "carry"]

EMPTY_PLAN = "the plan is empty: it names no module and no value"


class Carry(Pass):
    """After this pass something is split: by the plan, or because it was before."""

    def apply(self, program: Program) -> Program:
        captured, report = program.captured, program.report
        assert captured is not None
        if program.ranks.size == 1:
            missing = "" if program.ranks.group else missing_group()
            alone = EMPTY_PLAN if captured.entries == () else "one rank"
            raise RunsWhole(f"one rank. {missing}" if missing else alone, remedy=None)
        if captured.entries is None:
            program.inferring = not program.arrivals
            return program
        if captured.part is not None and not _is_about(captured, report.plan, program.arrivals):
            remove_annotations(program.gm)
            report.plan.clear()
            report.note(f"the plan of {type(captured.root).__name__} says nothing about this part of it")
            captured.entries, program.inferring = None, not program.arrivals
            return program
        program.carried = carry(program.gm, captured, captured.entries)
        report.plan.extend(program.carried)
        if program.carried:  # what the plan did not ask for is never refused
            program.options = replace(program.options, strict=False)
        program.captured = None  # it holds the model
        if program.arrivals or any(record.applied for record in report.plan):
            return program
        single = next((record for record in report.plan if record.single), None)
        if single is not None:  # a step of decoding: as right as can be
            raise RunsWhole(f"there is nothing to split: of {single.entry}, {single.detail}", remedy=None)
        raise RunsWhole("no entry of the plan applies to this graph" if captured.entries else EMPTY_PLAN)


def _is_about(capture: Captured, records: Sequence[PlanRecord], arrivals: Mapping[int, Any]) -> bool:
    """Whether the plan of a model says what is split in a part of it that is compiled by itself.

    It does where entries apply, unless others split what the modules around it are called with: nothing does that, and
    what would come of it is not known.
    """
    assert capture.root is not None
    applied = {record.entry for record in records if record.applied}
    if not applied or arrivals:
        return bool(applied)
    around = {id(module) for module in torch_internals.calls_under_way()}
    missed = [row for row in resolve_plan(capture.entries or (), capture.root) if str(row) not in applied]
    return not any(id(row.module) in around and not row.entry.is_output for row in missed)


def carry(gm: fx.GraphModule, capture: Captured, entries: Sequence[PlanEntry]) -> list[PlanRecord]:
    """Insert an annotation for every input that was split before, in place; returns a record for each.

    Nothing is inserted where an annotation of the plan splits something already: the plan knows best.
    """
    if capture.root is None or any(_splits(node) for m in gm.modules() for node in _nodes(m)):
        return []
    rows = [row for row in resolve_plan(entries, capture.root) if not row.entry.is_output]
    closed, records = closed_nodes(gm), []
    inputs = gm.graph.find_nodes(op="placeholder")
    for node in inputs:
        example = torch_internals.input_example(node)
        if not isinstance(example, torch.Tensor) or isinstance(example, torch.nn.Parameter):
            continue
        split = capture.splits.find(example) or _argument(capture, rows, example)
        users = [user for user in node.users if user.op != "output" and user not in closed]
        if split is None or not users or written_by(gm.graph, node):
            continue
        if not split.dim < example.ndim or not max(split.text, 0) < example.shape[split.dim]:
            continue
        entry = f"{split.name}: split before this graph began"
        with gm.graph.inserting_after(inputs[-1]):
            args = (node, "shard", split.dim, split.text, entry)
            new = gm.graph.call_function(fxsp_ops.annotate.default, args)
        new.meta["example_value"] = node.meta["example_value"]
        for user in users:
            user.replace_input_with(node, new)
        records.append(PlanRecord(entry, True, f"{list(example.shape)} along {split.dim}"))
    if records:
        gm.graph.lint()
        gm.recompile()
    return records


def _nodes(module: torch.nn.Module) -> list[fx.Node]:
    return list(module.graph.nodes) if isinstance(module, fx.GraphModule) else []


def _splits(node: fx.Node) -> bool:
    return node.target is fxsp_ops.annotate.default and node.args[1] == "shard"


def _argument(capture: Captured, rows: list[ResolvedEntry], example: torch.Tensor) -> Split | None:
    """The split of an argument that the plan names, of a call that is under way outside of this graph.

    The variable may hold another value by now, with its tokens elsewhere: a guess that may cost time, nothing else.
    """
    for module, arguments in capture.around:
        for row in rows:
            if row.module is not module or type(row.entry.spec) is not SequenceParallelInput:
                continue
            value: Any = arguments.get(str(row.entry.target))
            if row.entry.part is not None:
                several = isinstance(value, (list, tuple)) and len(value) == row.entry.part[1]
                value = value[row.entry.part[0]] if several else None
            expected = row.entry.spec.expected_dims
            fits = expected in (None, example.ndim) and -example.ndim <= row.entry.dim < example.ndim
            if fits and same_view(value, example):
                return Split(row.entry.dim % example.ndim, name=str(row).partition(":")[0])
    return None
