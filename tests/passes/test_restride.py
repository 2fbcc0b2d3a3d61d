"""A kernel chosen for an attention lays its result in memory in its own way: split or not, so it lies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fxsp
from simulated import Simulated, by_plan

PLAN = {"": {"x": fxsp.SequenceParallelInput(1)}}


class Attention(nn.Module):
    """An attention whose result, or a view of it, is the result of the graph."""

    def __init__(self, kernel: SDPBackend, ending: str) -> None:
        super().__init__()
        self.qkv, self.kernel, self.ending = nn.Linear(8, 24), kernel, ending

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 2)).permute(2, 0, 3, 1, 4).unbind()
        with sdpa_kernel(self.kernel):
            y = F.scaled_dot_product_attention(q, k, v)
        if self.ending == "view":
            return y.view(-1, *y.shape[2:]) if self.kernel == SDPBackend.MATH else y.transpose(1, 2).flatten(2)
        if self.ending == "two":
            return y, y * 2, x.sum()
        return y.transpose(1, 2) if self.ending == "transposed" else y


@pytest.mark.parametrize(
    ("kernel", "ending", "batch", "training"),
    [(SDPBackend.MATH, ending, 2, True) for ending in ("result", "transposed", "view", "two")]
    + [(SDPBackend.MATH, "result", 1, False), (SDPBackend.FLASH_ATTENTION, "result", 2, True)],
)
def test_it_is_split_and_lies_as_on_one_device(kernel: SDPBackend, ending: str, batch: int, training: bool) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    model, x = Attention(kernel, ending), torch.randn(batch, 7, 8)
    reports: list[Any] = []
    with torch.set_grad_enabled(training):
        expected = model(x)
        found = torch.compile(model, backend=Simulated(2, by_plan({"plan": PLAN}, reports)))(x)
    (report,) = reports
    assert not report.unsharded
    assert [r.method for r in report.attentions] == ["ulysses"]
    for got, want in zip(*([y] if isinstance(y, Tensor) else y for y in (found, expected)), strict=True):
        torch.testing.assert_close(got, want)
    if training:
        first = [y if isinstance(y, Tensor) else y[0] for y in (found, expected)]
        wanted, gradients = (torch.autograd.grad(y.square().sum(), list(model.parameters())) for y in reversed(first))
        torch.testing.assert_close(gradients, wanted)


def _strides(rank: int, size: int) -> list[tuple[Any, Any]]:
    from running import compiled

    found = []
    for ending in ("result", "transposed", "two"):
        model, x = Attention(SDPBackend.MATH, ending), torch.randn(2, 7, 8)
        with torch.no_grad():
            results = [model(x), compiled(model, plan=PLAN)(x)]
        found.append(tuple([y.stride() for y in ([r] if isinstance(r, Tensor) else r)] for r in results))
    return found


def test_strides_on_real_ranks(ranks: Any) -> None:
    for pairs in ranks(2).run(_strides):
        for expected, found in pairs:
            assert found == expected
