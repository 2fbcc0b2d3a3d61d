"""The GPU benchmark where there is no GPU: all of it runs, on tiny tensors, and says that it measures nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "bench_gpu.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_smoke() -> None:
    done = run("--smoke")
    assert done.returncode == 0, done.stderr
    assert "these are no measurements" in done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith("| tiny")]
    # Two shapes: kernels (one more with two segments), exchanges, pads, producers.
    assert len(rows) == (5 + 4) + 2 * 3
    assert all("nan" not in row for row in rows)
    assert "two processes against one" in done.stdout


def test_without_a_gpu_it_says_so() -> None:
    done = run()
    assert done.returncode == 1
    assert "torch sees none here" in done.stderr
    assert done.stdout == ""
