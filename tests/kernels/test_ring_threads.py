"""The blocks of a ring over heads and tails: ranks as threads, which pass keys on, against attention by definition."""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fxsp.kernels import collectives
from fxsp.kernels.attention import ring
from fxsp.kernels.attention.ring_blocks import chunks_of
from fxsp.simulation.reference import ring as oracle_attention
from fxsp.types import Sequence


class _Threads:
    """``collectives.start_shift`` and ``wait`` between the threads of this process, one for each rank."""

    def __init__(self, size: int) -> None:
        self.arrived: list[queue.Queue[Tensor]] = [queue.Queue() for _ in range(size)]

    def start_shift(self, x: Tensor, by: int, rank: int, size: int, group: str) -> Any:
        self.arrived[(rank + by) % size].put(x)
        return self.arrived[rank]

    def wait(self, pending: Any) -> Tensor:
        x: Tensor = pending.get(timeout=60)
        return x

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        with (
            mock.patch.object(collectives, "start_shift", self.start_shift),
            mock.patch.object(collectives, "wait", self.wait),
            ThreadPoolExecutor(len(self.arrived)) as pool,
        ):
            return list(pool.map(function, range(len(self.arrived))))


def _masks(kind: str, rows: int, columns: int, size: int) -> list[Tensor] | None:
    if kind not in ("bool", "additive", "padding", "causal padding"):
        return None
    x = torch.randn(1, 1, 1 if "padding" in kind else rows, columns)
    return [x if kind == "additive" else (x > -0.5).index_fill(3, torch.tensor([0]), True)] * size


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("mask", ["causal", "causal padding", "none", "bool", "additive", "padding"])
@pytest.mark.parametrize(("size", "ulysses"), [(2, 1), (3, 1), (4, 1), (4, 2)])
def test_heads_and_tails(size: int, ulysses: int, mask: str, dropout: float) -> None:
    """Output, log-sum-exp, and the gradients of q, k, v and the mask; with dropout, of the same draw."""
    torch.manual_seed(size)
    torch.set_num_threads(1)
    for tokens in ([1], [5], [4 * size], [4 * size - 3], [3, 2 * size + 1]):
        sequence = Sequence.of(*tokens, layout="head-tail")
        lengths, whole, head_tail = tokens, [False] * len(tokens), [True] * len(tokens)
        rows = ulysses * int(sequence.local_length(size))
        q, k, v, g = ([torch.randn(2, h, rows, 4) for _ in range(size)] for h in (4, 2, 2, 4))
        masks = _masks(mask, rows, sum(tokens), size)
        where = (lengths, whole, lengths, whole, "causal" in mask, 0.6)
        layout = (head_tail, head_tail, None, dropout, torch.tensor([1234567]) if dropout else None)
        real = []
        for rank in range(size):
            chunks = chunks_of(lengths, whole, ulysses, size // ulysses, rank // ulysses, head_tail)
            real.append(torch.cat([torch.arange(c.rows) + c.first < c.limit for c in chunks]))
            g[rank] = g[rank] * real[rank].view(-1, 1)  # pads have no gradient
        operands = [(q[r], k[r], v[r], None if masks is None else masks[r]) for r in range(size)]
        expected = oracle_attention.ring_attention(q, k, v, masks, *where, ulysses, 0, size, "", *layout)
        results = map(list, zip(*expected, strict=True))
        wanted = oracle_attention.ring_attention_backward(
            g, q, k, v, masks, *results, *where, mask == "additive", ulysses, 0, size, "", *layout
        )

        def forward(rank: int, of: Any = operands, how: Any = where, layout: Any = layout) -> Any:
            return ring.ring_attention(*of[rank], *how, ulysses, rank, size, "none", *layout)

        found = _Threads(size).run(forward)

        def backward(rank: int, of: Any = (g, operands, found), how: Any = where, layout: Any = layout) -> Any:
            grads, inputs, results = (x[rank] for x in of)
            at = (mask == "additive", ulysses, rank, size, "none", *layout)
            return ring.ring_attention_backward(grads, *inputs, *results, *how, *at)

        gradients = _Threads(size).run(backward)
        for rank, keep in enumerate(real):
            for a, b in zip(found[rank], expected[rank], strict=True):
                torch.testing.assert_close(a[:, :, keep], b[:, :, keep], rtol=1e-5, atol=1e-5)
            for a, b in zip(gradients[rank], wanted[rank], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
