"""The benchmarks of split values run, and what they compare is the same work."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch

import fxsp
from distributed import Pool
from running import error_of

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def _bench(name: str = "bench_regional") -> Any:
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module(name)


def _run(rank: int, size: int) -> list[tuple[str, float, dict[str, tuple[int, int]], int]]:
    bench = _bench()
    small = ["--blocks", "2", "--image", "16", "--text", "5", "--rounds", "2", "--inner", "aot_eager"]
    rows = bench.main([*small, "--ways", bench.WHOLE, bench.REGIONAL])
    assert "by blocks / fxsp, whole" in bench.verdicts(rows)
    return [(row.family, row.error, row.traffic, len(row.times)) for row in rows]


def test_the_same_work(ranks: Any) -> None:
    pool: Pool = ranks(2)
    for rows in pool.run(_run):
        (whole, _, sent, _), (regional, _, sent_by_blocks, _) = rows
        assert (whole, regional) == (_bench().WHOLE, _bench().REGIONAL)
        assert all(error <= 1e-5 and times == 2 for _, error, _, times in rows)
        assert sent_by_blocks == sent
    assert "bench_regional.py" in (EXAMPLES.parent / "Makefile").read_text()


def _eager(rank: int, size: int) -> tuple[float, list[str]]:
    bench = _bench("bench_eager")
    with torch.no_grad():
        ways = bench.operands(7 * size)
        worst = 0.0
        for op in bench.OPS.values():
            rows = op(*ways["plain"])
            for whole in (fxsp.whole(op(*ways["fxsp"])), op(*ways["DTensor"]).full_tensor()):
                worst = max(worst, error_of(whole.chunk(size, 1)[rank], rows))
    return worst, list(bench.main(["--calls", "2", "--rounds", "2"]))


def test_operators_beside_dtensor(ranks: Any) -> None:
    for worst, ways in ranks(2).run(_eager):
        assert worst <= 1e-6
        assert ways == ["plain", "fxsp", "DTensor"]
    assert "bench_eager.py" in (EXAMPLES.parent / "Makefile").read_text()
