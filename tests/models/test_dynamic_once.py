"""``dynamic=True``: a graph is partitioned once, though Dynamo makes inputs of numbers and then takes them back."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import fxsp
from fxsp import SequenceParallelInput, backend

pytestmark = pytest.mark.filterwarnings("ignore::fxsp.errors.UnshardedWarning")


class Norms(nn.Module):
    """The epsilon of a norm is a number that is needed as such."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Attention(nn.Module):
    """Numbers of several kinds: an epsilon, the scale of an attention, a factor that may stay an input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.factor, self.scale = nn.RMSNorm(16, eps=1e-6), nn.Linear(16, 48), 0.7, 0.3

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4).unbind()
        y = nn.functional.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return x * self.factor + y.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("how", ["dynamic", "marked", "static"])
@pytest.mark.parametrize("kind", [Norms, Attention])
def test_one_report(kind: type[nn.Module], how: str, training: bool) -> None:
    torch.compiler.reset()
    model, x = kind(), torch.randn(2, 12, 16)
    if how == "marked":
        torch._dynamo.mark_dynamic(x, 1)
    options = {"plan": {"": {"x": SequenceParallelInput(1)}}, "inner": "aot_eager"}
    before = len(fxsp.reports())
    compiled = torch.compile(model, backend="sp", options=options, dynamic=True if how == "dynamic" else None)
    with (
        torch.set_grad_enabled(training),
        mock.patch.object(backend, "compile_graph", wraps=backend.compile_graph) as compile_graph,
    ):
        torch.testing.assert_close(compiled(x), model(x))
        assert compile_graph.call_count == 1
        assert len(fxsp.reports()) - before == 1
        if how == "dynamic":
            y = torch.randn(2, 19, 16)
            torch.testing.assert_close(compiled(y), model(y))
            assert compile_graph.call_count == 1
