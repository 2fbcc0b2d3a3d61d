"""A plan that applied and split next to nothing is said: in the report, by a warning, under strict by an error."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import fxsp
from fxsp.report import Report
from simulated import Simulated, by_plan

TOKENS = {"": {"x": fxsp.SequenceParallelInput(1)}}


@torch.library.custom_op("share_test::layer", mutates_args=())
def layer(x: Tensor, weight: Tensor) -> Tensor:
    return torch.relu(x @ weight) @ weight.T


@layer.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x)


class Layers(nn.Module):
    """A layer in an operator that nobody knows, and ``width`` channels of linear layers beside it."""

    def __init__(self, width: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 64))
        self.beside = nn.Sequential(nn.Linear(16, width), nn.Linear(width, 1)) if width else None

    def forward(self, x: Tensor) -> Tensor:
        y = layer(x, self.weight)
        return y if self.beside is None else self.beside(x).sum() + y.sum()


class Scan(nn.Module):
    """Nothing is multiplied; what is written is written whole."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu().cumsum(1)


def explained(model: nn.Module, *, strict: bool = False) -> tuple[Report, list[str]]:
    """The report of a model on three ranks, and the warnings of compiling it."""
    torch.compiler.reset()
    reports: list[Report] = []
    backend = Simulated(3, by_plan({"plan": TOKENS, "strict": strict}, reports))
    x = torch.randn(2, 7, 16)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))
    return reports[-1], [str(w.message) for w in caught if issubclass(w.category, fxsp.UnshardedWarning)]


@pytest.mark.parametrize(("model", "name"), [(Layers(), "share_test.layer"), (Scan(), "aten.cumsum")])
def test_nothing_is_split(model: nn.Module, name: str) -> None:
    report, said = explained(model)
    assert report.share == 0
    for text in (report.unsharded, *said):
        assert "the plan applied, but nothing runs on shards" in text
        assert name in text
        assert "test_share.py:" in text
    assert len(said) == 1
    with pytest.raises(fxsp.StrictError, match=name):
        explained(model, strict=True)


def test_next_to_nothing_is_split() -> None:
    """What is split beside it is a trifle: counted by work, not by whether there is a shard."""
    report, (said,) = explained(Layers(2))
    assert 0 < report.share < 0.05
    assert not report.unsharded
    assert "share_test.layer" in said
    assert "of the work runs on shards" in report.notes[-1]
    with pytest.raises(fxsp.StrictError, match=r"share_test\.layer"):
        explained(Layers(2), strict=True)


def test_enough_is_split() -> None:
    report, said = explained(Layers(512), strict=True)
    assert report.share > 0.5
    assert not said


@pytest.mark.filterwarnings("ignore::fxsp.ImplicitGatherWarning")
def test_what_an_implicit_gather_says_is_said_once() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(16, 16, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.mT)

    report, said = explained(Mixed())
    assert report.share == 0
    assert not report.unsharded
    assert "nothing runs on shards" in report.notes[-1]
    assert [g.op for g in report.implicit_gathers] == ["aten.conv1d.default"]
    assert not said


def test_a_graph_that_has_nothing_to_do() -> None:
    """No value is split, and none could be: no cause for alarm."""

    class View(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mT

    report, said = explained(View(), strict=True)
    assert report.share == 1
    assert not said


def test_explain_has_the_share() -> None:
    with torch.no_grad():
        found = fxsp.explain(Layers(2), torch.randn(2, 7, 16), world_size=4, plan=TOKENS)
    assert "of the work runs on shards: share_test.layer" in str(found)
