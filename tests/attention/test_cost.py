"""The choice among the ways to run an attention: a table of heads, ranks and lengths, and what the report says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attention_configs import Config
from attention_configs import record as attend
from fxsp.config import AttentionDegrees, Options, resolve_degrees
from fxsp.errors import OptionError
from fxsp.passes.attention.decide import SDPA
from fxsp.passes.base import Program
from fxsp.passes.graph import facts
from fxsp.passes.pipeline import partition_program
from fxsp.types import Ranks
from rule_recorder import Recorder
from tracing import check, partition, shard


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
    (node,) = program.whole.graph.find_nodes(op="call_function", target=SDPA)
    choice = facts(node).decision.detail
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


# What else decides.

MORE: list[tuple[dict[str, Any], tuple[int, int, int, int], str]] = [
    # options, (heads, key/value heads, ranks, tokens), method
    ({}, (8, 2, 2, 16), "gather_kv"),  # a quarter of the keys: 4 rows instead of 10
    ({}, (8, 8, 2, 16), "ulysses"),  # as many bytes as gathered keys
    ({}, (8, 4, 8, 16), "hybrid"),  # 26 rows; 28 if key heads are repeated, 56 if they are gathered
    ({}, (8, 2, 8, 16), "hybrid"),  # 22 rows; 28 and 28
    ({}, (6, 2, 4, 16), "gather_kv"),
    ({"gather_limit": 100}, (6, 2, 4, 16), "hybrid"),
    ({"gather_limit": 100}, (5, 5, 4, 16), "ring"),
    ({"gather_limit": 100}, (8, 2, 2, 16), "ring"),  # the same few bytes, block by block
    ({"allgather_degree": 4, "ulysses_degree": 1, "ring_degree": 1}, (8, 8, 4, 16), "gather_kv"),
    ({"allgather_degree": 4, "ulysses_degree": 1, "ring_degree": 1, "gather_limit": 1}, (8, 8, 4, 16), "gather_kv"),
    ({"ulysses_degree": 4, "ring_degree": 1}, (8, 2, 4, 16), "ulysses"),
    ({"ulysses_degree": 1, "ring_degree": 4}, (8, 8, 4, 16), "ring"),
    ({"ulysses_degree": 2, "ring_degree": 2}, (8, 8, 4, 16), "hybrid"),
    ({"bandwidth": 1e15, "latency": 1e-6}, (8, 8, 4, 16), "gather_kv"),  # a message costs more than all bytes
]


@pytest.mark.parametrize(("options", "sizes", "method"), MORE)
def test_what_else_decides(options: dict[str, Any], sizes: tuple[int, int, int, int], method: str) -> None:
    heads, kv_heads, size, tokens = sizes
    program = partition(attention(heads, kv_heads), *inputs(heads, kv_heads, tokens), size=size, **options)
    (record,) = program.report.attentions
    assert record.method == method
    assert " us" in record.detail
    if "gather_limit" in options and method != "gather_kv":
        assert "more than gather_limit=100" in dict(record.rejected)["gather_kv"]


def test_heads_are_exchanged_where_the_causal_flag_is_worth_more() -> None:
    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (torch.tanh(shard(x, 2)) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    assert partition(causal, *inputs(8, 2, 16)).report.attentions[0].method == "ulysses"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "options", "method"),
    [
        ("mha", {}, "ulysses"),
        ("indivisible", {}, "gather_kv"),
        ("indivisible", {"gather_limit": 1}, "ring"),
        ("mha", {"ulysses_degree": 2, "ring_degree": 2}, "hybrid"),
    ],
)
def test_the_backward_pass_costs_what_it_sends(
    heads: str, options: dict[str, Any], method: str, dtype: torch.dtype
) -> None:
    """What the choice reckons with is what the report of the backward pass counts."""
    recorder = Recorder()
    attend(recorder, Config("none", heads, "odd", 4), dtype)
    program = Program(recorder.finish(), Ranks(0, 4, "simulated"), training=True, options=Options(**options))
    program = partition_program(program)
    (record,) = program.report.attentions
    assert record.method == method
    kinds = {"ulysses": ("all_to_all",), "gather_kv": ("reduce_scatter",), "ring": ("rotation",)}
    back = [r for r in program.report.backward if r.kind in kinds.get(method, ("all_to_all", "rotation"))]
    assert f"and {sum(r.bytes for r in back)} bytes in {len(back)} backward" in record.detail


def test_a_degree_that_is_refused_is_told() -> None:
    program = partition(attention(5, 5), *inputs(5, 5, 9), size=4, ulysses_degree=2, ring_degree=2)
    (record,) = program.report.attentions
    assert "hybrid 2 x 2 was asked for, but 5 query heads do not divide over 2 ranks" in record.detail


def test_the_degree_of_gathered_keys_is_checked() -> None:
    options = Options.parse({"allgather_degree": 4})
    assert resolve_degrees(options, 4) == AttentionDegrees(1, 1, 4)
    with pytest.raises(OptionError, match="allgather_degree=4 does not match"):
        resolve_degrees(options, 3)
    with pytest.raises(OptionError, match="excludes"):
        resolve_degrees(Options.parse({"allgather_degree": 4, "ring_degree": 4}), 4)
    with pytest.raises(OptionError, match="must be an integer"):
        Options.parse({"allgather_degree": 0})
