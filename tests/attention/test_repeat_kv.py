"""Key/value heads repeated for the query heads: the heads travel once, and are repeated where they arrive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tracing import check, collectives, partition, shard

TOKENS, WIDTH = 5, 4


def expand(x: Tensor, times: int) -> Tensor:
    """As transformers writes it."""
    batch, heads, tokens, width = x.shape
    return x[:, :, None, :, :].expand(batch, heads, times, tokens, width).reshape(batch, heads * times, tokens, width)


def interleave(x: Tensor, times: int) -> Tensor:
    return x.repeat_interleave(times, 1)


def copied(x: Tensor, times: int) -> Tensor:
    return x.unsqueeze(2).expand(-1, -1, times, -1, -1).contiguous().flatten(1, 2).contiguous()


def interleaved_otherwise(x: Tensor, times: int) -> Tensor:
    """``[a, b, a, b]``: heads in another order, which no exchange may take for ``[a, a, b, b]``."""
    return x.unsqueeze(1).expand(-1, times, -1, -1, -1).flatten(1, 2)


def attention(repeat: Callable[[Tensor, int], Tensor], heads: int, kv_heads: int, causal: bool = False) -> Any:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (torch.tanh(shard(x, 2)) for x in (q, k, v))
        k, v = (repeat(x, heads // kv_heads) for x in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return function


def inputs(heads: int, kv_heads: int) -> list[Tensor]:
    return [torch.randn(2, n, TOKENS, WIDTH, dtype=torch.float64) for n in (heads, kv_heads, kv_heads)]


def bytes_per_rank(heads: int, size: int, share: float = 1.0) -> float:
    return 2 * heads * -(-TOKENS // size) * WIDTH * 8 * (size - 1) * share


@pytest.mark.parametrize("repeat", [expand, interleave, copied])
@pytest.mark.parametrize("causal", [False, True])
def test_heads_travel_once(repeat: Callable[[Tensor, int], Tensor], causal: bool) -> None:
    check(attention(repeat, 4, 2, causal), *inputs(4, 2))
    # Of two ranks keys and values would be gathered, if nothing is causal: they are fewer bytes.
    program = partition(attention(repeat, 4, 2, causal), *inputs(4, 2), ulysses_degree=2, ring_degree=1)
    (record,) = program.report.attentions
    assert record.method == "ulysses"
    # Queries and output of four heads, keys and values of two; each sends half of its own to the other rank.
    assert record.bytes == bytes_per_rank(4 + 4 + 2 + 2, 2, 1 / 2)
    sent = [c.bytes for c in program.report.collectives if c.kind == "all_to_all"]
    assert sum(sent) == record.bytes
    assert collectives(program) == {"all_to_all": 2, "gather": 1}


def test_another_order_of_heads_is_no_repetition() -> None:
    program = check(attention(interleaved_otherwise, 4, 2), *inputs(4, 2))
    (record,) = program.report.attentions
    assert record.bytes == bytes_per_rank(4 * 4, 2, 1 / 2)


def test_fewer_heads_than_ranks_are_gathered_where_that_is_cheapest() -> None:
    program = check(attention(expand, 4, 1), *inputs(4, 1), size=4)
    (record,) = program.report.attentions
    assert record.method == "gather_kv"
    assert record.bytes == bytes_per_rank(1 + 1, 4)
    assert record.rejected[0][0] == "ulysses"
    assert collectives(program) == {"gather_used": 1, "gather": 1}


def test_heads_are_repeated_before_the_exchange_as_often_as_the_ranks_need() -> None:
    # Two heads for four ranks: each twice, not four times.
    program = check(attention(expand, 8, 2), *inputs(8, 2), size=4)
    (record,) = program.report.attentions
    gather, exchange = bytes_per_rank(2 + 2, 4), bytes_per_rank(8 + 8 + 4 + 4, 4, 1 / 4)
    assert gather < exchange
    assert record.method == "gather_kv"
    assert dict(record.rejected)["ulysses"].startswith(f"sends {exchange:.0f} bytes per rank in 2 messages")
    program = check(attention(expand, 8, 4), *inputs(8, 4), size=8)
    (record,) = program.report.attentions
    # No head is repeated in an exchange among four, within a ring of two: these are fewer bytes.
    assert record.method == "hybrid"
    hybrid = bytes_per_rank(8 + 8 + 4 + 4, 8, 3 / 4 / 7) + bytes_per_rank(4 + 4, 8, 1 / 7)
    assert record.bytes == hybrid < bytes_per_rank(8 * 4, 8, 1 / 8)
    program = partition(attention(expand, 8, 4), *inputs(8, 4), size=8, ulysses_degree=8, ring_degree=1)
    (record,) = program.report.attentions
    assert record.method == "ulysses"
    assert record.bytes == bytes_per_rank(8 * 4, 8, 1 / 8)
    assert collectives(program) == {"all_to_all": 2, "gather": 1}


def test_what_does_not_divide_at_all_is_gathered() -> None:
    program = check(attention(expand, 6, 3), *inputs(6, 3), size=4)
    (record,) = program.report.attentions
    assert record.method == "gather_kv"
    assert record.bytes == bytes_per_rank(3 + 3, 4)
