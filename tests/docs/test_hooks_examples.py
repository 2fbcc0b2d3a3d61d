"""The examples of hooks run, and say what they promise."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name: str) -> Any:
    """An example as a module."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module(name)


def _compare(rank: int, size: int) -> dict[str, float]:
    return example("hooks_to_compiler").compare({"inner": "eager"})


def test_from_hooks_to_the_compiler(ranks) -> None:
    for errors in ranks(3).run(_compare):
        assert len(errors) == 4
        assert max(errors.values()) < 1e-5


def test_the_move_is_one_line() -> None:
    lines = [line for line in (EXAMPLES / "hooks_to_compiler.py").read_text().splitlines() if "# the one line" in line]
    assert [line.split(" = ")[1].partition("(")[0] for line in lines] == ["torch.compile"]


def test_bench_of_hooks(capsys: pytest.CaptureFixture[str]) -> None:
    found = example("bench_hooks").main(["--calls", "20", "--rounds", "3"])
    printed = capsys.readouterr().out
    assert list(found) == list(example("bench_hooks").WAYS)
    assert all(name in printed for name in found)
    assert 0 < found["no hooks"] < found["registry, one hook"]
    assert "make bench" in example("bench_hooks").__doc__
    assert "bench_hooks.py" in (EXAMPLES.parent / "Makefile").read_text()
