"""fxsp.explain: golden screens of three models, formulas that hold at other lengths and ranks, chains of reasons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fxsp
import models
import small
from fxsp.cost.flops import attention_flops
from fxsp.inspection.diff import diff_stages
from fxsp.offline.provenance import UnknownNameError

LLAMA = {"": {"input_ids": fxsp.SequenceParallelInput(split_dim=1)}}


def explained(name: str, size: int = 2, **arguments: Any) -> fxsp.Explanation:
    plan = arguments.pop("plan", None)
    model, inputs = getattr(models, name)(**arguments)
    with torch.no_grad():
        return fxsp.explain(model, world_size=size, plan=plan, **inputs)


def small_one(size: int = 2, tokens: int = 5, **arguments: Any) -> fxsp.Explanation:
    with torch.no_grad():
        return fxsp.explain(small.Model(**arguments), small.inputs(tokens), world_size=size, plan=small.SPLIT)


@pytest.mark.parametrize(("tokens", "size"), [(9, 2), (12, 1), (17, 2)])
def test_formulas_hold_at_other_lengths(tokens: int, size: int) -> None:
    one, other = small_one(tokens=6), small_one(tokens=tokens)
    assert one.measures[0] is not None
    for own, sent in zip(one.measures[0].forward, other.measures[0].forward, strict=True):  # type: ignore[union-attr]
        assert own.formula is not None
        assert own.formula(2, {"<root>[x]": tokens}) == sent.bytes


def test_formulas_hold_for_other_ranks() -> None:
    two, four = (explained("flux", size=n, image=23, text=6) for n in (2, 4))
    a, b = two.measures[0], four.measures[0]
    assert a is not None
    assert b is not None
    assert [s.formula and s.formula(4) for s in a.forward] == [s.bytes for s in b.forward]
    assert [s.formula and s.formula(2) for s in b.forward] == [s.bytes for s in a.forward]


def test_operations() -> None:
    e = small_one(tokens=6)
    # Per block qkv and output projections, two heads of 4 and full attention; then the head.
    block = 2 * 2 * 6 * 8 * 24 + 2 * 2 * 6 * 8 * 8 + 2 * 2 * 2 * 6 * 6 * 8
    assert e.flops_total == 2 * block + 2 * 2 * 6 * 8 * 5
    assert e.flops_per_rank == [e.flops_total // 2] * 2
    assert small_one(tokens=5).flops_per_rank[0] > small_one(tokens=5).flops_total / 2


def test_causal_attention_counts_allowed_pairs() -> None:
    q, k = (1, 3, 4), (1, 5, 4)
    allowed = sum(torch.ones(3, 5).tril().flatten().tolist())
    assert attention_flops(q, k, k, causal=True) == 2 * allowed * 8
    assert attention_flops(k, q, q, causal=True) == 2 * torch.ones(5, 3).tril().sum() * 8
    assert attention_flops(q, k, k, causal=False) == 2 * 15 * 8


@pytest.mark.parametrize("options", [{"ring_degree": 4}, {"ulysses_degree": 2, "ring_degree": 2}], ids=str)
def test_rings(options: dict[str, int], tmp_path: Path) -> None:
    """The blocks of a causal ring differ by rank, and are as many pairs; together they are the triangle."""
    model, inputs = models.llama(tokens=16, layers=1, kv_heads=8)
    with torch.no_grad():
        e = fxsp.explain(model, world_size=4, plan=LLAMA, options=options, **inputs)
    pairs = [m // (2 * 8 * 16) for m in (f - min(e.flops_per_rank) for f in e.flops_per_rank)]
    assert pairs == [0, 0, 0, 0]
    if options.get("ulysses_degree") is None:
        assert "3 x rotation" in str(e)
    assert "head-tail tokens, " in str(e)
    assert sum(e.flops_per_rank) == e.flops_total
    rotations = [s.formula for s in e.measures[0].forward if s.record.kind == "rotation"]  # type: ignore[union-attr]
    assert rotations
    assert all(f is not None and f.text(e.measures[0].names).endswith("·2⌈S/2P⌉") for f in rotations)  # type: ignore[union-attr]
    assert e.to_html(tmp_path / "ring.html").stat().st_size > 5000


def test_data_and_stages() -> None:
    e = small_one()
    data = json.loads(e.to_json())
    assert data["graphs"][0]["collectives"][-1]["formula"] == "64·⌈S/P⌉·(P-1)/P"
    assert data["communication"]["all_to_all"] == {"count": 4, "bytes": 768}
    assert e.stages[0] == "capture"
    assert e.stages[-1] == "device_memory"
    assert "▶ all_to_all" in e.graph("partitioned")
    with pytest.raises(fxsp.OptionError, match=r"no stage 'partitoin'.*\"partition\""):
        e.graph("partitoin")


def test_diff() -> None:
    e = small_one()
    plain = e.diff()
    assert "+ ▶ all_to_all_default" in plain
    assert "\n~ linear = linear(" in plain or "linear" in plain
    assert "\x1b" not in plain
    stages = e.results[0].stages
    colored = diff_stages(stages["normalize"], stages["device_memory"], color=True)
    assert "\x1b[32m+ ▶ all_to_all_default" in colored


def test_reasons() -> None:
    e = small_one(mix=True)
    module = e.explain("blocks.1")
    assert "attention: ulysses (small.py:" in module
    assert "what would remove it" in module
    assert "by the plan: <root>[x]: SequenceParallelInput(split_dim=1)" in module
    gather = next(c for c in e.collectives if c.kind == "all_gather")
    assert "why: aten.cumsum.default needs dimension 1" in e.explain(gather.value)
    assert "small.py:" in e.explain(gather.value)
    assert e.explain("linear").startswith("linear: S(1, [5]) (blocks.0.qkv, small.py:")
    with pytest.raises(UnknownNameError, match=r'Did you mean "blocks\.1'):
        e.explain("blocks.11")


def test_unsplit_models_and_wrong_options() -> None:
    e = fxsp.explain(torch.nn.Linear(2, 2), torch.randn(1, 2), world_size=2)
    assert "runs whole on every rank: there is nothing to split" in str(e)
    assert e.flops_per_rank == []
    with pytest.raises(fxsp.OptionError, match="at least 1"):
        fxsp.explain(torch.nn.Linear(2, 2), torch.randn(1, 2), world_size=0)
    with pytest.raises(fxsp.PlanError, match="Did you mean"):
        fxsp.explain(small.Model(), small.inputs(), world_size=2, plan={"blcks.0": fxsp.SequenceParallelOutput(1)})


def test_several_graphs() -> None:
    class Broken(small.Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.blocks[0](x)
            torch._dynamo.graph_break()
            return self.head(x)

    with torch.no_grad():
        e = fxsp.explain(Broken(), small.inputs(), world_size=2, plan=small.SPLIT)
    assert len(e.results) == 2
    assert "graph 1:" in str(e)


def _named(rank: int, size: int) -> set[str]:
    """Names of the collectives in a profiler's trace of a training step under aot_eager, and of inference in eager."""
    names = set()
    for inner in ("aot_eager", "eager"):
        model, x = small.Model(), small.inputs()
        fast = torch.compile(model, backend="sp", options={"inner": inner, "plan": small.SPLIT})
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            fast(x).sum().backward()
        names |= {f"{inner} {event.name}" for event in seen.events() if "small.py:" in event.name}
    return {name.partition(" (")[0] + (" backward" if name.endswith("backward") else "") for name in names}


def test_collectives_have_names_in_a_trace(ranks: Any) -> None:
    for found in ranks(2).run(_named):
        for block in (0, 1):
            assert f"aot_eager all_to_all_single blocks.{block}" in found
            assert f"aot_eager all_to_all_single blocks.{block} backward" in found
            assert f"eager all_to_all blocks.{block}" in found
