"""A split that only goes on has to be worth it, and a graph that is not split again passes it on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxsp.capture.graph_breaks import Split
from fxsp.errors import RunsWhole
from fxsp.passes.base import Program
from fxsp.passes.pipeline import partition_program
from fxsp.report import PlanRecord
from fxsp.types import Ranks
from tracing import shard, trace

X, W = torch.randn(2, 5, 8), torch.randn(8, 8)


def _little(x: Tensor, w: Tensor) -> tuple[Tensor]:
    return (shard(x).softmax(-1),)


def _multiplies(x: Tensor, w: Tensor) -> Tensor:
    return shard(x) @ w


def _multiplies_whole(x: Tensor, w: Tensor) -> Tensor:
    return shard(x).softmax(-1) + (x @ w).sum(1, keepdim=True)


def _program(function: object, carried: bool) -> Program:
    program = Program(trace(function, X, W), Ranks(0, 2, "simulated"))  # type: ignore[arg-type]
    record = PlanRecord("<root>[x]: split before this graph began", True)
    program.report.plan += [PlanRecord("<root>: gather", True), record]
    program.carried = [record] if carried else []
    return program


@pytest.mark.parametrize(("function", "carried"), [(_multiplies, True), (_little, False), (_multiplies_whole, False)])
def test_what_the_plan_splits_and_what_pays_is_split(function: object, carried: bool) -> None:
    program = partition_program(_program(function, carried))
    assert all(record.applied for record in program.report.plan)
    assert [record.kind for record in program.report.collectives] == ["all_gather"]


def test_too_little_to_do() -> None:
    program = _program(_little, carried=True)
    with pytest.raises(RunsWhole, match="too little to do"):
        partition_program(program)
    assert [record.applied for record in program.report.plan] == [True, False]
    assert program.report.split_outputs == [(0, Split(1, -1, "split dim 1"))]
    assert "lower_attention" not in program.report.timings
