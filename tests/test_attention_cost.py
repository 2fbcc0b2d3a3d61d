"""The choice among the ways to run an attention: a table of heads, ranks and lengths, and what the report says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from tracing import check, partition, shard

from fxsp.config import Options
from fxsp.errors import OptionError
from fxsp.passes.attention import SDPA


def attention(heads: int, kv_heads: int) -> Any:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (torch.tanh(shard(x, 2)) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=heads != kv_heads)

    return function


def inputs(heads: int, kv_heads: int, tokens: int) -> list[Tensor]:
    return [torch.randn(1, n, tokens, 4, dtype=torch.float64) for n in (heads, kv_heads, kv_heads)]


TABLE = [
    # heads, key/value heads, ranks, tokens, method, degrees
    (8, 8, 4, 16, "ulysses", (4, 1)),
    (8, 4, 4, 15, "ulysses", (4, 1)),
    (24, 24, 16, 32, "hybrid", (8, 2)),
    (24, 24, 16, 31, "hybrid", (8, 2)),
    (6, 6, 4, 9, "hybrid", (2, 2)),
    (12, 12, 8, 5, "hybrid", (4, 2)),
    (5, 5, 4, 16, "gather_kv", (1, 1)),
    (8, 1, 8, 16, "gather_kv", (1, 1)),
    (3, 3, 2, 1, "gather_kv", (1, 1)),
]


@pytest.mark.parametrize(("heads", "kv_heads", "size", "tokens", "method", "degrees"), TABLE)
def test_the_choice(heads: int, kv_heads: int, size: int, tokens: int, method: str, degrees: tuple[int, int]) -> None:
    program = check(
        attention(heads, kv_heads), *inputs(heads, kv_heads, tokens), size=size, training=size <= 4, tolerance=1e-7
    )
    (record,) = program.report.attentions
    assert record.method == method
    (node,) = program.facts["global"].graph.find_nodes(op="call_function", target=SDPA)
    choice = node.meta["sp_call"].detail
    assert (choice.ulysses, choice.ring) == degrees
    row = -(-tokens // size) * 4 * 8
    q, kv = 2 * heads * row, 2 * kv_heads * row
    u, r = degrees
    assert record.bytes == (kv * (size - 1) if method == "gather_kv" else (q + kv) * (u - 1) // u + kv * (r - 1))
    # Every other way is there: P has so many divisors, and keys and values may be gathered.
    ways = sum(size % d == 0 for d in range(1, size + 1)) + 1
    assert len(record.rejected) == ways - 1
    for name, why in record.rejected:
        assert "do not divide" in why or ("bytes per rank in" in why and "message" in why and " us" in why), name


def test_latency_decides_where_it_is_given() -> None:
    function, given = attention(6, 6), inputs(6, 6, 9)
    assert partition(function, *given, size=4).report.attentions[0].method == "hybrid"
    slow = partition(function, *given, size=4, latency=1.0)
    assert slow.report.attentions[0].method == "gather_kv"
    fast = partition(function, *given, size=4, latency=1.0, bandwidth=1.0)
    assert fast.report.attentions[0].method == "hybrid"


@pytest.mark.parametrize("options", [{"latency": -1}, {"bandwidth": 0}, {"latency": "low"}, {"bandwidth": True}])
def test_costs_are_numbers(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="it must be a number of"):
        Options.parse(options)
    assert Options.parse({"latency": 0, "bandwidth": 1e9}).bandwidth == 1e9
