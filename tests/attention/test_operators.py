"""Attentions that are operators of their own: split as SDPA is, by what they were registered with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import attending
import fxsp
from distributed import Pool
from fxsp.errors import OptionError
from fxsp.passes.attention.operators import ATTENTION_OPS
from running import collectives as counted
from running import error_of
from simulated import Simulated, by_plan
from tracing import check, collectives, shard


def _bshd(heads: int, kv: int, tokens: int) -> list[Tensor]:
    return [torch.randn(2, tokens, n, 4, dtype=torch.float64) for n in (heads, kv, kv)]


def _bhsd(heads: int, kv: int, tokens: int) -> list[Tensor]:
    return [x.transpose(1, 2).contiguous() for x in _bshd(heads, kv, tokens)]


def _call(causal: bool = False, window: int = -1) -> Callable[..., Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (torch.softmax(shard(x, 1), -1) for x in (q, k, v))
        return torch.ops.fxsp_test.attend(q, k, v, 0.7, causal, window)[0] * 2

    return function


@pytest.mark.parametrize(("causal", "window"), [(False, -1), (True, -1), (True, 2)])
@pytest.mark.parametrize(("size", "heads", "kv", "tokens"), [(2, 4, 4, 7), (2, 4, 2, 1), (3, 6, 3, 8), (8, 16, 8, 13)])
def test_heads_are_exchanged(size: int, heads: int, kv: int, tokens: int, causal: bool, window: int) -> None:
    """Values and gradients, in two all-to-alls; a window counts tokens, and each rank has all of them."""
    program = check(_call(causal, window), *_bshd(heads, kv, tokens), size=size, training=size < 8)
    (record,) = program.report.attentions
    if record.method == "gather_kv":
        assert heads != kv
        assert not causal
        return
    assert record.method == "ulysses"
    assert collectives(program) == {"all_to_all": 2, "gather": 1}
    assert not [g for g in program.report.implicit_gathers if g.kind == "implicit"]


@pytest.mark.parametrize(("size", "heads", "kv", "tokens"), [(2, 3, 3, 5), (3, 4, 1, 7), (8, 6, 2, 5)])
def test_keys_are_gathered_where_heads_do_not_divide(size: int, heads: int, kv: int, tokens: int) -> None:
    program = check(_call(), *_bshd(heads, kv, tokens), size=size, training=size < 8)
    (record,) = program.report.attentions
    assert record.method == "gather_kv"
    rejected = dict(record.rejected)
    assert "do not merge" in rejected["ring"]


def test_key_heads_are_repeated_so_that_they_divide() -> None:
    program = check(_call(causal=True), *_bshd(8, 2, 9), size=4)
    assert program.report.attentions[0].method == "ulysses"
    assert collectives(program) == {"all_to_all": 2, "gather": 1}


def test_whole_keys_need_nothing() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.fxsp_test.attend(torch.tanh(shard(q, 1)), k, v, 0.7, False)[0]

    q, *_ = _bshd(3, 3, 7)
    _, k, v = _bshd(3, 3, 5)
    program = check(function, q, k, v, size=3)
    assert program.report.attentions[0].method == "local"
    assert collectives(program) == {"gather": 1}


WHOLE: dict[str, tuple[Callable[..., Any], Callable[..., list[Tensor]], int, str]] = {
    "a window where heads do not divide": (_call(window=1), _bshd, 3, "window of"),
    "causal without a mask": (_call(causal=True), _bshd, 3, "takes no mask"),
    "its log-sum-exp is used": (
        lambda *x: torch.ops.fxsp_test.attend(*(torch.softmax(shard(y, 1), -1) for y in x), 0.7, False),
        _bshd, 4, "result 1 is used",
    ),
    "a number that nothing is known of": (
        lambda *x: torch.ops.fxsp_test.attend_heads(*(torch.softmax(shard(y, 2), -1) for y in x), x[0].shape[1]),
        _bhsd, 4, "heads=4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_what_cannot_be_split_is_whole_and_reported(name: str) -> None:
    function, inputs, heads, why = WHOLE[name]
    program = check(function, *inputs(heads, heads, 5), size=2, training="number" not in name and "log" not in name)
    assert not program.report.attentions
    assert any(why in g.reason for g in program.report.implicit_gathers), program.report.implicit_gathers


@pytest.mark.parametrize("bias", ["none", "bool", "rows", "per_head"])
@pytest.mark.parametrize(("size", "heads", "kv"), [(2, 4, 4), (3, 4, 2), (8, 8, 8)])
def test_inference_only_with_a_mask(size: int, heads: int, kv: int, bias: str) -> None:
    given = {
        "none": [],
        "bool": [torch.rand(2, 1, 1, 7) > 0.3],
        "rows": [torch.randn(7, 7, dtype=torch.float64)],
        "per_head": [torch.randn(1, heads, 7, 7, dtype=torch.float64)],
    }[bias]
    for x in given:
        if x.dtype == torch.bool:
            x[..., 0] = True

    def function(q: Tensor, k: Tensor, v: Tensor, *mask: Tensor) -> Tensor:
        q, k, v = (torch.softmax(shard(x, 2), -1) for x in (q, k, v))
        return torch.ops.fxsp_test.attend_forward(q, k, v, mask[0] if mask else None, 5.0)

    program = check(function, *_bhsd(heads, kv, 7), *given, size=size, training=False)
    assert program.report.attentions[0].method == ("gather_kv" if heads % size else "ulysses")


def test_an_entry_for_each_head() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        q, k, v = (torch.softmax(shard(x, 2), -1) for x in (q, k, v))
        return torch.ops.fxsp_test.attend_slopes(q, k, v, slopes, True)

    slopes = torch.tensor([0.5, 0.25, 2.0, 1.0], dtype=torch.float64)
    program = check(function, *_bhsd(4, 4, 7), slopes, size=2, training=False)
    assert program.report.attentions[0].method == "ulysses"
    program = check(function, *_bhsd(3, 3, 7), slopes[:3].contiguous(), size=2, training=False)
    assert any("slopes of" in g.reason for g in program.report.implicit_gathers)


def test_a_split_batch_is_local() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (torch.softmax(shard(x, 0), -1) for x in (q, k, v))
        return torch.ops.fxsp_test.attend_forward(q, k, v, None, 5.0)

    program = check(function, *[torch.randn(5, 3, 4, 2, dtype=torch.float64) for _ in range(3)], training=False)
    assert collectives(program) == {"gather": 1}
    assert not [g for g in program.report.implicit_gathers if g.kind == "implicit"]


# Through Dynamo.


class Block(nn.Module):
    def __init__(self, heads: int, kv: int) -> None:
        super().__init__()
        self.kv = kv
        self.qkv, self.out = nn.Linear(24, (heads + 2 * kv) * 4), nn.Linear(heads * 4, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (-1, 4)).tensor_split((-2 * self.kv, -self.kv), 2)
        y, _ = attending.attend(q.contiguous(), k.contiguous(), v.contiguous(), 0.5, True)
        return x + self.out(y.flatten(2))


class Model(nn.Module):
    _sp_plan: ClassVar[dict[str, Any]] = {"": {"x": fxsp.SequenceParallelInput(1)}}

    def __init__(self, heads: int = 6, kv: int = 6) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(heads, kv) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def _grads(function: Any, model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    model.zero_grad()
    y = function(x)
    y.square().mean().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]  # type: ignore[list-item,union-attr]


@pytest.mark.parametrize(("size", "kv"), [(2, 6), (3, 3)])
def test_through_dynamo_on_simulated_ranks(size: int, kv: int) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    model, x = Model(6, kv).double(), torch.randn(2, 11, 24, dtype=torch.float64)
    backend = Simulated(size, by_plan({}))
    for a, b in zip(_grads(torch.compile(model, backend=backend), model, x), _grads(model, model, x), strict=True):
        assert error_of(a, b) < 1e-9
    (program,) = backend.programs
    assert program is not None
    assert [r.method for r in program.report.attentions] == ["ulysses"] * 2


def _processes(rank: int, size: int) -> tuple[list[float], dict[str, int], int]:
    import attending  # noqa: F401  (registers the operators in this process)

    torch.manual_seed(0)
    model, x = Model(4, 2), torch.randn(2, 7, 24)
    fast = torch.compile(model, backend="sp", options={"inner": "aot_eager"})
    wanted, found = _grads(model, model, x), _grads(fast, model, x)
    with torch.no_grad():
        fast(x)
        with counted() as ran:
            error = error_of(fast(x), wanted[0])
    return [error, *(error_of(a, b) for a, b in zip(found, wanted, strict=True))], dict(ran), len(fxsp.reports())


def test_on_real_ranks(ranks: Callable[[int], Pool]) -> None:
    for errors, ran, _ in ranks(2).run(_processes):
        assert max(errors) < 1e-5
        assert ran["all_to_all"] == 4  # two for each of two blocks


# What is refused at once.

MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"query": "quary"}, "has no argument 'quary'"),
    ({"scale": "soft_max_scale"}, 'Did you mean "softmax_scale"'),
    ({"mask": "causal"}, "is no tensor"),
    ({"layout": "SBHD"}, "it must be 'BHSD' or 'BSHD'"),
    ({"output": 2}, "result 2 is no tensor"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes(arguments: dict[str, Any], message: str) -> None:
    before = dict(ATTENTION_OPS)
    with pytest.raises(OptionError, match=message):
        fxsp.register_attention(attending.attend, **arguments)
    with pytest.raises(OptionError, match="is no operator"):
        fxsp.register_attention(torch.nn.functional.scaled_dot_product_attention)
    assert before == ATTENTION_OPS
