"""Operators of users with a rule in the notation that rules print: split where it allows, found out where wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import fxsp
from fxsp.errors import OptionError
from fxsp.passes.rules.register import REGISTERED
from fxsp.passes.rules.table import RULES
from running import error_of

PLAN = {"": {"x": fxsp.SequenceParallelInput(split_dim=1)}}
LINEAR = "[*d, i], [o, i], [1], [o] -> [*d, o] | [*d, i], [o, i], [1] -> [*d, o]"


@torch.library.custom_op("fxsp_test::scaled_linear", mutates_args=())
def scaled_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear of int8 weights ``[o, i]`` with one scale for all, as quantization libraries have it."""
    y = x @ (weight.to(x.dtype) * scale).T
    return y if bias is None else y + bias


@scaled_linear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.has_bias = inputs[3] is not None


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, scale = ctx.saved_tensors
    whole = weight.to(x.dtype)
    rows = grad.flatten(0, -2)
    of_scale = ((rows.T @ x.flatten(0, -2)) * whole).sum().reshape(1)
    return grad @ (whole * scale), None, of_scale, rows.sum(0) if ctx.has_bias else None


scaled_linear.register_autograd(_gradients, setup_context=_keep)
fxsp.register_op(scaled_linear, rule=LINEAR)


@torch.library.custom_op("fxsp_test::centered", mutates_args=())
def centered(x: Tensor) -> Tensor:
    """Without the mean over tokens: no operator for shards of tokens, whatever its rule says."""
    return x - x.mean(1, keepdim=True)


@centered.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


centered.register_autograd(lambda ctx, grad: grad - grad.mean(1, keepdim=True))


class Quantized(nn.Module):
    def __init__(self, i: int, o: int, bias: bool = True) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-9, 9, (o, i), dtype=torch.int8))
        self.scale = nn.Parameter(torch.tensor([0.03]))
        self.bias = nn.Parameter(torch.randn(o)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return scaled_linear(x, self.weight, self.scale, self.bias)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = Quantized(16, 48), Quantized(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4).unbind()
        return x + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("tokens", [7, 2])
def test_values_and_gradients_on_shards(tokens: int) -> None:
    torch.manual_seed(0)
    evidence = fxsp.verify(Model(), torch.randn(2, tokens, 16), world_size=(2, 3), options={"plan": PLAN})
    assert evidence.ok, str(evidence)


def _on_processes(rank: int, size: int) -> list[float]:
    torch.manual_seed(0)
    model, x = Model(), torch.randn(2, 7, 16, requires_grad=True)
    wanted = [x, *model.parameters()]
    out = model(x)
    expected = [out, *torch.autograd.grad(out.sin().sum(), wanted)]
    fast = torch.compile(model, backend="sp", options={"plan": PLAN, "inner": "aot_eager", "strict": True})(x)
    found = [fast, *torch.autograd.grad(fast.sin().sum(), wanted)]
    return [error_of(a, b) for a, b in zip(found, expected, strict=True)]


def test_on_processes(ranks) -> None:
    for errors in ranks(2).run(_on_processes):
        assert max(errors) <= 1e-5, errors


def test_the_report_splits_it() -> None:
    report = fxsp.explain(Model(), torch.randn(2, 7, 16), world_size=2, plan=PLAN)
    assert not report.implicit_gathers
    assert report.flops_total == 2 * 2 * 7 * 16 * (48 + 16) + 4 * 2 * 4 * 7 * 7 * 4
    assert report.flops_per_rank == [2 * 2 * 4 * 16 * (48 + 16) + 4 * 2 * 2 * 8 * 7 * 4] * 2  # 8 queries, a pad of them


@torch.library.custom_op("fxsp_test::packed_linear", mutates_args=())
def packed_linear(x: Tensor, packed: Tensor, scales: Tensor, features: int) -> Tensor:
    """Four bits for each weight ``[o, i]``, two in a byte of ``[o i / 2, 1]``, and a scale for each block of 64."""
    nibbles = torch.stack([packed[:, 0] & 15, packed[:, 0] >> 4], -1).to(x.dtype).reshape(-1, 64) - 8
    return x @ (nibbles * scales[:, None]).reshape(features, -1).T


@packed_linear.register_fake
def _(x: Tensor, packed: Tensor, scales: Tensor, features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], features)


