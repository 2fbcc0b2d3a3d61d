"""Attention of whole queries to split keys: merged or gathered, for every mask, head count and length."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional as F

import fxsp
from attention_configs import assert_same, run
from distributed import Pool
from fxsp.inspection.wire import bytes_sent
from fxsp.kernels import collectives
from fxsp.kernels.attention import split_kv as merged
from fxsp.passes.attention.decide import SDPA
from fxsp.passes.base import Program
from fxsp.simulation.reference import split_kv as oracle_merged
from fxsp.types import Segment, Sequence, Shard
from rule_recorder import Recorder, T
from running import collectives as running_collectives
from running import error_of

aten = torch.ops.aten
D, E = 8, 6
MASKS = ("none", "bool", "additive", "per_head", "padding", "smallest", "causal")
HEADS = {"mha": (4, 4), "gqa": (4, 2), "mqa": (3, 1)}
KEYS = {
    "dividing": lambda p: Sequence.of(4 * p),
    "odd": lambda p: Sequence.of(4 * p + 1),
    "fewer_than_ranks": lambda p: Sequence.of(p - 1),
    "two_segments": lambda p: Sequence.of(3, 4 * p - 1),
    "text_in_front": lambda p: Sequence((Segment(3, False), Segment(4 * p - 1))),
    "text_behind": lambda p: Sequence((Segment(4 * p - 1), Segment(3, False))),
    "head_tail": lambda p: Sequence.of(4 * p + 1, layout="head-tail"),
}


@dataclass(frozen=True)
class Case:
    mask: str
    heads: str
    keys: Sequence
    queries: int = 5
    batch: int = 2

    def record(self, recorder: Recorder, dtype: torch.dtype = torch.float64) -> None:
        heads, kv_heads = HEADS[self.heads]
        m, n = self.queries, int(self.keys.length)
        q, k, v = (
            _cast(recorder.input(T((self.batch, h, rows, width))), dtype)
            for h, rows, width in ((heads, m, D), (kv_heads, n, D), (kv_heads, n, E))
        )
        # Shards of inputs, as they are, would be had whole for nothing.
        k, v = (recorder.call(aten.softmax.int, recorder.lay(x, Shard(2, self.keys)), -1) for x in (k, v))
        mask = self._mask(recorder, heads, m, n, dtype)
        causal = self.mask == "causal"
        out = recorder.call(SDPA, q, k, v, mask, 0.0, causal, scale=0.7, enable_gqa=heads != kv_heads)
        recorder.outputs.append(out)

    def _mask(self, recorder: Recorder, heads: int, m: int, n: int, dtype: torch.dtype) -> Node | None:
        shapes = {
            "bool": ((m, n), "bool"),
            "additive": ((self.batch, 1, m, n), "normal"),
            "per_head": ((heads, m, n), "normal"),
            "padding": ((self.batch, 1, 1, n), "bool"),
            "smallest": ((1, 1, m, n), "bool"),
        }
        if self.mask not in shapes:
            return None
        node = recorder.input(T(*shapes[self.mask]))
        value = node.meta["val"].detach()
        if self.mask == "smallest":
            # The first query may look at nothing: one device attends to all keys alike.
            forbidden = torch.finfo(dtype).min
            value = torch.zeros([], dtype=dtype).where(value.index_fill(2, torch.tensor([0]), False), forbidden)
        elif value.dtype == torch.bool:
            # Of a row without keys one device makes no number; here some ranks have nothing to look at.
            value = value.index_fill(-1, torch.tensor([0]), True)
        else:
            value = value.to(dtype).requires_grad_()
        node.meta["val"] = value
        return node


def _cast(x: Node, dtype: torch.dtype) -> Node:
    x.meta["val"] = x.meta["val"].detach().to(dtype).requires_grad_()
    return x


def _sent(program: Program) -> list[tuple[str, Any]]:
    found = (
        (n.target._opname, bytes_sent(n, program.ranks))
        for n in program.graph.nodes
        if n.op == "call_function" and hasattr(n.target, "_opname")
    )
    return [(name, sent) for name, sent in found if sent]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("method", ["merged", "gather_kv"])
def test_every_mask_head_count_and_length(method: str, size: int) -> None:
    """Values and gradients (of queries, keys, values and additive masks); nothing is gathered unasked."""
    # Each length with each mask, with head counts in turn; both ways take other ones.
    turn = int(method == "merged")
    cases = [Case(m, h, KEYS[k](size)) for m, h, k in itertools.product(MASKS, HEADS, KEYS)][
        turn :: 2 if size < 4 else 3
    ]
    for training in (False, True):
        recorder = Recorder()
        for case in cases:
            case.record(recorder)
        degrees = {"allgather_degree": size} if method == "gather_kv" else {"gather_limit": 0}
        program = run(recorder, size, training=training, **degrees)
        assert {a.method for a in program.report.attentions} == {method}
        assert not program.report.implicit_gathers
        assert_same(recorder, program.gm, size, 1e-9, training=training, names=list(map(str, cases)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_what_is_sent(size: int, dtype: torch.dtype) -> None:
    """(P-1) (E + 2w) elements of each query and head; backward the sum of the gradients of the queries, in fp32."""
    recorder = Recorder()
    case = Case("none", "gqa", Sequence.of(64 * size + 1), queries=5)
    case.record(recorder, dtype)
    program = run(recorder, size, training=True)
    (attention,) = program.report.attentions
    elements, item = 2 * 4 * 5, dtype.itemsize
    assert attention.bytes == (size - 1) * elements * (E + 2 * 4 // item) * item
    assert _sent(program) == [("merged_attention", attention.bytes)]
    assert [(c.kind, c.bytes) for c in program.report.collectives] == [("all_gather", attention.bytes)]
    back = {(c.kind, c.bytes) for c in program.report.backward if c.kind == "all_reduce"}
    assert back == {("all_reduce", -(-elements * D * 4 * 2 * (size - 1) // size))}
    (rejected,) = attention.rejected
    assert rejected[0] == "gather_kv"
    assert f"sends {(size - 1) * 2 * 2 * 65 * (D + E) * item} bytes" in rejected[1]


@pytest.mark.parametrize("method", ["merged", "gather_kv"])
@pytest.mark.parametrize("training", [False, True])
def test_what_models_write(training: bool, method: str) -> None:
    """Key heads that are repeated, a mask that is computed from split keys, keys or values alone that are split."""
    size, tokens = 3, Shard(2, Sequence.of(10))
    recorder = Recorder()
    q = recorder.input(T((1, 4, 3, D)))
    x = recorder.call(aten.softmax.int, recorder.lay(recorder.input(T((1, 2, 10, D))), tokens), -1)
    whole = recorder.input(T((1, 4, 10, D)))
    many = recorder.call(aten.repeat_interleave.self_int, x, 2, 1)
    bias = recorder.call(aten.unsqueeze.default, recorder.call(aten.sum.dim_IntList, x, [1, 3]), 1)
    bias = recorder.call(aten.unsqueeze.default, bias, 1)
    calls = [(q, many, many, None), (q, many, many, bias), (q, many, whole, None), (q, whole, many, bias)]
    recorder.outputs += [recorder.call(SDPA, *operands) for operands in calls]
    degrees = {"allgather_degree": size} if method == "gather_kv" else {"gather_limit": 0}
    program = run(recorder, size, training=training, **degrees)
    assert [a.method for a in program.report.attentions] == [method] * 4
    heads = {True: [2, 2, 4, 4], False: [4] * 4}[method == "gather_kv"]
    rows = {True: 4 * 2 * D, False: 3 * (D + 2)}[method == "gather_kv"]
    assert [a.bytes for a in program.report.attentions] == [(size - 1) * h * rows * 8 for h in heads]
    # The mask, of one number for each key.
    assert {g.bytes for g in program.report.implicit_gathers if g.kind == "implicit"} == {(size - 1) * 4 * 8}
    assert_same(recorder, program.gm, size, 1e-9, training=training, names=list("abcd"))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("q", "k", "v", "methods"),
    [
        ((2, 3, D), (2, 10, D), (2, 10, E), ["gather_kv"]),
        ((3, D), (10, D), (10, D), ["gather_kv"]),
        ((1, 4, 3, D), (2, 4, 10, D), (2, 4, 10, D), ["gather_kv"]),
        ((2, 1, 3, D), (2, 4, 10, D), (2, 4, 10, D), ["gather_kv"]),
        ((2, 4, 3, D), (2, 1, 10, D), (2, 1, 10, D), ["merged"]),
        ((2, 4, 3, D), (2, 1, 10, D), (2, 4, 10, D), []),
        ((2, 4, 10, D), (2, 4, 10, D), (2, 4, 10, D), ["ulysses"]),
    ],
)
def test_broadcast_shapes(training: bool, q: Any, k: Any, v: Any, methods: list[str]) -> None:
    """Without heads, or with one batch entry or head for all; as many whole queries as keys are split like these."""
    size = 2
    recorder = Recorder()
    queries = recorder.input(T(q))
    keys, values = (
        recorder.call(aten.softmax.int, recorder.lay(recorder.input(T(s)), Shard(len(s) - 2, Sequence.of(10))), -1)
        for s in (k, v)
    )
    recorder.outputs.append(recorder.call(SDPA, queries, keys, values))
    program = run(recorder, size, training=training, gather_limit=0, ulysses_degree=size, ring_degree=1)
    assert [a.method for a in program.report.attentions] == methods
    assert_same(recorder, program.gm, size, 1e-9, training=training, names=["out"])


def test_many_queries_gather_few_keys() -> None:
    recorder = Recorder()
    Case("none", "mqa", Sequence.of(5), queries=40).record(recorder)
    program = run(recorder, 2)
    (attention,) = program.report.attentions
    assert (attention.method, attention.bytes) == ("gather_kv", 2 * 3 * (D + E) * 8)
    assert [name for name, _ in attention.rejected] == ["merged"]


# The kernel.


def _on_threads(size: int, function: Callable[[int], Any]) -> list[Any]:
    """``function(rank)`` of all ranks at once, with an all-gather between threads."""
    sent: dict[int, Tensor] = {}
    barrier = threading.Barrier(size, timeout=60)
    own = threading.local()

    def all_gather(x: Tensor, size: int, group: str) -> Tensor:
        sent[own.rank] = x
        barrier.wait()
        return torch.cat([sent[rank] for rank in range(size)])

    def run(rank: int) -> Any:
        own.rank = rank
        return function(rank)

    with mock.patch.object(collectives, "all_gather", all_gather), ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


@pytest.mark.parametrize("mask", [*MASKS, "none_allowed"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_kernel_is_what_the_oracle_says(size: int, mask: str) -> None:
    """Output, log-sum-exp, and gradients of each rank, where some keys are pads, and some ranks have none."""
    torch.manual_seed(size)
    for keys, heads, width in zip(KEYS.values(), [*HEADS] * 3, (D, E) * 4, strict=False):
        tokens, (h, kv) = keys(size), HEADS[heads]
        n, rows = int(tokens.length), int(tokens.local_length(size))
        q, grad = torch.randn(2, h, 5, D), torch.randn(2, h, 5, width)
        k, v = ([torch.randn(2, kv, rows, w) for _ in range(size)] for w in (D, width))
        given: Tensor | None = None
        if mask in ("additive", "per_head"):
            given = torch.randn(2 if mask == "additive" else 1, h if mask == "per_head" else 1, 5, n)
        elif mask not in ("none", "causal"):
            given = (torch.rand(2, 1, 1 if mask == "padding" else 5, n) > 0.5).index_fill(3, torch.tensor([0]), True)
            if mask in ("none_allowed", "smallest"):
                given = given.index_fill(2, torch.tensor([1]), False)
            if mask == "smallest":
                given = torch.zeros([]).where(given, torch.finfo(torch.float32).min)
        differentiable = given is not None and given.is_floating_point()
        masks = None if given is None else [given] * size
        where, at = (tokens.lengths, tokens.whole, mask == "causal", 0.6), (size, "none", tokens.head_tail)
        expected = oracle_merged.merged_attention([q] * size, k, v, masks, *where, 0, *at)
        results = map(list, zip(*expected, strict=True))
        wanted = oracle_merged.merged_attention_backward(
            [grad] * size, [q] * size, k, v, masks, *results, *where, differentiable, 0, *at
        )

        def forward(r: int, of: Any = (q, k, v, given, where, at)) -> Any:
            q, k, v, given, where, at = of
            return merged.merged_attention(q, k[r], v[r], given, *where, r, *at)

        found = _on_threads(size, forward)

        def backward(r: int, of: Any = (grad, q, k, v, given, found, differentiable, where, at)) -> Any:
            grad, q, k, v, given, results, needed, where, at = of
            return merged.merged_attention_backward(grad, q, k[r], v[r], given, *results[r], *where, needed, r, *at)

        pairs = list(zip(found, expected, strict=True))
        pairs += zip(_on_threads(size, backward), wanted, strict=True)
        for got, want in pairs:
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [2, 4])
def test_low_precision(size: int) -> None:
    """bf16 within 1e-2 of fp32 on one device (2-norm)."""
    torch.manual_seed(0)
    q, k, v, g = (torch.randn(2, 4, n, 16).to(torch.bfloat16) for n in (5, 32, 32, 5))
    leaves = [x.float().requires_grad_() for x in (q, k, v)]
    want = F.scaled_dot_product_attention(*leaves)
    wanted = torch.autograd.grad(want, leaves, g.float())
    ks, vs = (x.chunk(size, 2) for x in (k, v))
    where = ([32], [False], False, None)
    found = _on_threads(size, lambda r: merged.merged_attention(q, ks[r], vs[r], None, *where, r, size, "none"))
    parts = [
        merged.merged_attention_backward(g, q, ks[r], vs[r], None, *found[r], *where, False, r, size, "none")
        for r in range(size)
    ]
    got = [sum(p[0].float() for p in parts), *(torch.cat([p[i] for p in parts], 2) for i in (1, 2))]
    for a, b in zip([found[-1][0], *got], [want, *wanted], strict=True):
        assert float((a.float() - b.detach()).norm() / b.detach().norm()) <= 1e-2


# A model on real processes.


class Resampler(nn.Module):
    """Learned queries that look at split tokens, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, 3, 16))
        self.into, self.q, self.kv, self.out = (nn.Linear(16, n) for n in (16, 16, 16, 16))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x, y = self.into(x), self.latents.expand(x.shape[0], -1, -1)
        for _ in range(2):
            q = self.q(y).unflatten(-1, (4, 4)).transpose(1, 2)
            k, v = self.kv(x).unflatten(-1, (2, 2, 4)).permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
            y = y + self.out(out.transpose(1, 2).flatten(2))
        return y


