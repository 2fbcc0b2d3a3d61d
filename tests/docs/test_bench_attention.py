"""The benchmark of attentions runs: every way, right on real ranks, with the bytes that formulas give."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed import Pool

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TOKENS, HEADS, WIDTH = 37, 4, 8


def _bench() -> Any:
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    import bench_attention

    return bench_attention


def _run(rank: int, size: int, causal: bool) -> list[tuple[str, str, int, int, float, int]]:
    bench = _bench()
    inputs = [torch.randn(1, HEADS, TOKENS, WIDTH) for _ in range(3)]
    with torch.no_grad():
        expected = bench.Attention(causal)(*inputs)
        ways = bench.ways(size, HEADS).items()
        found = [bench.prepare(name, options, inputs, causal, expected) for name, options in ways]
        bench.measure(found, inputs, 2)
    text, _ = bench.table(TOKENS, found)
    assert all(way.name in text for way in found)
    return [(way.name, way.method, way.messages, way.bytes, way.error, len(way.times)) for way in found]


@pytest.mark.parametrize("causal", [False, True])
def test_every_way(ranks: Any, causal: bool) -> None:
    pool: Pool = ranks(4)
    outcomes = pool.run(_run, causal, timeout=300.0)
    assert all([row[:4] for row in outcome] == [row[:4] for row in outcomes[0]] for outcome in outcomes)
    by_name = {row[0]: row for row in outcomes[0]}
    assert list(by_name) == ["ulysses", "ring", "hybrid", "gather_kv", "automatic"]
    assert all(name == method for name, method, *_ in outcomes[0][:-1])
    assert all(error <= 1e-5 and times == 2 for *_, error, times in outcomes[0])
    rows = -(-TOKENS // 4) * HEADS * WIDTH * 4  # bytes of a rank's rows of one tensor
    assert by_name["ulysses"][2:4] == (2, 4 * rows * 3 // 4)
    assert by_name["gather_kv"][2:4] == (1, 2 * rows * 3)
    if not causal:
        assert by_name["ring"][2:4] == (3, 2 * rows * 3)


def test_a_choice_is_judged_by_the_way_that_it_takes() -> None:
    bench = _bench()
    ways = [
        bench.Way("ulysses", None, "ulysses", 2, 10, 0.0, [1.0, 3.0]),
        bench.Way("ring", None, "ring", 3, 20, 0.0, [2.5]),
    ]
    assert bench.table(8, [*ways, bench.Way("automatic", None, "ulysses", 2, 10, 0.0, [9.0])])[1]
    assert not bench.table(8, [*ways, bench.Way("automatic", None, "ring", 3, 20, 0.0, [9.0])])[1]


def test_only_legal_ways() -> None:
    ways = _bench().ways
    assert list(ways(4, 6)) == ["ring", "hybrid", "gather_kv", "automatic"]
    assert ways(4, 6)["hybrid"] == {"ulysses_degree": 2, "ring_degree": 2}
    assert list(ways(3, 4)) == ["ring", "gather_kv", "automatic"]


def test_make_bench_runs_it() -> None:
    assert "--nproc-per-node 4 examples/bench_attention.py" in (EXAMPLES.parent / "Makefile").read_text()
