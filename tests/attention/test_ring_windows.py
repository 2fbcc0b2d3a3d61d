"""A sliding window in a ring: what is seen, what is skipped, and that it is the attention of one device."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from test_ring_threads import _Threads
from torch import Tensor, nn
from torch.nn import functional as F

import fxsp
from distributed import Pool
from fxsp.kernels import collectives
from fxsp.kernels.attention import ring, ring_blocks
from fxsp.kernels.attention.ring_blocks import chunks_of, in_pieces, meetings, pairs_of
from fxsp.simulation.reference import ring as oracle_attention
from fxsp.types import Sequence
from lockstep import gradients
from replicated import check_replicated
from running import error_of
from tracing import partition, shard


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def _short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few rows are taken in pieces, as those of thousands are."""
    monkeypatch.setattr(ring_blocks, "_ROWS", 2)
    pairs_of.cache_clear()
    yield
    pairs_of.cache_clear()


# The blocks, against attention by definition.


def _compare(size: int, ulysses: int, tokens: list[int], head_tail: bool, window: int, padded: bool) -> None:
    sequence = Sequence.of(*tokens, layout="head-tail" if head_tail else "contiguous")
    whole, dealt = [False] * len(tokens), [head_tail] * len(tokens)
    rows = ulysses * int(sequence.local_length(size))
    q, k, v, g = ([torch.randn(1, h, rows, 4) for _ in range(size)] for h in (4, 2, 2, 4))
    masks = [(torch.rand(1, 1, 1, sum(tokens)) > 0.3).index_fill(3, torch.tensor([0]), True)] * size
    given = masks if padded else None
    real = []
    for rank in range(size):
        chunks = chunks_of(tokens, whole, ulysses, size // ulysses, rank // ulysses, dealt)
        real.append(torch.cat([torch.arange(c.rows) + c.first < c.limit for c in chunks]))
        g[rank] = g[rank] * real[rank].view(-1, 1)  # pads have no gradient
    where, layout = (tokens, whole, tokens, whole, True, 0.6), (dealt, dealt, window)
    expected = oracle_attention.ring_attention(q, k, v, given, *where, ulysses, 0, size, "", *layout)
    results = map(list, zip(*expected, strict=True))
    wanted = oracle_attention.ring_attention_backward(
        g, q, k, v, given, *results, *where, False, ulysses, 0, size, "", *layout
    )

    def run(rank: int) -> Any:
        operands = (q[rank], k[rank], v[rank], masks[rank] if padded else None)
        results = ring.ring_attention(*operands, *where, ulysses, rank, size, "none", *layout)
        at = (False, ulysses, rank, size, "none", *layout)
        return results, ring.ring_attention_backward(g[rank], *operands, *results, *where, *at)

    for rank, (found, grads) in enumerate(_Threads(size).run(run)):
        for a, b in zip(found, expected[rank], strict=True):
            torch.testing.assert_close(a[:, :, real[rank]], b[:, :, real[rank]], rtol=1e-5, atol=1e-5)
        for a, b in zip(grads, wanted[rank], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head_tail", [False, True])
@pytest.mark.parametrize(("size", "ulysses"), [(2, 1), (3, 1), (4, 2), (8, 1)])
def test_blocks(size: int, ulysses: int, head_tail: bool) -> None:
    """Output, log-sum-exp, gradients of q, k, v; narrow and wide windows, beside a mask of keys too."""
    lengths = ([1], [size - 1], [4 * size - 3], [3, 2 * size + 1])
    for (i, tokens), window in itertools.product(enumerate(lengths), (0, 2, size + 1, 99)):
        _compare(size, ulysses, tokens, head_tail, window, padded=(i + window) % 2 == 0)


@pytest.mark.usefixtures("_short_pieces")
@pytest.mark.parametrize("head_tail", [False, True])
def test_blocks_in_pieces(head_tail: bool) -> None:
    for tokens, window in itertools.product(([37], [64], [5, 30]), (0, 3, 9)):
        _compare(2, 1, tokens, head_tail, window, padded=window == 3)


# What is computed.


def _called(size: int, length: int, window: int, layout: str) -> list[int]:
    """Pairs that reach the kernel, by rank; the count of the report is the same, and full blocks have no bias."""
    sequence = Sequence.of(length, layout=layout)  # type: ignore[arg-type]
    flags = list(sequence.head_tail)
    where = ([length], [False], [length], [False], True, None, 1)
    x = torch.zeros(1, 1, int(sequence.local_length(size)), 4)
    found = []
    for rank in range(size):
        pairs = 0

        def block(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float, _: None) -> Any:
            nonlocal pairs
            seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
            pairs += int((seen.tril() if causal else seen).sum())
            assert bias is None or not bool((bias == 0).all())
            return torch.zeros_like(q), torch.zeros(q.shape[:3]), torch.zeros(q.shape[:3])

        with (
            mock.patch.object(ring, "block_forward", block),
            mock.patch.object(collectives, "start_shift", lambda flat, *_: flat),
            mock.patch.object(collectives, "wait", lambda flat: flat),
        ):
            ring.ring_attention(x, x, x, None, *where, rank, size, "none", flags, flags, window)
        tokens = (sequence.lengths, sequence.whole, sequence.head_tail)
        assert pairs == pairs_of(tokens, tokens, True, 1, size, rank, window)
        found.append(pairs)
    return found


@pytest.mark.usefixtures("_short_pieces")
@pytest.mark.parametrize("layout", ["contiguous", "head-tail"])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_what_no_query_sees_is_skipped(size: int, layout: str) -> None:
    length = 128
    wide = _called(size, length, length, layout)
    assert sum(wide) == length * (length + 1) // 2
    window = 4
    narrow = _called(size, length, window, layout)
    # Each query sees five keys; what is computed beside those are the corners of pieces.
    step = max(2, -(-length // size // (1 if layout == "contiguous" else 2) // 8))
    assert length * window < sum(narrow) <= length * (window + 2 * step + 1)


def test_a_chunk_before_every_window_is_skipped() -> None:
    """On eight places of four tokens each: a window of five reaches two places back, one of four wholly one."""
    own = [in_pieces(chunks_of([32], [False], 1, 8, place), 5) for place in range(8)]
    seen = [[m.how for m in meetings(own[6], own[place], True, True, 5)] for place in range(8)]
    assert seen == [[], [], [], [], ["positions"], ["positions"], ["causal"], []]
    seen = [[m.how for m in meetings(own[6], own[place], True, True, 7)] for place in range(8)]
    assert seen == [[], [], [], [], ["positions"], ["full"], ["causal"], []]


# Whole programs.


def _windowed(window: int, padded: bool, text: bool) -> Callable[..., Tensor]:
    def function(x: Tensor, keys: Tensor, more: Tensor) -> Tensor:
        x = torch.tanh(shard(x, 2))
        if text:
            x = torch.cat([torch.tanh(shard(more, 2)), x], 2)
        at = torch.arange(x.shape[2])
        mask = (at[None, :] <= at[:, None]) & (at[None, :] > at[:, None] - window)
        if padded:
            mask = mask & keys.bool()[:, None, None]
        return F.scaled_dot_product_attention(x, x, x, mask)

    return function


@pytest.mark.parametrize(("size", "ulysses"), [(2, 1), (3, 1), (4, 1), (8, 1), (4, 2), (8, 2)])
def test_values_and_gradients(size: int, ulysses: int) -> None:
    cases = [(2 * size + 1, 3, False, False), (size - 1, 2, True, False), (2 * size + 3, size, True, True)]
    for length, window, padded, text in cases:
        total = length + (3 if text else 0)
        if window >= total:
            window = max(total - 1, 1)
        x, more = (torch.randn(2, 4, n, 4, dtype=torch.float64, requires_grad=True) for n in (length, 3))
        keys = torch.ones(2, total, dtype=torch.long)
        keys[1, 1 + total // 2 :] = 0
        function = _windowed(window, padded, text)
        options = {"ulysses_degree": ulysses, "ring_degree": size // ulysses}
        program = partition(function, x, keys, more, size=size, training=True, **options)
        (record,) = program.report.attentions
        assert record.method == ("ring" if ulysses == 1 else "hybrid")
        # A single token has no window.
        assert total == 1 or f"a window of {window} tokens" in record.detail
        wanted = function(x, keys, more)
        given = torch.randn_like(wanted)
        leaves = [x, more] if text else [x]
        expected = torch.autograd.grad(wanted, leaves, given)
        outputs, grads = gradients(program.gm, size, [x, keys, more], [given], poison_pads=True)
        torch.testing.assert_close(check_replicated(outputs)[0], wanted.detach())
        for a, b in zip(check_replicated(grads), expected, strict=False):
            torch.testing.assert_close(a, b)


# Real processes.


class Model(nn.Module):
    _sp_plan: ClassVar[dict[str, Any]] = {"": {"x": fxsp.SequenceParallelInput(1)}}

    def __init__(self, window: int) -> None:
        super().__init__()
        self.qkv, self.window = nn.Linear(16, 48), window

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        at = torch.arange(x.shape[1])
        mask = (at[None, :] <= at[:, None]) & (at[None, :] > at[:, None] - self.window)
        if keys is not None:
            mask = mask & keys[:, None, None]
        return x + F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


def _steps(rank: int, size: int, window: int, padded: bool, lengths: list[int]) -> tuple[list[float], list[str], int]:
    model = Model(window)
    options = {"ulysses_degree": 1, "ring_degree": size, "inner": "aot_eager"}
    fast = torch.compile(model, backend="sp", dynamic=len(lengths) > 1, options=options)
    before, errors = len(fxsp.reports()), []
    for length in lengths:
        x = torch.randn(2, length, 16)
        keys = (torch.rand(2, length) > 0.3).index_fill(1, torch.tensor([0]), True) if padded else None
        results = []
        for f in (model, fast):
            y = x.clone().requires_grad_()
            out = f(y, keys)
            grads = torch.autograd.grad((out * torch.arange(16)).square().mean(), [y, *model.parameters()])
            results.append([out.detach(), *grads])
        errors += [error_of(b, a) for a, b in zip(*results, strict=True)]
    reports = fxsp.reports()[before:]
    details = [f"{a.method}: {a.detail}" for r in reports for a in r.attentions]
    return errors, details, len(reports)


@pytest.mark.parametrize(("padded", "lengths"), [(False, [11]), (True, [9, 14])])
def test_on_real_ranks(ranks: Callable[[int], Pool], padded: bool, lengths: list[int]) -> None:
    """A fixed length, and one graph for all lengths, where no length is compared."""
    for errors, details, graphs in ranks(2).run(_steps, 4, padded, lengths):
        assert max(errors) <= 1e-5
        assert graphs == 1
        assert all("ring: " in text and "a window of 4 tokens" in text for text in details)