def _resample(rank: int, size: int, lengths: list[int]) -> Any:
    model = Resampler()
    plan = {"": {"x": fxsp.SequenceParallelInput(1)}}
    options = {"inner": "aot_eager", "plan": plan, "strict": True, "gather_limit": 0}
    fast = torch.compile(model, backend="sp", dynamic=True, options=options)
    errors, before = [], len(fxsp.reports())
    for length in lengths:
        x = torch.randn(2, length, 16)
        mask = (torch.rand(2, 1, 1, length) > 0.4).index_fill(-1, torch.tensor([0]), True)
        results = []
        for f in (model, fast):
            y = x.clone().requires_grad_()
            out = f(y, mask)
            results.append([out.detach(), *torch.autograd.grad(out.square().mean(), [y, *model.parameters()])])
        errors.append(max(error_of(b, a) for a, b in zip(*results, strict=True)))
    with running_collectives() as counts:
        fast(y, mask)
    return errors, [a.method for a in fxsp.reports()[-1].attentions], len(fxsp.reports()) - before, dict(counts)


def test_a_resampler(ranks: Callable[[int], Pool]) -> None:
    """Output and gradients at three lengths by one graph, with pads, padded keys, and nothing but its two gathers."""
    for errors, methods, graphs, counts in ranks(3).run(_resample, [19, 34, 46]):
        assert max(errors) <= 1e-5
        assert methods == ["merged"] * 2
        assert graphs == 1
        assert [n for name, n in counts.items() if "all_gather" in name] == [2]
        assert sum(counts.values()) == 2, counts
