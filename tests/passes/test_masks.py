"""Masks that are computed from positions: what they are taken for is what they are, element by element."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Interpreter, Node

from fxsp import SequenceParallelInput
from fxsp.kernels.attention.banded import allowed
from fxsp.offline.partition import partition_offline
from fxsp.passes.attention.operators import BANDED
from fxsp.passes.base import Program
from fxsp.passes.graph import Call, facts
from fxsp.passes.masks.masks import SDPA, Band, Masks, band_of, terms_of
from fxsp.types import Ranks
from lockstep import gradients
from models import bert, llama
from replicated import check_replicated
from tracing import check, collectives, partition, shard, trace

S = 5


def attention(mask: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def function(x: Tensor, *given: Tensor) -> Tensor:
        x = torch.tanh(shard(x, 2))
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, mask(*given) if given else mask(x))

    return function


def inputs(*given: Tensor, heads: int = 2) -> list[Tensor]:
    return [torch.randn(2, heads, S, 4, dtype=torch.float64), *given]


def sdpa_of(function: Callable[..., Tensor], *given: Any, symbolic: bool = False) -> Call:
    gm = trace(function, *given, symbolic=symbolic)
    Masks().apply(Program(gm, Ranks(0, 2, "simulated")))
    (node,) = gm.graph.find_nodes(op="call_function", target=SDPA)
    return Call(node)


def rows(x: Tensor) -> Tensor:
    return torch.arange(x.shape[-2])


CAUSAL: dict[str, Callable[[Tensor], Tensor]] = {
    "comparison": lambda x: rows(x)[None, :] <= rows(x)[:, None],
    "the other way": lambda x: (rows(x)[:, None] >= rows(x)[None, :])[None, None].expand(2, 1, S, S),
    "less than the next": lambda x: rows(x)[None, None, None] < (rows(x) + 1).view(1, 1, -1, 1),
    "cached positions": lambda x: torch.arange(S, S + S)[None, :] <= torch.arange(S, S + S).reshape(-1, 1),
    "tril": lambda x: torch.ones(S, S, dtype=torch.bool).tril(),
    "tril of numbers": lambda x: torch.tril(torch.ones(1, 1, S, S)) != 0,
    "not triu": lambda x: ~torch.triu(torch.ones(S, S, dtype=torch.bool), diagonal=1),
    "triu of infinity": lambda x: torch.triu(torch.full((S, S), -math.inf, dtype=x.dtype), 1),
    "triu of the least number": lambda x: torch.full((S, S), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1),
    "where": lambda x: torch.where(rows(x) <= rows(x)[:, None], 0.0, -math.inf).to(x.dtype),
    "filled": lambda x: torch.zeros(S, S, dtype=x.dtype).masked_fill(torch.ones(S, S).tril() == 0, -math.inf),
    "product": lambda x: (
        torch.full((S, S), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1) * (rows(x) > rows(x).reshape(-1, 1))
    ),
    "sequences of one": lambda x: (
        (rows(x) <= rows(x)[:, None]) & (torch.diff(rows(x), prepend=rows(x)[:1] - 1).ne(1).cumsum(0)[:, None] == 0)
    ),
    "with a window that is wide": lambda x: (rows(x) <= rows(x)[:, None]) & (rows(x) > rows(x)[:, None] - S),
}


def window(x: Tensor) -> Tensor:
    return (rows(x) <= rows(x)[:, None]) & (rows(x) > rows(x)[:, None] - 2)


#: Near misses, which must stay as they are.
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "strict": lambda x: (rows(x)[None, :] < rows(x)[:, None]) | (rows(x)[:, None] == 0),
    "anticausal": lambda x: rows(x)[None, :] >= rows(x)[:, None],
    "off by one": lambda x: rows(x)[None, :] <= rows(x)[:, None] + 1,
    "strided": lambda x: 2 * rows(x)[None, :] <= rows(x)[:, None],
    "large": lambda x: torch.full((S, S), -1e4, dtype=x.dtype).triu(1),
    "soft": lambda x: torch.full((S, S), -1.0, dtype=x.dtype).triu(1),
    "biased": lambda x: torch.where(rows(x) <= rows(x)[:, None], 1.0, -math.inf).to(x.dtype),
    "reversed": lambda x: (rows(x)[None, :] <= rows(x)[:, None]).flip(1) | (rows(x)[None] == 0),
    "computed from data": lambda x: rows(x)[None, :] <= (rows(x) + x[0, 0, :, 0].abs().long())[:, None],
}


@pytest.mark.parametrize("name", CAUSAL)
def test_a_mask_that_is_causal_is_the_flag(name: str) -> None:
    call = sdpa_of(attention(CAUSAL[name]), *inputs())
    assert (call["attn_mask"], call["is_causal"]) == (None, True)
    program = check(attention(CAUSAL[name]), *inputs())
    assert program.report.attentions[0].method == "ulysses"
    # What computed the mask is gone: nothing of [S, S] is left.
    assert not [n for n in program.graph.nodes if getattr(facts(n).whole, "shape", ())[-2:] == (S, S)]
    assert collectives(program) == {"all_to_all": 2, "gather": 1}


@pytest.mark.parametrize("name", OTHERS)
def test_a_mask_that_is_nearly_causal_stays(name: str) -> None:
    call = sdpa_of(attention(OTHERS[name]), *inputs())
    assert isinstance(call["attn_mask"], Node)
    assert not call["is_causal"]
    check(attention(OTHERS[name]), *inputs(), training=False)


@pytest.mark.parametrize("heads", [2, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_windows_and_keys_are_seen(padded: bool, heads: int) -> None:
    """A mask of a window is cut by a rank's rows, or made for the block at hand."""

    def mask(p: Tensor) -> Tensor:
        close = window(torch.empty(S, 1))
        return close & p.bool()[:, None, None] if padded else close

    program = check(attention(mask), *inputs(PADDING, heads=heads))
    (record,) = program.report.attentions
    assert "a window of 2 tokens" in record.detail
    assert not [n for n in program.graph.nodes if getattr(facts(n).whole, "shape", ())[-2:] == (S, S)]


