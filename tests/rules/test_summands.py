"""Summands pass through what is linear in them: fewer or smaller all-reduces, values and gradients of one device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import fxsp.kernels.ops  # noqa: F401  (defines fxsp::annotate)
from fxsp.passes.base import Program
from fxsp.passes.pipeline import partition_program
from fxsp.simulation.machine import simulate
from fxsp.types import Ranks
from lockstep import gradients
from replicated import check_replicated


def split(x: Tensor) -> Tensor:
    return torch.ops.fxsp.annotate(x, "shard", 1, -1, "test")


def both(x: Tensor) -> Tensor:
    return split(x).mean() + 0.5 * (split(x) * x).sum()


def through_views(x: Tensor) -> Tensor:
    return torch.stack([-split(x).sum(1).unsqueeze(0), split(x).square().mean(1).reshape(1, 2, 3) / 3])


def thrice(x: Tensor) -> Tensor:
    return split(x).sum(1) - (split(x).exp().sum(1) - split(x).square().sum(1))


def smaller(x: Tensor) -> Tensor:
    return split(x).sum(1).sum()


def joined(x: Tensor) -> Tensor:
    return torch.cat([split(x).sum(1), split(x).mean(1)], 1)


def a_number_is_added(x: Tensor) -> Tensor:
    return (split(x).sum(1) + 1) + split(x).mean(1)


def used_twice(x: Tensor) -> Tensor:
    total = split(x).sum(1)
    return total.exp() + (total + split(x).mean(1))


def a_whole_value_is_added(x: Tensor) -> Tensor:
    return split(x).sum(1) + x[:, 0]


def alone(x: Tensor) -> Tensor:
    return 2 * split(x).sum(1)


def program_of(function: Callable[[Tensor], Tensor], x: Tensor, size: int, *, training: bool = True) -> Program:
    gm = make_fx(lambda x: (function(x),), pre_dispatch=True, tracing_mode="fake")(x)
    return partition_program(Program(gm, Ranks(0, size, "test"), training=training))


def count(program: Program) -> int:
    return sum(node.target is torch.ops.fxsp.all_reduce.default for node in program.graph.nodes)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("function", "all_reduces"),
    [
        (both, 1),
        (through_views, 1),
        (thrice, 1),
        (smaller, 1),
        (joined, 1),
        (a_number_is_added, 2),
        (used_twice, 2),
        (a_whole_value_is_added, 1),
        (alone, 1),
    ],
)
def test_summands_are_summed_once(function: Callable[[Tensor], Tensor], all_reduces: int, size: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    expected = function(x)
    grad = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad(expected, x, grad)
    program = program_of(function, x, size)
    assert count(program) == all_reduces
    outputs, found = gradients(program.gm, size, [x], [grad], poison_pads=True)
    for rank in range(size):
        torch.testing.assert_close(outputs[rank][0], expected)
        torch.testing.assert_close(found[rank][0], wanted)


def test_what_is_smaller_is_sent() -> None:
    program = program_of(smaller, torch.randn(2, 5, 3), 2)
    (record,) = program.report.collectives
    assert record.bytes == program_of(lambda x: split(x).sum(), torch.randn(2, 5, 3), 2).report.collectives[0].bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_summands_in_low_precision_are_rounded_once(dtype: torch.dtype) -> None:
    x = torch.randn(2, 6, 3).to(dtype)
    program = program_of(thrice, x, 2, training=False)
    assert count(program) == 1
    (got,) = check_replicated(simulate(program.gm, 2, [x]))
    assert got.dtype == dtype
    exact = thrice(x.double())
    assert (got.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max() * 2


def test_a_cast_that_rounds_does_not_pass_a_summand() -> None:
    def function(x: Tensor) -> Tensor:
        return split(x).sum(1).to(torch.bfloat16) + split(x).mean(1).to(torch.bfloat16)

    assert count(program_of(function, torch.randn(2, 5, 3), 2)) == 2