fxsp.register_op(packed_linear, rule="[*d, i], [n, 1], [k] -> [*d, o]")


def test_packed_weights() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("packed", torch.randint(0, 256, (24 * 32 // 2, 1), dtype=torch.uint8))
            self.register_buffer("scales", torch.rand(24 * 32 // 64))

        def forward(self, x: Tensor) -> Tensor:
            return packed_linear(x, self.packed, self.scales, 24).relu()

    model, x = Packed(), torch.randn(2, 5, 32)
    with torch.no_grad():
        evidence = fxsp.verify(model, x, world_size=(2, 3), options={"plan": PLAN})
        report = fxsp.explain(model, x, world_size=5, plan=PLAN)
    assert evidence.ok, str(evidence)
    assert (report.flops_total, report.flops_per_rank) == (2 * 2 * 5 * 32 * 24, [2 * 2 * 32 * 24] * 5)


def test_without_a_plan_it_is_found() -> None:
    report = fxsp.explain(Model(), torch.randn(1, 4096, 16), world_size=2)
    assert [record.applied for record in report.plan] == [True]
    assert not report.implicit_gathers


def test_without_a_rule_it_runs_whole() -> None:
    report = fxsp.explain(Centered(), torch.randn(2, 7, 16), world_size=2, plan=PLAN)
    assert "runs whole on every rank" in str(report)
    assert "fxsp_test.centered.default" in str(report)


class Centered(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return centered(x.sin()) * 2


@pytest.fixture
def forgotten() -> Any:
    yield
    for table in (REGISTERED, RULES):
        table.pop(centered._opoverload, None)


def test_a_rule_that_is_wrong_is_found(forgotten: None) -> None:
    x = torch.randn(2, 7, 16)
    fxsp.register_op(centered, rule="[*d] -> [*d]")
    evidence = fxsp.verify(Centered(), x, world_size=2, options={"plan": PLAN})
    assert not evidence.ok
    assert "centered" in str(evidence)
    fxsp.register_op(centered, rule="[b, s, c] -> [b, s, c] whole={s}")
    evidence = fxsp.verify(Centered(), x, world_size=2, options={"plan": PLAN})
    assert evidence.ok, str(evidence)


MISTAKES: list[tuple[str, str]] = [
    ("[*d, i], [o, i] = [*d, o]", "is no rule"),
    ("[*d, i, [o, i] -> [*d, o]", "is no list of tensors"),
    ("[*d, i], [o, i], [1] -> [*d, o] sum={i}", "is no rule"),
    ("[*d, i], [o, i], [1] -> [*d, o] whole={k}", "are in no dimension"),
    ("[*d, i], [o, i], [1] -> [*d, o] reduction={o}", "appear in a result"),
    ("[*d, i], [o, i] -> [*d, o]", "it names 2 operands, and the operator has 3 to 4: x, weight, scale, bias"),
    ("[*d, i], [o, i], [1], [o], [o] -> [*d, o]", "it names 5 operands"),
    ("[*d, i], [o, i], [1] -> [*d, o], [o]", "it names 2 results, and the operator has 1"),
    ("[*d, i], [o, o], [1] -> [*d, o]", "a dimension twice"),
    ("[*d, i], [o, i], [1] -> [*d o]", "a dimension has one name"),
    ("[*d, *i], [o, i], [1] -> [*d, o]", "one '\\*' at most"),
    ("[*d, i], [o, i], [1] -> [*d, o] combined={i}", "combined"),
]


@pytest.mark.parametrize(("rule", "message"), MISTAKES)
def test_mistakes(rule: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        fxsp.register_op(scaled_linear, rule=rule)
    assert REGISTERED[scaled_linear._opoverload] == LINEAR


@torch.library.custom_op("fxsp_test::add_to", mutates_args=("x",))
def add_to(x: Tensor) -> None:
    x.add_(1)


def test_operators_that_cannot_be_registered() -> None:
    for op, message in [
        (torch.nn.functional.linear, "is no operator"),
        (torch.ops.aten.linear.default, "has a rule already"),
        (add_to, "writes to an argument"),
    ]:
        with pytest.raises(OptionError, match=message):
            fxsp.register_op(op, rule="[*d] -> [*d]")
