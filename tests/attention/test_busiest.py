"""Causal attention: the work of the busiest rank is priced beside what is sent, where the machine is known."""

from __future__ import annotations

import torch
from test_cost import inputs
from torch import Tensor

from fxsp.device import Device, Link
from fxsp.kernels.attention.banded import blocks
from fxsp.machine import Machine
from fxsp.passes.attention.busiest import _busiest
from tracing import partition, shard


def _chosen(flops: float, bandwidth: float, heads: int, kv_heads: int, *, causal: bool = True) -> str:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (torch.tanh(shard(x, 2)) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    machine = Machine("invented", Device("x", flops, 1e12, 0.0, Link(0.0, bandwidth)), Link(0.0, bandwidth))
    given = inputs(heads, kv_heads, 16)
    return str(partition(attend, *given, size=2, machine=machine).report.attentions[0].method)


def test_a_window_is_less_work_in_blocks_and_in_a_ring() -> None:
    flat = (16384,), (False,), (1,)
    whole, windowed = (_busiest(flat, (True,), 1, 4, window) for window in (None, 512))
    assert windowed < whole / 2
    assert 16384**2 / 8 < whole < 16384**2 / 6, "an eighth of all pairs, the diagonal in blocks"
    seen = [(stop - start) * (last - first) for start, stop, first, last in blocks(16384, 16384, True, 512)]
    assert 16384 * 512 < sum(seen) < 16384**2 / 5
    assert len(list(blocks(7, 9, True, 2))) == 1, "few rows are one block, under one mask"


def test_work_decides_where_computing_is_slow() -> None:
    # Gathered keys are fewer bytes, but the flag becomes a mask: twice the pairs.
    assert _chosen(1e6, 1e15, 8, 2) == "ulysses"
    assert _chosen(1e6, 1e15, 8, 2, causal=False) == "gather_kv"


def test_bytes_decide_where_sending_is_slow() -> None:
    # Keys and values alone, gathered or going round, are the same bytes; in a ring they meet half of the queries.
    assert _chosen(1e18, 1e3, 8, 2) == "ring"
    assert _chosen(1e18, 1e3, 8, 2, causal=False) == "gather_kv"


def test_the_ring_is_priced_with_heads_and_tails() -> None:
    # Three heads do not divide over two ranks; a ring has half of the pairs of gathered keys.
    assert _chosen(1e6, 1e15, 3, 3) == "ring"
    assert _chosen(1e6, 1e15, 3, 3, causal=False) == "gather_kv"
