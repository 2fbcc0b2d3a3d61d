"""Attention that is written out: right, reported with what it sends, and never with scores that are gathered."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fxsp
from fxsp.errors import StrictError
from fxsp.inspection.report_text import attention_lines
from fxsp.lengths import hint
from fxsp.passes.attention.unfused_report import GATHERED, LINEAR, LOCAL, SCORES
from fxsp.passes.base import Program
from fxsp.passes.graph import mark
from fxsp.passes.pipeline import Runner, partition_program
from fxsp.torch_internals import fake_mode_of, size_hints
from fxsp.types import Ranks
from tracing import check, collectives, gather, partition, shard, trace

BATCH, HEADS, WIDTH = 2, 4, 4
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / math.sqrt(WIDTH)).softmax(-1) @ v


def casts_and_dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q * WIDTH**-0.5, k.mT)
    weights = torch.softmax(scores, -1, dtype=torch.float64).to(q.dtype)
    return torch.matmul(torch.dropout(weights, 0.5, False), v)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    allowed = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    return (q @ k.mT).masked_fill(~allowed, -math.inf).softmax(-1) @ v


def key_padding(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    allowed = torch.arange(k.shape[-2]) < torch.tensor([[k.shape[-2]], [max(1, k.shape[-2] - 2)]])
    scores = torch.where(allowed[:, None, None, :], q @ k.mT, torch.finfo(q.dtype).min)
    return scores.softmax(-1) @ v


def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """BLOOM: heads are part of the batch, and the bias is added by the product."""
    slopes = torch.arange(1.0, HEADS + 1, dtype=q.dtype).repeat(BATCH)[:, None, None]
    bias = slopes * torch.arange(k.shape[-2]).to(q.dtype)
    q3, k3, v3 = (x.reshape(BATCH * HEADS, -1, WIDTH) for x in (q, k, v))
    scores = torch.baddbmm(bias, q3, k3.mT, beta=1.0, alpha=0.5).view(BATCH, HEADS, q.shape[-2], -1)
    return torch.bmm(scores.softmax(-1).view(BATCH * HEADS, q.shape[-2], -1), v3).view(BATCH, HEADS, -1, WIDTH)


def empty_baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """diffusers' ``get_attention_scores``."""
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    start = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
    scores = torch.baddbmm(start, q, k.transpose(-1, -2), beta=0, alpha=WIDTH**-0.5)
    return torch.bmm(scores.softmax(dim=-1), v).unflatten(0, (BATCH, HEADS))


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).transpose(1, 2)