@pytest.mark.parametrize(("size", "ulysses"), [(3, 1), (4, 2)])
def test_causal_beside_padding_in_a_ring(size: int, ulysses: int) -> None:
    causal = CAUSAL["comparison"]
    function = attention(lambda p: causal(torch.empty(S, 1)) & p.bool()[:, None, None])
    for padding in (PADDING, PADDING.flip(1)):
        x = inputs(padding, heads=4)
        x[0].requires_grad_()
        options = {"ulysses_degree": ulysses, "ring_degree": size // ulysses}
        program = partition(function, *x, size=size, training=True, **options)
        assert program.report.attentions[0].method == ("ring" if ulysses == 1 else "hybrid")
        given = torch.randn(2, 4, S, 4, dtype=torch.float64)
        wanted = function(*x)
        expected = torch.autograd.grad(wanted, x[0], given)
        outputs, grads = gradients(program.gm, size, x, [given], poison_pads=True)
        torch.testing.assert_close(check_replicated(outputs)[0], wanted.detach())
        torch.testing.assert_close(check_replicated(grads)[0], expected[0])


@pytest.mark.parametrize("near", [None, 700])
def test_long_queries_are_taken_in_blocks(near: int | None) -> None:
    """Each block beside the keys that it may see; values and gradients are those of one mask."""
    n = 2100
    q, k, v = (torch.randn(1, 1, n, 4, dtype=torch.float64, requires_grad=True) for _ in "qkv")
    keys = torch.rand(1, 1, 1, n) > 0.2
    mask = allowed(torch.arange(n), torch.arange(n), True, near, keys)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
    found = torch.ops.fxsp_local.banded_attention(q, k, v, keys, True, near, None, False)
    torch.testing.assert_close(found, wanted)
    given = torch.randn_like(found)
    pairs = (torch.autograd.grad(y, (q, k, v), given) for y in (found, wanted))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b)


def test_symbolic_lengths() -> None:
    """The proof needs no numbers."""
    call = sdpa_of(attention(CAUSAL["comparison"]), *inputs(), symbolic=True)
    assert (call["attn_mask"], call["is_causal"]) == (None, True)
    gm = trace(attention(window), *inputs(), symbolic=True)
    Masks().apply(Program(gm, Ranks(0, 2, "simulated")))
    (node,) = gm.graph.find_nodes(op="call_function", target=BANDED)
    assert Call(node)["window"] == 1


PADDING = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
KEYS: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": lambda p: p.bool()[:, None, None, :].expand(2, 1, S, S),
    "looked up": lambda p: p.bool()[torch.arange(2)[:, None, None, None], torch.arange(S)[None, None, None]].expand(
        2, 1, S, S
    ),
    "beside what always holds": lambda p: p.bool()[:, None, None] & (torch.arange(S).view(1, 1, S, 1) >= 0),
    "inverted": lambda p: ~(~p.bool())[:, None, None].expand(-1, 1, S, -1),
    "additive": lambda p: ((1 - p.double()) * torch.finfo(torch.double).min)[:, None, None].expand(2, 1, S, S),
}


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("heads", [2, 3])
def test_a_mask_of_keys_has_one_row(name: str, heads: int) -> None:
    call = sdpa_of(attention(KEYS[name]), *inputs(PADDING))
    assert tuple(call.shape("attn_mask")) == (2, 1, 1, S)
    check(attention(KEYS[name]), *inputs(PADDING, heads=heads))


