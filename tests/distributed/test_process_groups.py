"""Ranks without a process group, and groups that are gone: said in our words, with what to do."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fxsp
from fxsp.config import Options, resolve_ranks

PLAN = {"": {"input": fxsp.SequenceParallelInput(1)}}


def compiled(**options: Any) -> Any:
    torch.compiler.reset()
    return torch.compile(nn.Linear(8, 8), backend="sp", options={"plan": PLAN, "inner": "aot_eager", **options})


def run(function: Any) -> list[str]:
    """The warnings of fxsp while ``function`` is called on nine tokens."""
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(torch.randn(1, 9, 8))
    return [str(w.message) for w in caught if issubclass(w.category, fxsp.FxspWarning)]


def test_several_processes_and_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    (said,) = run(compiled())
    assert "WORLD_SIZE is 4" in said
    assert "torch.distributed.init_process_group(" in said
    assert fxsp.reports()[-1].unsharded.startswith("one rank. WORLD_SIZE is 4")


@pytest.mark.parametrize("size", ["1", "", "many"])
def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    assert not run(compiled())
    assert fxsp.reports()[-1].unsharded == "one rank"


def test_explain_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        report = fxsp.explain(nn.Linear(8, 8), torch.randn(1, 9, 8), world_size=2, plan=PLAN)
    assert not report.results[0].report.unsharded


def test_an_empty_plan_says_that_it_is_empty() -> None:
    assert not run(compiled(plan={}))
    assert "the plan is empty" in fxsp.reports()[-1].unsharded


def _alone(rank: int, size: int) -> list[str]:
    said = run(compiled(plan={}))
    assert "the plan is empty" in fxsp.reports()[-1].unsharded
    group = dist.new_group(list(range(size)))
    function = compiled(group=group)
    assert not run(function)
    again = dist.new_group(list(range(size)))
    dist.destroy_process_group(group)
    texts = []
    for call in (lambda: run(function), lambda: run(compiled(group=group))):
        with pytest.raises(fxsp.ProcessGroupError) as error:
            call()
        texts.append(str(error.value))
    assert not run(compiled(group=again))
    return [*said, *texts]


def test_a_group_that_was_destroyed(ranks: Any) -> None:
    for empty, call, option in ranks(2).run(_alone):
        assert "the plan is empty" in empty
        assert "is split for rank" in call
        assert "it was destroyed" in call
        assert "torch.compiler.reset()" in call
        assert "option 'group'" in option
        assert "was destroyed" in option
        assert "init_process_group(" in option


SCRIPT = """
import sys, torch, torch.distributed as dist, fxsp
from torch import nn
rank, size, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
def join(name):
    dist.init_process_group("gloo", init_method=f"file://{store}{name}", rank=rank, world_size=size)
join("a")
mesh = dist.device_mesh.init_device_mesh("cpu", (size,))
torch.manual_seed(0)  # every rank has the same model, and the same tokens
model, x = nn.Linear(8, 8), torch.randn(1, 9, 8)
options = {"plan": {"": {"input": fxsp.SequenceParallelInput(1)}}, "inner": "aot_eager"}
function = torch.compile(model, backend="sp", options=options)
with torch.no_grad():
    function(x)
    dist.destroy_process_group()
    for call in (lambda: function(x), lambda: torch.compile(model, backend="sp", options={**options, "mesh": mesh})(x)):
        try:
            call()
        except fxsp.ProcessGroupError as error:
            print("ours:", str(error).splitlines()[0])
    if rank == 0:  # of a group with the same name, and fewer ranks
        dist.init_process_group("gloo", init_method=f"file://{store}b", rank=0, world_size=1)
        try:
            function(x)
        except fxsp.ProcessGroupError as error:
            print("ours:", str(error).splitlines()[0])
"""


def test_the_default_group_is_destroyed(tmp_path: Path) -> None:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), "2", str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=tmp_path,
        )
        for rank in range(2)
    ]
    try:
        results = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (out, err) in enumerate(results):
        lines = [line for line in out.splitlines() if line.startswith("ours:")]
        assert len(lines) == 3 - rank, out + err
        assert "it was destroyed" in lines[0]
        assert "option 'mesh'" in lines[1]
        if rank == 0:
            assert "it has 1 ranks now" in lines[2]


def test_no_group_is_one_rank() -> None:
    assert resolve_ranks(Options.parse()).size == 1


def _hooked() -> nn.Module:
    from fxsp.hooks.sequence_parallel import apply_sequence_parallel

    model = nn.Sequential(nn.Linear(8, 8))
    apply_sequence_parallel(model, None, {"0": {"input": fxsp.SequenceParallelInput(1)}})
    return model


def test_hooks_say_that_there_is_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    model = _hooked()
    (said,) = run(model)
    assert "WORLD_SIZE is 4" in said
    assert not run(model), "once for each model"
