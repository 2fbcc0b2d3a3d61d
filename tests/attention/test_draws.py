"""Dropout that draws by position: every rank for its own elements, no mask twice, the same with any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxsp
from distributed import Pool
from fxsp.config import Options
from fxsp.errors import OptionError, UnsupportedError
from fxsp.kernels.draws import kept
from fxsp.simulation.machine import simulate
from lockstep import gradients
from replicated import check_replicated
from tracing import check, partition, shard

P = 0.25


def _within(share: float, count: int, p: float = P) -> bool:
    """Whether so many draws may well have kept this share: five standard deviations."""
    return abs(share - (1 - p)) < 5 * (p * (1 - p) / count) ** 0.5


def test_elements_stay_as_if_by_chance() -> None:
    seed = torch.tensor([123456789123456789])
    places = [torch.arange(3).view(3, 1, 1), torch.arange(64).view(64, 1), torch.arange(257)]
    keep = kept(seed, places, P)
    assert keep.shape == (3, 64, 257)
    assert _within(keep.double().mean().item(), keep.numel())
    for dims in ((0, 1), (0, 2), (1, 2)):
        assert all(_within(float(x), keep.numel() // x_count) for x_count, x in
                   ((keep.double().mean(dims).numel(), x) for x in keep.double().mean(dims)))  # fmt: skip
    # No two rows agree more often than chance lets them, nor are they shifts of each other.
    flat = keep.flatten(0, 1).double() - (1 - P)
    spread = P * (1 - P) / 257**0.5
    for shift in range(3):
        other = flat.roll(shift, 1) @ flat.T / 257
        assert (other - other.diag().diag()).abs().max() < 7 * spread
    # Another seed keeps others; the same seed the same.
    assert torch.equal(keep, kept(seed, places, P))
    again = kept(seed + 1, places, P).double() - (1 - P)
    assert (again * flat.view(again.shape)).mean().abs() < 6 * P * (1 - P) / keep.numel() ** 0.5
    assert not kept(seed, places, 1.0).any()
    assert kept(seed, places, 0.0).all()


def _attention(causal: bool = False, mask: bool = False) -> Callable[..., Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (torch.sin(shard(x, 2)) for x in (q, k, v))
        allowed = torch.ones(1, 1, 1, k.shape[2], dtype=torch.bool) if mask else None
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, allowed, dropout_p=P, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
        )

    return function


def _probabilities(heads: int, tokens: int) -> list[Tensor]:
    """Queries that see all keys alike, and values that show what became of each probability."""
    zeros = torch.zeros(1, heads, tokens, 4, dtype=torch.float64)
    eye = torch.asin(torch.eye(tokens, dtype=torch.float64))
    return [zeros, zeros.clone(), eye.expand(1, heads, tokens, tokens).clone()]


def _ring(size: int, ulysses: int) -> dict[str, int]:
    """Options that ask for a ring, or nothing (0: as it comes)."""
    return {"ulysses_degree": ulysses, "ring_degree": size // ulysses} if ulysses else {}


def _masks(size: int, heads: int, tokens: int, causal: bool = False, ulysses: int = 0) -> tuple[Tensor, Any]:
    options = _ring(size, ulysses)
    program = partition(_attention(causal), *_probabilities(heads, tokens), size=size, rng="per_rank", **options)
    torch.manual_seed(7)
    (out,) = check_replicated(simulate(program.gm, size, _probabilities(heads, tokens)))
    return out, program


@pytest.mark.parametrize(("size", "heads"), [(2, 4), (3, 6), (8, 8), (3, 4), (8, 3)])
def test_no_rank_repeats_a_mask(size: int, heads: int) -> None:
    """By heads (Ulysses) and by rows (gathered keys): all heads and rows of the whole attention draw apart."""
    tokens = 48
    out, program = _masks(size, heads, tokens)
    (record,) = program.report.attentions
    assert record.method == ("ulysses" if heads % size == 0 else "gather_kv")
    assert "draws by position" in program.report.notes[0]
    keep = out > 0
    torch.testing.assert_close(out, keep.double() / (tokens * (1 - P)))
    assert _within(keep.double().mean().item(), keep.numel())
    rows = keep.reshape(-1, tokens)
    assert len(set(map(tuple, rows.tolist()))) == heads * tokens
    centered = rows.double() - (1 - P)
    other = centered @ centered.T / tokens
    assert (other - other.diag().diag()).abs().max() < 7 * P * (1 - P) / tokens**0.5


def test_the_draw_is_the_same_for_all_ranks_and_methods() -> None:
    assert len({tuple((_masks(size, 6, 12)[0] > 0).flatten().tolist()) for size in (2, 3, 4)}) == 1
    (a, _), (b, _) = _masks(2, 4, 7, causal=True), _masks(3, 4, 7, causal=True)
    torch.testing.assert_close(a, b)
    assert not a.triu(1).any()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("size", "ulysses"), [(2, 1), (3, 1), (8, 1), (4, 2)])
def test_a_ring_draws_the_same(size: int, ulysses: int, causal: bool) -> None:
    """As heads that are exchanged, and gathered keys: for any number of ranks, and fewer tokens than ranks."""
    for tokens in (7, 12, 2):
        found, program = _masks(size, 4, tokens, causal, ulysses)
        assert program.report.attentions[0].method == ("ring" if ulysses == 1 else "hybrid")
        wanted, other = _masks(2, 4, tokens, causal)
        assert other.report.attentions[0].method == "ulysses"
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("size", "heads", "kv", "ulysses"),
    [(2, 4, 4, 0), (2, 4, 2, 0), (3, 4, 4, 0), (3, 4, 2, 1), (4, 4, 4, 1), (4, 4, 2, 2), (8, 4, 4, 1)],
)
@pytest.mark.parametrize("kind", ["plain", "causal", "mask"])
def test_gradients_go_through_the_same_draw(kind: str, size: int, heads: int, kv: int, ulysses: int) -> None:
    """What is dropped is read off the values; then it is a mask that autograd knows."""
    tokens = 7
    function = _attention(kind == "causal", kind == "mask")
    keep = _masks(size, heads, tokens, ulysses=ulysses)[0] > 0
    inputs = [torch.randn(1, n, tokens, 4, dtype=torch.float64).requires_grad_() for n in (heads, kv, kv)]
    program = partition(function, *inputs, size=size, rng="per_rank", training=True, **_ring(size, ulysses))
    given = torch.randn(1, heads, tokens, 4, dtype=torch.float64)
    torch.manual_seed(7)
    outputs, grads = gradients(program.gm, size, inputs, [given], poison_pads=True)
    (found,) = check_replicated(outputs)
    q, k, v = (torch.sin(x) for x in inputs)
    k, v = (x.repeat_interleave(heads // kv, 1) for x in (k, v))
    scores = q @ k.mT / 2
    if kind == "causal":
        scores = scores.masked_fill(~torch.ones(tokens, tokens, dtype=torch.bool).tril(), -torch.inf)
    wanted = (scores.softmax(-1) * keep / (1 - P)) @ v
    torch.testing.assert_close(found, wanted)
    expected = torch.autograd.grad(wanted, inputs, given)
    for a, b in zip(check_replicated(grads), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("text", [-1, 3])
@pytest.mark.parametrize(("size", "tokens"), [(2, 8), (3, 7), (8, 5)])
def test_dropout_of_rows(size: int, tokens: int, text: int) -> None:
    """Of text that is whole on every rank all ranks drop the same."""

    def function(x: Tensor) -> Tensor:
        return torch.dropout(torch.cos(shard(x, 1, text)), P, True)

    x = torch.zeros(2, tokens, 96, dtype=torch.float64, requires_grad=True)
    program = partition(function, x, size=size, rng="per_rank", training=True)
    assert "draws by position" in program.report.notes[0]
    seen = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs, grads = gradients(program.gm, size, [x], [torch.ones_like(x)], poison_pads=True)
        (out,) = check_replicated(outputs)
        check_replicated(grads)
        seen.append(out > 0)
        torch.testing.assert_close(out, (out > 0).double() / (1 - P))
    assert _within(seen[0].double().mean().item(), x.numel())
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    rows = seen[0].flatten(0, 1).tolist()
    assert len(set(map(tuple, rows))) == len(rows)


def test_gradient_of_dropout_drops_the_same() -> None:
    def function(x: Tensor) -> Tensor:
        y = torch.dropout(torch.cos(shard(x, 1)), P, True)
        return y * y

    x = torch.randn(1, 7, 5, dtype=torch.float64, requires_grad=True)
    program = partition(function, x, size=3, rng="per_rank", training=True)
    outputs, grads = gradients(program.gm, 3, [x], [torch.ones_like(x)])
    (out,), (grad,) = check_replicated(outputs), check_replicated(grads)
    kept_ = out > 0
    wanted = 2 * torch.cos(x) * -torch.sin(x) * kept_ / (1 - P) ** 2
    torch.testing.assert_close(grad, wanted.detach())


def test_without_the_option_it_is_an_error_that_says_so() -> None:
    with pytest.raises(UnsupportedError, match=r"dropout_p=0.25.*model.eval\(\).*\"rng\": \"per_rank\""):
        partition(_attention(), *_probabilities(2, 4))
    with pytest.raises(OptionError, match="'global', 'per_rank'"):
        Options.parse({"rng": "per-rank"})
    check(lambda x: torch.dropout(shard(x), 0.0, True), torch.randn(1, 5, 2, dtype=torch.float64))


class Model(nn.Module):
    _sp_plan: ClassVar[dict[str, Any]] = {"": {"x": fxsp.SequenceParallelInput(1)}}

    def __init__(self, saved: bool) -> None:
        super().__init__()
        self.value, self.saved = nn.Linear(5, 20, bias=False), saved

    def attend(self, x: Tensor) -> Tensor:
        v = self.value(x).unflatten(-1, (4, 5)).transpose(1, 2)
        q = torch.zeros_like(v)
        return torch.nn.functional.scaled_dot_product_attention(q, q, v, dropout_p=P).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.attend, x, use_reentrant=False) if self.saved else self.attend(x)


def _linear(rank: int, size: int, saved: bool, inner: str, ring: int) -> tuple[float, float]:
    """The model is linear in its weight: the gradient times the weight is the value, if both drop the same."""
    torch.manual_seed(3)
    model, x = Model(saved), torch.randn(2, 7, 5)
    fast = torch.compile(model, backend="sp", options={"inner": inner, "rng": "per_rank"} | _ring(size, ring))
    y = fast(x)
    given = torch.randn(2, 7, 20)
    (y * given).sum().backward()
    grad = model.value.weight.grad
    assert grad is not None
    assert fxsp.reports()[-1].attentions[0].method == ("ring" if ring else "ulysses")
    return float((y * given).sum() - (grad * model.value.weight).sum()), float((y * given).sum().abs())


@pytest.mark.parametrize(
    ("saved", "inner", "ring"), [(False, "aot_eager", 0), (True, "aot_eager", 0), (True, "aot_eager", 1)]
)
def test_on_real_ranks(ranks: Callable[[int], Pool], saved: bool, inner: str, ring: int) -> None:
    found = ranks(2).run(_linear, saved, inner, ring)
    assert found[0] == found[1]
    assert abs(found[0][0]) < 1e-5 * max(1.0, found[0][1])
