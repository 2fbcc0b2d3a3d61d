"""Entries of a plan that do not apply, and say why; and entries that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from annotating import IN, OUT, Model, X, only_record, refused, run
from capturing import compiled
from fxsp.plan import SequenceParallelPartialInput

# --- what does not apply


@pytest.mark.parametrize(
    ("plan", "part"),
    [
        ({"two": {"x": IN(1, expected_dims=2)}}, "the tensor [2, 5, 4] is 3-D, not 2-D as expected_dims says"),
        ({"two": {"y": IN(1)}}, "the argument is not passed"),
        ({"two": {"n": IN(1)}}, "the argument is None"),
        ({"": {"text": IN(1)}}, "the argument is None"),
        ({"": {"number": IN(0)}}, "not used by the traced code"),
        ({"extra": {"input": IN(0)}}, "module was not called in this graph"),
        ({"extra": OUT(0)}, "module was not called in this graph"),
        ({"same": {"input": IN(0)}}, "the argument is not used during the call"),
    ],
)
def test_not_applied(plan: Any, part: str) -> None:
    class Passes(Model):
        def __init__(self) -> None:
            super().__init__()
            self.same = Input()

    class Input(nn.Module):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
            return input

    traced = run(plan, model=Passes())
    applied, detail = only_record(traced)
    assert not applied
    assert part in detail
    assert traced.annotations() == []


def test_an_empty_dimension_and_a_number() -> None:
    class Scale(nn.Module):
        def forward(self, x: torch.Tensor, by: Any) -> torch.Tensor:
            return x * by

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = Scale()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale(x, x.shape[0])

    plan = {"scale": {"x": IN(1), "by": IN(0)}}
    records = run(plan, torch.randn(2, 0, 4), model=Root()).records
    assert [r.detail for r in records] == [
        "dimension 1 of the tensor [2, 0, 4] is empty",
        "the argument is 2, not a tensor",
    ]
    fast, log = compiled(Root(), plan, dynamic=True)
    fast(torch.randn(3, 5, 4))
    assert log[0].records[1].detail == "the argument is a SymInt, not a tensor"


def test_forward_called_directly_is_reported() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear.forward(x)

    applied, detail = only_record(run({"linear": {"input": IN(1)}}, model=Linear()))
    assert not applied
    assert "is its forward called directly" in detail


def test_a_value_that_is_written_in_place_stays_as_it_is() -> None:
    class Writes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x[0] = 0
            return x * 2

    class Root(nn.Module):
        def __init__(self, views: bool) -> None:
            super().__init__()
            self.writes, self.relu, self.views = Writes(), nn.ReLU(), views

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.sin(x)
            y = self.relu(h)
            if self.views:
                h.view(-1).mul_(3)
                return self.relu(y) + h
            return self.writes(h) + h + y

    for views, plan in ((False, {"writes": {"x": IN(1)}}), (True, {"relu": {"input": IN(1)}})):
        traced = run(plan, model=Root(views))
        assert "written in place after the call began" in only_record(traced)[1]
    output = run({"relu": OUT(1)}, model=Root(True))
    assert only_record(output)[0]  # what is written is the argument, not the output


def test_a_write_before_the_call_does_no_harm() -> None:
    class Root(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.empty_like(x)
            h[:, ::2] = x[:, ::2]
            h[:, 1::2] = 0
            return self.extra(h)

    assert only_record(run({"extra": {"input": IN(1)}}, model=Root())) == (True, "[2, 5, 4] along 1")


def test_one_rank_is_checked_and_not_changed() -> None:
    plan = {"two": {"x": SequenceParallelPartialInput(1, "n")}, "extra": OUT(1)}
    traced = run(plan, X, torch.randn(3, 2), size=1)
    assert [(r.applied, r.detail) for r in traced.records] == [
        (True, "[2, 5, 4] along 1; one rank: nothing to split"),
        (False, "module was not called in this graph"),
    ]
    assert traced.annotations() == []
    fast, _ = compiled(Model(), {"two": {"x": IN(7)}}, size=1)
    with pytest.raises(Exception, match="dimension 7 is out of range"):
        fast(X)


# --- what is wrong


@pytest.mark.parametrize(
    ("plan", "parts"),
    [
        (
            {"two": {"x": IN(3)}},
            ["`two[x]: SequenceParallelInput(split_dim=3)`", "dimension 3 is out of range", "[2, 5, 4] is 3-D"],
        ),
        ({"two": {0: IN(-4, split_output=True)}}, ["`two[0]: ", "dimension -4 is out of range"]),
        (
            {"two": OUT(1)},
            ["`two: SequenceParallelOutput", "returns 2 values: [2, 5, 4], [2, 5, 4]", "a list of specs"],
        ),
        ({"two": [OUT(1), OUT(1), OUT(1)]}, ["`two[2]: ", "there is no output 2; the module returns 2"]),
        ({"pair": {0: IN(1, split_output=True)}, "same": [None, OUT(1)]}, ["`same[1]: ", "the module returns 1"]),
        ({"pair": {"pair": IN(1)}}, ['"pair" is a tuple of 2 values; give a list of 2 specs']),
        ({"pair": {"pair": [IN(1)]}}, ['"pair" has 2 values, and the plan lists 1 specs']),
        ({"two": {"x": [IN(1), IN(1)]}}, ['"x" is [2, 5, 4], not a tuple; give one spec']),
        ({"twp": {"x": IN(1)}}, ['Model has no module "twp"', "two, pair, same, extra", 'mean "two"']),
    ],
)
def test_refused(plan: Any, parts: list[str]) -> None:
    message = refused(plan)
    for part in parts:
        assert part in message
