"""Models of many more real classes, on simulated ranks: values, gradients, and what the report says of each."""

from __future__ import annotations

import pytest
import torch

import fxsp
from zoo_others import CASES

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported:UserWarning"),
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", list(CASES))
def test_model(name: str) -> None:
    case = CASES[name]
    model, inputs = case.build()
    evidence = fxsp.verify(model.eval(), world_size=case.size, options={"plan": case.plan}, **inputs)
    for graph in evidence.graphs:
        assert max([*graph.outputs, *graph.gradients], default=0.0) <= 1e-5, str(evidence)
    reports = [graph.report for graph in evidence.graphs]
    assert tuple(a.method for report in reports for a in report.attentions) == case.methods
    gathers = {g.op for report in reports for g in report.implicit_gathers if g.kind == "implicit"}
    assert {op.removesuffix(f".{op.split('.')[-1]}") if op.count(".") > 1 else op for op in gathers} == set(
        case.gathers
    )
    assert any(not report.unsharded for report in reports)
    assert case.breaks or [report.unsharded for report in reports] == [""]
