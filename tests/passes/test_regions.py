"""Blocks that are compiled once (``nested_compile_region``), of two kinds: they are opened, and split like others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxsp
from fxsp import SequenceParallelInput
from simulated import Simulated, by_plan

region = torch.compiler.nested_compile_region
PLAN = {"": {"x": SequenceParallelInput(1)}}


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    @region
    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return x + self.second(self.first(self.norm(x) + shift).relu())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    @region
    def forward(self, x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x + shift).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4).unbind()
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).flatten(2)), v


class Model(nn.Module):
    """Two kinds of blocks by turns; one of them has two results."""

    def __init__(self) -> None:
        super().__init__()
        self.mixers, self.attentions = (nn.ModuleList(kind() for _ in range(2)) for kind in (Mixer, Attention))

    def forward(self, x: Tensor) -> Tensor:
        shift = x.mean(1, keepdim=True)
        for mixer, attention in zip(self.mixers, self.attentions, strict=True):
            x = mixer(x, shift)
            x, values = attention(x, shift)
            x = x * values.mean()
        return x


def _gradients(y: Tensor, model: nn.Module) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y.square().sum(), list(model.parameters()))]


def _worst(got: list[Tensor], want: list[Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)) for a, b in zip(got, want, strict=True))


@pytest.fixture
def model() -> Model:
    torch.compiler.reset()
    torch.manual_seed(0)
    return Model()


@pytest.mark.parametrize("size", [2, 3])
def test_two_kinds_are_split(model: Model, size: int) -> None:
    """Values and gradients; each attention is found, also where a body is used again."""
    x, reports = torch.randn(2, 7, 16), []
    fast = torch.compile(model, backend=Simulated(size, by_plan({"plan": PLAN}, reports)))
    assert _worst(_gradients(fast(x), model), _gradients(model(x), model)) <= 1e-5
    (report,) = reports
    assert [a.method for a in report.attentions] == ["ulysses" if size == 2 else "gather_kv"] * 2
    assert not [g for g in report.implicit_gathers if g.kind == "implicit"]


def test_verification_runs_the_graph_as_it_stands(model: Model) -> None:
    """It is differentiated outside of a compilation, which ``invoke_subgraph`` refuses."""
    evidence = fxsp.verify(model, torch.randn(2, 7, 16), world_size=(2, 3), options={"plan": PLAN})
    assert evidence.ok, str(evidence)
    assert all(graph.gradients for graph in evidence.graphs)


@pytest.mark.filterwarnings("ignore::fxsp.errors.UnshardedWarning")
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_graph_that_runs_whole(model: Model, inner: str) -> None:
    """In training, on one rank: as it would run uncompiled."""
    x = torch.randn(2, 7, 16)
    fast: Callable[[Tensor], Tensor] = torch.compile(model, backend="sp", options={"plan": PLAN, "inner": inner})
    assert _worst(_gradients(fast(x), model), _gradients(model(x), model)) <= 1e-5
    with torch.no_grad():
        assert _worst([fast(x)], [model(x)]) <= 1e-5