def test_a_mask_that_allows_everything_is_none() -> None:
    call = sdpa_of(attention(lambda x: torch.ones(S, S, dtype=torch.bool)), *inputs())
    assert call["attn_mask"] is None
    assert not call["is_causal"]


@pytest.mark.parametrize("size", [2, 3])
def test_causal_beside_padding_is_right(size: int) -> None:
    causal = CAUSAL["comparison"]
    for padding in (PADDING, PADDING.flip(1)):
        for heads in (size, 4):
            function = attention(lambda p: causal(torch.empty(S, 1)) & p.bool()[:, None, None])
            program = check(function, *inputs(padding, heads=heads), size=size)
            (record,) = program.report.attentions
            assert "causal, one row of allowed keys" in record.detail
            assert record.method == ("gather_kv" if heads % size else "ulysses")
            (call,) = (Call(n) for n in program.whole.graph.nodes if n.target is BANDED)
            assert tuple(call.shape("attn_mask")) == (2, 1, 1, S)


# Proofs against values.

terms = st.recursive(
    st.tuples(st.sampled_from(["le", "lt", "ge", "gt", "eq", "ne"]), st.integers(-6, 6)),
    lambda x: st.one_of(st.tuples(st.just("not"), x), st.tuples(st.sampled_from(["and", "or", "mul", "where"]), x, x)),
    max_leaves=4,
)


def evaluated(term: Any, rows: Tensor, columns: Tensor) -> Tensor:
    name, *rest = term
    if name in ("le", "lt", "ge", "gt", "eq", "ne"):
        return getattr(torch, name)(columns, rows + rest[0])
    parts = [evaluated(x, rows, columns) for x in rest]
    if name == "not":
        return ~parts[0]
    if name == "where":
        return torch.where(parts[0], parts[1], False)
    return {"and": torch.logical_and, "or": torch.logical_or, "mul": torch.mul}[name](*parts)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(terms, st.integers(1, 4), st.integers(1, 4), st.sampled_from(["bool", "infinity", "least"]))
def test_whatever_is_proven_is_true(term: Any, m: int, n: int, kind: str) -> None:
    """Each term against the values of its node, and each band against the mask."""

    def mask(x: Tensor) -> Tensor:
        allowed = evaluated(term, torch.arange(m)[:, None], torch.arange(n)[None, :])
        if kind == "bool":
            return allowed
        fill = -math.inf if kind == "infinity" else torch.finfo(x.dtype).min
        return torch.zeros(m, n, dtype=x.dtype).masked_fill(~allowed, fill)

    gm = trace(mask, torch.empty(1))
    found = terms_of(gm.graph)
    (out,) = gm.graph.find_nodes(op="output")
    result = out.args[0]
    value = Interpreter(gm).run(torch.empty(1))
    band = band_of(result, found, m, n)
    if band is None:
        return
    difference = torch.arange(m)[:, None] - torch.arange(n)[None, :]
    allowed = torch.ones(m, n, dtype=torch.bool)
    if band.low is not None:
        allowed &= difference >= int(band.low)
    if band.high is not None:
        allowed &= difference <= int(band.high)
    assert torch.equal(allowed, value if kind == "bool" else value == 0)


def test_windows_are_bands() -> None:
    gm = trace(window, torch.empty(S, 1))
    (out,) = gm.graph.find_nodes(op="output")
    assert band_of(out.args[0], terms_of(gm.graph), S, S) == Band(0, 1)


# Models.


@pytest.mark.parametrize("mask", [False, True])
def test_transformers(mask: bool) -> None:
    plan = {"": {"input_ids": SequenceParallelInput(1)}}
    for builder, wanted in ((llama, None if not mask else 1), (bert, None if not mask else 1)):
        model, given = builder(batch=2, mask=mask)
        with torch.no_grad():
            (result,) = partition_offline(model, (), given, world_size=2, options={"plan": plan})
        assert result.program is not None
        attentions = [n for n in result.program.whole.graph.nodes if n.target in (SDPA, BANDED)]
        assert attentions
        for node in attentions:
            call = Call(node)
            found = None if call["attn_mask"] is None else call.shape("attn_mask")[-2]
            assert found == wanted
            assert bool(call["is_causal"]) == (builder is llama)


def test_the_pass_is_a_stage() -> None:
    program = partition(attention(CAUSAL["tril"]), *inputs())
    assert "masks" in program.report.timings
