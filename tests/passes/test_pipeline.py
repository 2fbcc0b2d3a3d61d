"""Stages: each has the name of its pass, its file and its test; the runner times, checks and shows every one."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

import fxsp
import small
from fxsp.config import Options
from fxsp.errors import OptionError, RunsWhole, VerificationError
from fxsp.inspection.stages import StageWriter
from fxsp.passes.base import Pass, Program
from fxsp.passes.pipeline import FORMER_NAMES, PIPELINE, STAGES, Runner, Stage, partition_program, stage_named
from fxsp.passes.verify import verify_types
from fxsp.types import Ranks
from tracing import gather, shard, trace

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("stage", PIPELINE, ids=lambda stage: stage.name)
def test_a_pass_its_class_its_file_and_its_test_have_one_name(stage: Stage) -> None:
    kind = type(stage.run)
    assert isinstance(stage.run, Pass)
    assert kind.__name__ == "".join(part.capitalize() for part in stage.name.split("_"))
    assert Path(inspect.getfile(kind)).stem == stage.name
    found = [folder for folder in ("passes", "attention") if (TESTS / folder / f"test_{stage.name}.py").exists()]
    assert found, f"there is no test_{stage.name}.py"
    assert dataclasses.is_dataclass(kind)
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]


def test_names_are_told_apart() -> None:
    assert len(set(STAGES)) == len(STAGES)
    assert not set(FORMER_NAMES) & set(STAGES)
    assert set(FORMER_NAMES.values()) <= set(STAGES)
    order = [STAGES.index(stage) for stage in FORMER_NAMES.values()]
    assert order == sorted(order)


def _program(**options: Any) -> Program:
    x, w = torch.randn(2, 5, 8), torch.randn(8, 4)
    gm = trace(lambda x, w: gather(shard(x) @ w), x, w)
    return Program(gm, Ranks(0, 2, "simulated"), options=Options(**options))


def test_every_stage_is_timed_checked_and_shown() -> None:
    shown: list[str] = []
    program = partition_program(_program(), Runner(lambda name, program: shown.append(name)))
    assert tuple(shown) == STAGES[STAGES.index("masks") :]
    assert tuple(program.report.timings) == tuple(shown)


def test_a_stage_that_breaks_the_graph_is_caught() -> None:
    @dataclasses.dataclass(frozen=True)
    class Forgets:
        name: str = "forgets"

        def apply(self, program: Program) -> Program:
            return program

    with pytest.raises(VerificationError, match="no type"):
        Runner().run(_program(), (Stage(Forgets(), verify_types),))


def test_explain_has_all_stages() -> None:
    e = fxsp.explain(small.Model(), small.inputs(), world_size=2, plan=small.SPLIT)
    assert tuple(e.stages) == STAGES
    timings = e.results[0].report.timings
    assert tuple(timings) == STAGES
    for former, name in FORMER_NAMES.items():
        assert e.graph(former) == e.graph(name)
    assert e.graph() == e.graph("partitioned")
    assert e.diff() == e.diff("normalized", "partitioned")


def test_former_names_print_what_they_printed(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("propagated", "propagate", "partitioned")
    writer = StageWriter(names, Ranks(0, 2, "simulated"))
    report = partition_program(_program(), Runner(writer.stage)).report
    assert tuple(report.stages) == names
    assert report.stages["propagated"] == report.stages["propagate"]
    assert "S(1, [5])" in report.stages["propagated"]
    assert "▶ gather" in report.stages["partitioned"]
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if line.startswith("#")] == [f"# fxsp: {name}" for name in names]


def test_a_name_that_no_stage_has() -> None:
    with pytest.raises(OptionError, match="names a stage 'mask' that does not exist") as error:
        StageWriter(("mask",), Ranks(0, 2, "simulated"))
    assert 'Did you mean "masks"?' in str(error.value)
    assert ", ".join(STAGES[:3]) in str(error.value)
    assert "masked" not in str(error.value)
    assert stage_named("laid_out") == stage_named("zigzag") == "zigzag"


def test_a_graph_that_runs_whole_sends_nothing_and_says_why() -> None:
    """Also where a pass finds out after others have planned to send something."""

    class Reads(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = (x.cumsum(1) + x)[..., ::2]
            return y.as_strided((2, 5, 4), (40, 8, 2))

    (result,) = fxsp.explain(Reads(), small.inputs(), world_size=2, plan=small.SPLIT).results
    report = result.report
    assert result.program is None
    assert "as_strided" in report.unsharded
    assert "partition" not in report.timings
    assert not any((report.collectives, report.implicit_gathers, report.attentions, report.backward))


def test_what_runs_whole_is_unsupported_too() -> None:
    """Whoever runs a pass alone gets an error that says so."""
    assert issubclass(RunsWhole, fxsp.UnsupportedError)
    assert "fxsp.explain" in (RunsWhole("why").remedy or "")