def einsum_with_dots(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("...qk,...kd->...qd", torch.einsum("...qd,...kd", q, k).softmax(-1), v)


def keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores lie the other way round: the general rules would keep the keys, and gather the queries."""
    weights = torch.softmax(k @ q.mT, dim=-2)
    return (v.mT @ weights).mT


def soft_cap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.tanh(q @ k.mT / 3) * 3).softmax(-1) @ v


def sink(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """GPT-OSS: a column for no key at all."""
    scores = q @ k.mT
    scores = torch.cat([scores, torch.ones_like(scores[..., :1])], dim=-1)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return scores.softmax(-1)[..., :-1] @ v


WRITTEN = [
    matmul, casts_and_dropout, causal, key_padding, alibi, empty_baddbmm, einsum, einsum_with_dots, keys_first,
    soft_cap, sink,
]  # fmt: skip


def split(attend: Attention, *, queries: bool = True, keys: bool = True) -> Any:
    def function(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        q = shard(q, 2) if queries else q
        k, v = (shard(x, 2) if keys else x for x in (k, v))
        return attend(*(torch.nn.functional.linear(x, w) for x in (q, k, v)))

    return function


def inputs(tokens: int, others: int | None = None, kv_heads: int = HEADS) -> list[Tensor]:
    torch.manual_seed(0)
    sizes = [(HEADS, tokens), (kv_heads, others or tokens), (kv_heads, others or tokens)]
    found = [torch.randn(BATCH, h, s, WIDTH, dtype=torch.float64) for h, s in sizes]
    return [*found, torch.randn(WIDTH, WIDTH, dtype=torch.float64)]


def kv_bytes(tokens: int, size: int, heads: int = HEADS) -> int:
    """What a rank sends of keys and values: its rows to all others."""
    return 2 * BATCH * heads * -(-tokens // size) * WIDTH * 8 * (size - 1)


def gathered(program: Program) -> list[int]:
    """Bytes of every gather but that of the output."""
    return [r.bytes for r in program.report.collectives if r.kind == "all_gather" and "output" not in r.reason]


@pytest.mark.parametrize("attend", WRITTEN)
@pytest.mark.parametrize(("size", "tokens"), [(2, 7), (3, 9), (8, 5)])
def test_keys_and_values_are_gathered_and_nothing_else(attend: Attention, size: int, tokens: int) -> None:
    program = check(split(attend), *inputs(tokens), size=size)
    (record,) = program.report.attentions
    assert record.method == GATHERED
    assert record.bytes == sum(gathered(program)) == kv_bytes(tokens, size)
    assert collectives(program) == {"gather": 3}  # keys, values, the output
    reasons = [g.reason for g in program.report.implicit_gathers if g.kind == "implicit"]
    assert [r.split()[1] for r in reasons] == ["keys", "values"]
    sdpa = attend not in (soft_cap, sink)
    for text in reasons:
        assert "of the attention that is written out are needed whole" in text
        assert ('attn_implementation="sdpa"' in text) is sdpa


@pytest.mark.parametrize("attend", [matmul, keys_first, einsum])
def test_the_backward_pass_scatters_the_gradients_of_keys_and_values(attend: Attention) -> None:
    program = partition(split(attend), *inputs(7), size=3, training=True, prepare=_with_gradients)
    (record,) = program.report.attentions
    scattered = [b.bytes for b in program.report.backward if b.kind == "reduce_scatter"]
    assert len(scattered) == 2
    assert sum(scattered) == kv_bytes(7, 3)
    assert record.detail.startswith(f"2 messages and {sum(scattered)} bytes in 2 backward, ")


def _with_gradients(gm: torch.fx.GraphModule) -> None:
    for node in gm.graph.find_nodes(op="placeholder"):
        node.meta["val"].requires_grad_()


def test_what_scaled_dot_product_attention_would_send_is_said() -> None:
    (record,) = partition(split(matmul), *inputs(64), size=4).report.attentions
    ((name, why),) = record.rejected
    exchanged = 4 * BATCH * HEADS * 16 * WIDTH * 8 * 3 // 4
    assert name == "scaled_dot_product_attention"
    assert why.startswith(f"would be ulysses: sends {exchanged} bytes per rank in 2 messages")
    # The same where heads and batch are one dimension.
    (record,) = partition(split(alibi), *inputs(64), size=4).report.attentions
    assert record.rejected == ((name, why),)
    (record,) = partition(split(soft_cap), *inputs(64), size=4).report.attentions
    assert record.rejected == ((name, "it has no tanh between scores and result"),)
    (line,) = attention_lines([record])
    assert line.startswith("1 x gather_kv (written out) in a function: ")


@pytest.mark.parametrize("tokens", [(3, 40), (40, 3), (13, 14)])
@pytest.mark.parametrize("attend", [matmul, keys_first, einsum])
def test_other_lengths_of_queries_and_keys(attend: Attention, tokens: tuple[int, int]) -> None:
    """Few split queries beside many keys: gathering the queries would be cheaper, and the scores would follow."""
    program = check(split(attend), *inputs(*tokens), size=3)
    (record,) = program.report.attentions
    assert record.method == GATHERED
    assert record.bytes == sum(gathered(program)) == kv_bytes(tokens[1], 3)


@pytest.mark.parametrize("repeat", ["expand", "interleave"])
def test_heads_are_repeated_after_they_are_gathered(repeat: str) -> None:
    def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def spread(x: Tensor) -> Tensor:
            if repeat == "interleave":
                return x.repeat_interleave(HEADS // 2, dim=1)
            b, h, s, d = x.shape
            return x[:, :, None].expand(b, h, HEADS // h, s, d).reshape(b, HEADS, s, d)

        return matmul(q, spread(k), spread(v))

    program = check(split(grouped), *inputs(7, kv_heads=2), size=3)
    (record,) = program.report.attentions
    assert record.bytes == sum(gathered(program)) == kv_bytes(7, 3, heads=2)
    assert "would be gather_kv" in record.rejected[0][1]


def test_keys_that_are_an_output_are_gathered_once() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (torch.nn.functional.linear(shard(x, 2), w) for x in (q, k, v))
        return matmul(q, k, v), k, v

    program = check(function, *inputs(7), size=2)
    assert collectives(program) == {"gather": 3}
    assert not [g for g in program.report.implicit_gathers if g.kind == "implicit"]


def test_whole_keys_are_local() -> None:
    program = check(split(matmul, keys=False), *inputs(7, 5), size=3)
    (record,) = program.report.attentions
    assert (record.method, record.bytes) == (LOCAL, 0)
    assert collectives(program) == {"gather": 1}


def test_whole_queries_are_split_as_the_keys_are() -> None:
    program = check(split(matmul, queries=False), *inputs(7), size=3)
    (record,) = program.report.attentions
    assert record.method == GATHERED
    assert record.bytes == sum(gathered(program)) == kv_bytes(7, 3)


def test_scores_of_a_few_whole_queries_are_gathered_if_they_are_less() -> None:
    """A query or two that pool all tokens: their scores are less than keys and values."""
    program = check(split(matmul, queries=False), *inputs(2, 40), size=3)
    (record,) = program.report.attentions
    assert record.method == SCORES
    assert sum(gathered(program)) == BATCH * HEADS * 2 * -(-40 // 3) * 8 * 2 < kv_bytes(40, 3)
    # Many whole queries are split, and keys and values gathered.
    program = check(split(matmul, queries=False), *inputs(20, 19), size=3)
    assert sum(gathered(program)) == kv_bytes(19, 3)


def test_queries_in_chunks_gather_keys_and_values_once() -> None:
    def chunked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([matmul(part, k, v) for part in q.split(5, dim=2)], dim=2)

    program = check(split(chunked), *inputs(23), size=3)
    records = program.report.attentions
    assert [r.method for r in records] == [GATHERED] * 5
    # The queries are whole for a moment, since a chunk is a slice of tokens; the first chunk gathers the keys for all.
    assert sum(r.bytes for r in records) == records[0].bytes == kv_bytes(23, 3)
    assert sum(gathered(program)) == kv_bytes(23, 3) * 3 // 2


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q @ (k.mT @ v / k.shape[-2])


def linear_transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhde,bhnd->bhne", torch.einsum("bhnd,bhne->bhde", k, v), q)


@pytest.mark.parametrize("attend", [linear, linear_transposed])
@pytest.mark.parametrize(("size", "tokens"), [(2, 7), (3, 8), (8, 5)])
def test_linear_attention_sums_keys_and_values(attend: Attention, size: int, tokens: int) -> None:
    program = check(split(attend), *inputs(tokens), size=size)
    (record,) = program.report.attentions
    sums = -(-BATCH * HEADS * WIDTH * WIDTH * 8 * 2 * (size - 1) // size)
    assert (record.method, record.bytes) == (LINEAR, sums)
    assert collectives(program) == {"all_reduce": 1, "gather": 1}
    assert not [g for g in program.report.implicit_gathers if g.kind == "implicit"]


def test_linear_attention_counts_its_normalizer() -> None:
    def normalized(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = q + 1, k + 1
        return q @ (k.mT @ v) / (q * k.sum(dim=-2, keepdim=True)).sum(-1, keepdim=True)

    program = check(split(normalized), *inputs(7), size=2, tolerance=1e-8)
    (record,) = program.report.attentions
    assert record.method == LINEAR
    assert record.bytes == BATCH * HEADS * (WIDTH * WIDTH + WIDTH) * 8
    assert record.detail.startswith("2 messages, ")


def test_a_router_is_no_attention() -> None:
    """Experts are parameters, and the softmax is over them: nothing of the tokens is needed whole."""

    def function(x: Tensor, gate: Tensor, experts: Tensor) -> Tensor:
        return (shard(x) @ gate).softmax(-1) @ experts

    def prepare(gm: torch.fx.GraphModule) -> None:
        for node in list(gm.graph.nodes)[1:3]:
            mark(node, is_parameter=True)

    program = partition(function, torch.randn(2, 7, 4), torch.randn(4, 3), torch.randn(3, 4), prepare=prepare)
    assert not program.report.attentions


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4).unbind()
        return matmul(q, k, v).transpose(1, 2).flatten(2)


def test_the_report_says_where_it_is() -> None:
    plan = {"": {"x": fxsp.SequenceParallelInput(1)}}
    with torch.no_grad():
        report = fxsp.explain(Layer(), torch.randn(2, 7, 16), world_size=2, plan=plan)
    (record,) = report.attentions
    assert record.module == "Layer"
    assert record.source.startswith("test_unfused.py:")
    for gathered in report.implicit_gathers:
        assert f"of the attention that is written out at {record.source} are needed whole: use" in gathered.reason
    assert "1 x gather_kv (written out) in Layer (test_unfused.py:" in str(report)
    assert "what would remove it: scaled_dot_product_attention" in report.explain(report.collectives[0].value)
    assert "attention: gather_kv (written out) (test_unfused.py:" in report.explain("Layer")


def test_strict_names_the_attention_and_the_remedy() -> None:
    with pytest.raises(StrictError, match="keys of the attention that is written out are needed whole") as caught:
        partition(split(matmul), *inputs(7), strict=True)
    assert 'is an error: use scaled_dot_product_attention (attn_implementation="sdpa"' in str(caught.value)
    # Queries alone are split: nothing is gathered, and nothing refused.
    partition(lambda *x: gather(split(matmul, keys=False)(*x)), *inputs(7), strict=True)


@pytest.mark.parametrize("attend", [matmul, alibi, linear])
def test_lengths_may_be_symbols(attend: Attention) -> None:
    gm = trace(split(attend), *inputs(7), symbolic=True)
    program = partition_program(Program(gm, Ranks(0, 3, "simulated")), Runner())
    (record,) = program.report.attentions
    assert record.method == (LINEAR if attend is linear else GATHERED)
    if attend is not linear:
        mode = fake_mode_of(next(iter(gm.graph.nodes)).meta["val"])
        assert hint(record.bytes, size_hints(mode)) == kv_bytes(7, 3)
