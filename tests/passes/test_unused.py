"""Plan entries whose split is lost before any work was done on it: the report says what ended it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxsp
from fxsp.report import GatherRecord

PLAN = {"": {"x": fxsp.SequenceParallelInput(1)}}


class Model(nn.Module):
    """``mix``, then linear layers and attention."""

    def __init__(self, mix: Callable[[Model, Tensor], Tensor]) -> None:
        super().__init__()
        self.qkv, self.out, self.mix = nn.Linear(8, 24), nn.Linear(8, 8), mix
        self.kernel = nn.Parameter(torch.randn(8, 8, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self, x)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind()
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def gathers(model: nn.Module, *args: Tensor, **options: bool) -> list[GatherRecord]:
    evidence = fxsp.verify(model, *args, world_size=3, options={"plan": PLAN, **options})
    assert evidence.ok, str(evidence)
    (graph,) = evidence.graphs
    return [g for g in graph.report.implicit_gathers if g.kind == "implicit"]


def convolved(model: Model, x: Tensor) -> Tensor:
    return F.conv1d(x.transpose(1, 2), model.kernel, padding=1).transpose(1, 2)


def summed(model: Model, x: Tensor) -> Tensor:
    return x.cumsum(1).exp()


@pytest.mark.parametrize(("mix", "op"), [(convolved, "aten.conv1d.default"), (summed, "aten.cumsum.default")])
def test_the_operator_that_ends_a_split_is_named(mix: Callable[[Model, Tensor], Tensor], op: str) -> None:
    model, x = Model(mix), torch.randn(2, 7, 8)
    (record,) = gathers(model, x)
    assert (record.op, record.bytes) == (op, 0)
    assert "test_unused.py:" in record.source
    assert record.reason.endswith("nothing of <root>[x]: SequenceParallelInput(split_dim=1) runs on shards before it")
    with pytest.raises(fxsp.StrictError, match=op):
        gathers(model, x, strict=True)


@pytest.mark.parametrize("mix", [lambda model, x: x, lambda model, x: model.out(x) + x.amax(1, keepdim=True)])
def test_work_on_shards_is_enough(mix: Callable[[Model, Tensor], Tensor]) -> None:
    assert all(record.bytes for record in gathers(Model(mix), torch.randn(2, 7, 8)))


def test_a_mask_of_an_attention_may_be_whole() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(y, y, y, x[:, None].exp())

    assert not gathers(Masked(), torch.randn(2, 7, 7), torch.randn(2, 2, 7, 4), strict=True)


def test_an_input_that_nothing_reads_as_tokens() -> None:
    """Its largest element leads to no work: nothing is lost."""
    model = Model(lambda model, x: x)
    model.forward = lambda x: x.exp() + x.amax()  # type: ignore[method-assign]
    assert not [record for record in gathers(model, torch.randn(2, 7, 8)) if not record.bytes]
