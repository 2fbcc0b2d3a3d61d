"""Splits across graph breaks: the next graph is split where the last one was, and computes what it computed whole."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsp
from fxsp.capture.graph_breaks import Split, Splits, same_view
from fxsp.offline.partition import partition_offline
from fxsp.report import Report
from small import Attention, inputs

#: Dynamo looks at the gradient of every input, also at that of a tensor which has none.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
SPLIT = {"": {"x": fxsp.SequenceParallelInput(1)}}


class Breaking(nn.Module):
    """Blocks and a head that are traced one by one (the blocks as one graph); ``between`` is in no graph."""

    def __init__(self, between: Any = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Attention(), Attention(), Attention()])
        self.head, self.between = nn.Linear(8, 5), between

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for block in self.blocks:
            torch._dynamo.graph_break()
            y = block(y)
            if self.between is not None:
                y = self.between(y)
        return self.head(y)


def reports(model: nn.Module, x: Tensor, **options: Any) -> list[Report]:
    torch.compiler.reset()
    return [r.report for r in partition_offline(model, (x,), world_size=3, options={"plan": SPLIT, **options})]


def check(model: nn.Module, x: Tensor, **options: Any) -> None:
    evidence = fxsp.verify(model, x, world_size=(2, 3), options={"plan": SPLIT, **options})
    assert evidence.ok, str(evidence)


def methods(found: list[Report]) -> list[str]:
    return [record.method for report in found for record in report.attentions]


def test_every_graph_is_split() -> None:
    """The first block is called before any graph: the tensor is known as an argument of the call under way."""
    model, x = Breaking(), inputs(tokens=7)
    found = reports(model, x)
    assert methods(found) == ["gather_kv"] * 2  # the input of the first block needs no gradient, that of others does
    assert len(found) == 2
    records = [record for report in found for record in report.plan if "split before this graph" in record.entry]
    assert all(record.applied and "<root>[x]" in record.entry for record in records)
    assert not any(report.unsharded for report in found)
    check(model, x)


def test_by_storage_through_what_runs_in_between() -> None:
    """An autograd function (as FSDP's hooks have one) returns the same memory as another tensor."""
    model, x = Breaking(torch._dynamo.disable(lambda y: y.view_as(y))), inputs(tokens=7)
    found = reports(model, x)
    assert methods(found) == ["gather_kv"] * 2
    assert not any(report.unsharded for report in found)
    check(model, x)


def test_not_through_other_memory() -> None:
    model, x = Breaking(torch._dynamo.disable(lambda y: y + y.cumsum(1))), inputs(tokens=7)
    found = reports(model, x)
    assert methods(found) == ["gather_kv"]
    assert any(report.unsharded == "no entry of the plan applies to this graph" for report in found)
    check(model, x)


def test_a_graph_with_little_to_do_runs_whole_and_passes_the_split_on() -> None:
    class Little(Breaking):
        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[0](x)
            torch._dynamo.graph_break()
            x = (x * 2).relu()
            torch._dynamo.graph_break()
            return self.blocks[1](x)

    first, second, third = reports(Little(), inputs(tokens=7))
    assert methods([first, second, third]) == ["gather_kv"] * 2
    assert "too little to do" in second.unsharded
    assert [record.applied for record in second.plan] == [False, False]
    assert not second.collectives
    assert not third.unsharded
    check(Little(), inputs(tokens=7))


def test_what_the_plan_did_not_ask_for_is_never_refused() -> None:
    class Mixing(Breaking):
        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[0](x)
            torch._dynamo.graph_break()
            return self.blocks[1](x).cumsum(1)

    *_, last = reports(Mixing(), inputs(tokens=7), strict=True)
    assert [gather.op for gather in last.implicit_gathers if gather.kind == "implicit"] == ["aten.cumsum.default"]
    check(Mixing(), inputs(tokens=7), strict=True)


def test_whole_text_stays_whole() -> None:
    plan = {"blocks.0": {"hidden": fxsp.SequenceParallelPartialInput(split_dim=1, text_len_source=3)}}
    model, x = Breaking(), inputs(tokens=9)
    found = reports(model, x, plan=plan)
    assert {row[1] for report in found for row in report.split_outputs} == {Split(1, 3, "blocks.0[hidden]")}
    assert methods(found) == ["gather_kv"] * 2
    assert not any(report.unsharded for report in found)
    check(model, x, plan=plan)


@pytest.mark.parametrize("change", [lambda t: t[:, 1:], lambda t: t.transpose(0, 1), lambda t: t.clone()])
def test_only_the_very_view(change: Any) -> None:
    splits, tensor = Splits(), torch.randn(4, 6, 8)
    splits.remember(tensor, Split(1))
    assert splits.find(tensor.detach()) == Split(1)
    assert splits.find(change(tensor)) is None
    assert same_view(tensor, tensor.detach())
    assert not same_view(tensor, change(tensor))


def test_what_is_gone_is_forgotten() -> None:
    splits = Splits()
    for _ in range(1000):
        splits.remember(torch.randn(4), Split(0))
    gc.collect()
    assert len(splits._known) <= 64
