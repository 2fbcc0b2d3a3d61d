"""``python -m fxsp``: results, exit status, and messages instead of tracebacks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fxsp.__main__ import main

FACTORIES = """
import torch, small
def build():
    return small.Model(mix=True), (small.inputs(),), {}
def planned():
    model = small.Model()
    model._sp_plan = small.SPLIT
    return model, (small.inputs(),), {}
def single():
    return torch.nn.Linear(2, 2), (torch.randn(1, 2),), {}
def mixed():
    model = small.Model(mix=True)
    model._sp_plan = small.SPLIT
    return model, (small.inputs(),), {}
def broken():
    raise ValueError("no such file of weights")
def not_three():
    return small.Model()
number = 3
"""


@pytest.fixture(autouse=True)
def _factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "factories", raising=False)


def test_explain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "factories:planned", "--ranks", "2", "--html", "out.html"]) == 0
    assert "2 x ulysses in blocks.*" in capsys.readouterr().out
    assert (tmp_path / "out.html").stat().st_size > 5000
    assert main(["explain", "factories:planned", "--ranks", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["world_size"] == 4
    assert main(["explain", "factories:planned", "--ranks", "2", "--stage", "propagated", "--why", "blocks.0"]) == 0
    out = capsys.readouterr().out
    assert "S(1, [5])" in out
    assert "what would remove it" in out


def test_progress_after_a_while(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxsp.offline.progress.PATIENCE", 0.02)
    assert main(["verify", "factories:planned", "--ranks", "2"]) == 0
    error = capsys.readouterr().err
    assert re.search(r"^fxsp: 2 ranks: tracing and partitioning \.\.\. \d+ s$", error, re.MULTILINE)
    assert main(["verify", "factories:single", "--ranks", "2"]) == 1, "nothing was split, so nothing was verified"
    assert "not split (there is nothing to split" in capsys.readouterr().out


def test_verify(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "factories:planned", "--ranks", "2", "3"]) == 0
    assert "3 ranks: equal" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["factories"], "write package.module:factory"),
        (["nowhere:build"], 'there is no module "nowhere"'),
        (["factories:buidl"], 'module factories has no "buidl"'),
        (["factories:not_three"], "a factory returns (model, args, kwargs)"),
        (["factories:number"], "factories:number is int, no function"),
        (["factories:broken"], "ValueError: no such file of weights"),
        (["factories:mixed", "--strict"], "cumsum"),
        (["factories:planned", "--ulysses", "3"], "ulysses_degree=3"),
        (["factories:planned", "--machine", "h101x8"], "Known devices: a100, h100"),
        (["factories:planned", "--stage", "partitoin"], "Did you mean"),
        (["factories:planned", "--why", "blocks.7"], "Did you mean"),
    ],
)
def test_failures(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", *arguments, "--ranks", "2"]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert "TORCHDYNAMO" not in error


def test_an_unsplit_model_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "factories:single", "--ranks", "2"]) == 1
    assert "runs whole on every rank: there is nothing to split" in capsys.readouterr().out


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "factories:build", "--ranks", "2"]) == 0
    out = capsys.readouterr().out
    assert '"x": SequenceParallelInput(split_dim=1, expected_dims=3),' in out
    assert "# the plan is inferred:" in out
    assert main(["plan", "factories:single", "--ranks", "2"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("_sp_plan = {\n}\n")
    assert "# there is nothing to split" in out


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "python -m fxsp explain flux:build --ranks 8" in capsys.readouterr().out


def test_as_a_command_with_logs_traces_and_files(tmp_path: Path) -> None:
    support = Path(__file__).parents[1] / "support"
    environment = {**os.environ, "PYTHONPATH": str(support), "FXSP_DUMP": str(tmp_path / "dump")}
    environment |= {"TORCH_TRACE": str(tmp_path / "trace"), "TORCH_LOGS": "+fxsp", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fxsp", "explain", "factories:planned", "--ranks", "2"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "▶ all_to_all" in done.stderr  # the log
    files = sorted(path.name for path in (tmp_path / "dump" / "rank0").iterdir())
    assert "graph0_capture.txt" in files
    assert "▶ all_to_all" in (tmp_path / "dump" / "rank0" / "graph0_device_memory.txt").read_text()
    traced = "".join(path.read_text() for path in (tmp_path / "trace").iterdir())
    assert '"name": "fxsp_device_memory"' in traced


def test_the_tutorial(capsys: pytest.CaptureFixture[str]) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    import bring_your_own_model

    torch.compiler.reset()
    bring_your_own_model.main()
    out = capsys.readouterr().out
    assert 'has no argument "x"' in out
    assert "conv1d" in out
    assert "8 ranks: equal" in out
