"""Modules of structures that no library has, without a plan: what is found is right, and splits the work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fxsp
from unplanned import HELD, MODULES

INFER = {"plan": "infer"}


@pytest.mark.parametrize("name", MODULES)
def test_values_and_gradients(name: str) -> None:
    module, inputs = MODULES[name]()
    evidence = fxsp.verify(module, world_size=[2, 3], options=INFER, **inputs)
    assert evidence.ok, str(evidence)
    assert not any(graph.unsharded for graph in evidence.graphs)


@pytest.mark.parametrize("name", MODULES)
def test_the_work_is_split(name: str) -> None:
    module, inputs = MODULES[name]()
    with torch.no_grad():
        found = fxsp.explain(module, world_size=2, options=INFER, **inputs)
    (report,) = (result.report for result in found.results)
    assert not report.unsharded
    assert max(found.flops_per_rank) <= 0.57 * found.flops_total, str(found)
    assert report.inferred
    assert "plan (inferred):" in str(found)
    assert len(report.inferred) == len(report.plan), "a plan can name all of it"
    assert any(HELD.get(name, "") in gather.op for gather in found.implicit_gathers) or name not in HELD


@pytest.mark.parametrize("name", ["TokenPyramid", "Perceiver", "Chunks", "ConvolutionFirst", "VideoAndAudio", "Mixer"])
def test_the_plan_gives_the_same_program(name: str) -> None:
    module, inputs = MODULES[name]()
    with torch.no_grad():
        plan = fxsp.infer_plan(module, world_size=3, **inputs)
        assert not plan.unnamed
        pasted: dict[str, Any] = {}
        exec(str(plan), vars(fxsp).copy(), pasted)
        assert pasted["_sp_plan"] == plan
        inferred = fxsp.explain(module, world_size=3, options=INFER, **inputs)
        planned = fxsp.explain(module, world_size=3, plan=pasted["_sp_plan"], **inputs)
    assert inferred.graph() == planned.graph()
