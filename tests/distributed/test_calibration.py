"""``fxsp.calibrate`` on real ranks: it measures, writes, is found again, and all ranks decide by the same numbers."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import fxsp
from distributed import Pool
from fxsp.calibration import fitted
from fxsp.device import Link
from fxsp.machine import KINDS, Machine
from fxsp.measured import cache_folder, file_for, runs
from running import compiled, error_of
from small import SPLIT, Model, inputs

Ranks = Callable[[int], Pool]
QUICK: dict[str, Any] = {"sizes": (2**10, 2**16), "repeats": 2}


def _decided(model: torch.nn.Module, **options: Any) -> tuple[str, float]:
    fast = compiled(model, plan=SPLIT, inner="eager", **options)
    with torch.no_grad():
        error = error_of(fast(inputs()), model(inputs()))
    found = [f"{one.method} {one.detail} {one.rejected}" for one in fxsp.reports()[-1].attentions]
    return "\n".join(found), error


def _calibrated(rank: int, size: int, folder: str) -> tuple[str, Any, list[str]]:
    os.environ["FXSP_CACHE_DIR"] = folder
    try:
        torch.manual_seed(1)
        model = Model()
        before, _ = _decided(model)
        machine = fxsp.calibrate(**QUICK)
        torch.compiler.reset()
        found, error = _decided(model)
        torch.compiler.reset()
        given, _ = _decided(model, machine=machine)
        torch.compiler.reset()
        default, _ = _decided(model, machine="default")
        assert error <= 1e-5
        assert found == given, "what is found decides as what is given does"
        assert before == default != found
        # A machine of another's making, where the measured one was: a message costs a second, bytes cost nothing.
        path = file_for(torch.device("cpu"), range(size))
        dist.barrier()
        if rank == 0:
            slow = dataclasses.replace(
                machine, inside=(), device=dataclasses.replace(machine.device, link=Link(1.0, 1e15))
            )
            path.write_text(slow.to_json())
        dist.barrier()
        torch.compiler.reset()
        late, _ = _decided(model)
        return machine.to_json(), machine, [found, late, *sorted(path.name for path in Path(folder).iterdir())]
    finally:
        del os.environ["FXSP_CACHE_DIR"]


def test_all_ranks_have_the_same_numbers_and_find_them_again(ranks: Ranks, tmp_path: Path) -> None:
    everyone = ranks(2).run(_calibrated, str(tmp_path))
    assert everyone[0] == everyone[1]
    _, machine, (_, late, *files) = everyone[0]
    assert files == ["machine-cpu-2.json"]
    assert late.startswith("gather_kv"), "one message instead of two"
    assert isinstance(machine, Machine)
    assert [kind for kind, _ in machine.inside] == list(KINDS)
    for link in (*dict(machine.inside).values(), machine.device.link):
        assert link.latency >= 0
        assert link.bandwidth > 0
    assert min(machine.device.flops, machine.device.bandwidth, machine.device.launch) > 0


def _on_nodes(rank: int, size: int, path: str) -> Machine:
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("node", "rank"))
    machine = fxsp.calibrate(mesh, path=path, **QUICK)
    with pytest.raises(fxsp.OptionError, match="two sizes or more"):
        fxsp.calibrate(mesh, sizes=(4,))
    return machine


def test_nodes_are_those_of_a_mesh(ranks: Ranks, tmp_path: Path) -> None:
    path = tmp_path / "four.json"
    everyone = ranks(4).run(_on_nodes, str(path))
    assert all(machine == everyone[0] for machine in everyone)
    machine = fxsp.Options.parse({"machine": path}).machine
    assert machine == everyone[0]
    assert isinstance(machine, Machine)
    assert (machine.per_node, len(machine.inside), len(machine.outside)) == (2, 4, 4)
    assert machine.link("all_to_all", 2) == dict(machine.inside)["all_to_all"]
    assert machine.link("all_to_all", 4) == dict(machine.outside)["all_to_all"]


def _one_lacks_the_file(rank: int, size: int, folder: str) -> str:
    os.environ["FXSP_CACHE_DIR"] = folder if rank == 0 else f"{folder}/none"
    try:
        with pytest.raises(fxsp.InputMismatchError) as error:
            _decided(Model())
        return str(error.value)
    finally:
        del os.environ["FXSP_CACHE_DIR"]


def test_a_file_that_one_rank_lacks_is_an_error_on_all(ranks: Ranks, tmp_path: Path) -> None:
    device = fxsp.Options.parse({"machine": "l20"}).machine
    assert isinstance(device, Machine)
    (tmp_path / "machine-cpu-2.json").write_text(device.to_json())
    for text in ranks(2).run(_one_lacks_the_file, str(tmp_path)):
        assert "options differ" in text
        assert "machine=" in text


def test_a_file_is_named_after_device_and_layout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FXSP_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    cpu = torch.device("cpu")
    assert file_for(cpu, range(8)).name == "machine-cpu-4+4.json"
    assert file_for(cpu, [0, 1, 4, 5]).name == "machine-cpu-2+2.json"
    assert file_for(cpu, [0, 4]).name == "machine-cpu-1+1.json"
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert file_for(cpu, range(8)) == tmp_path / "machine-cpu-8.json"
    monkeypatch.delenv("FXSP_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "fxsp"
    assert runs("aabba") == (2, 2, 1)


@pytest.mark.parametrize("link", [Link(1e-5, 1e9), Link(0.0, 2e6), Link(1.0, 1e12)])
def test_a_line_is_found_again(link: Link) -> None:
    found = fitted([(n, link.seconds(1, n)) for n in (2**12, 2**16, 2**20, 2**30)])
    assert found.bandwidth == pytest.approx(link.bandwidth, rel=1e-6)
    assert found.latency == pytest.approx(link.latency, rel=1e-6, abs=1e-9)


def test_times_that_are_no_line() -> None:
    assert fitted([(10, 3.0), (1000, 1.0)]).latency >= 0
    assert fitted([(10, 3.0), (1000, 1.0)]).bandwidth > 0
    assert fitted([(10, 1e-6), (1000, 1.0)]).latency == 0, "less than nothing is no latency"


def test_without_a_group_there_is_nothing_to_measure() -> None:
    with pytest.raises(fxsp.ProcessGroupError, match="init_process_group"):
        fxsp.calibrate()
