"""Losses over split tokens: values and gradients of one device, and no gather."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

import fxsp.kernels.ops  # noqa: F401  (defines fxsp::annotate)
from fxsp.passes.base import Program
from fxsp.passes.pipeline import partition_program
from fxsp.types import Ranks
from lockstep import gradients

RANKS = (2, 3)
LENGTHS = (1, 2, 5, 6)
CLASSES, WIDTH, BATCH = 7, 4, 2


def split(x: torch.Tensor, dim: int = 1) -> torch.Tensor:
    return torch.ops.fxsp.annotate(x, "shard", dim, -1, "test")


def partitioned(function: Callable[..., Any], inputs: list[torch.Tensor], size: int) -> Program:
    gm = make_fx(function, pre_dispatch=True, tracing_mode="fake")(*inputs)
    return partition_program(Program(gm, Ranks(0, size, "test"), training=True))


def compare(function: Callable[..., torch.Tensor], inputs: list[torch.Tensor], size: int) -> Program:
    """Loss and gradients on ``size`` simulated ranks against one device, pads poisoned."""
    expected = function(*inputs)
    grad = torch.randn_like(expected)
    leaves = [x for x in inputs if x.requires_grad]
    wanted = torch.autograd.grad(expected, leaves, grad)
    program = partitioned(lambda *xs: (function(*xs),), inputs, size)
    outputs, found = gradients(program.gm, size, inputs, [grad], poison_pads=True)
    for rank in range(size):
        torch.testing.assert_close(outputs[rank][0], expected, rtol=1e-9, atol=1e-12)
        for got, want in zip(found[rank], wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    return program


def implicit(program: Program) -> list[str]:
    return [str(g) for g in program.report.implicit_gathers if g.kind == "implicit"]


def targets(length: int) -> torch.Tensor:
    """Some ignored, unevenly over the ranks."""
    target = torch.arange(BATCH * length).view(BATCH, length) % CLASSES
    target[0, : (length + 1) // 2] = -100
    return target


@pytest.mark.parametrize(("length", "size"), list(itertools.product(LENGTHS, RANKS)))
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("flat", [True, False], ids=["flat", "spatial"])
def test_cross_entropy(length: int, size: int, reduction: str, flat: bool) -> None:
    x = torch.randn(BATCH, length, WIDTH, dtype=torch.float64, requires_grad=True)
    head = torch.randn(CLASSES, WIDTH, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(CLASSES, dtype=torch.float64) + 0.1

    def loss(x: torch.Tensor, head: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        scores = F.linear(split(x), head)
        scores, target = (scores.flatten(0, 1), target.flatten()) if flat else (scores.transpose(1, 2), target)
        return F.cross_entropy(scores, target, weight, reduction=reduction, label_smoothing=0.1)

    program = compare(loss, [x, head, targets(length), weight], size)
    assert implicit(program) == []
    if reduction == "mean":
        kinds = [c.kind for c in program.report.collectives]
        assert kinds == ["all_reduce", "all_reduce"]  # the count of targets, and the loss


@pytest.mark.parametrize("size", RANKS)
def test_every_target_ignored_is_nan_as_on_one_device(size: int) -> None:
    x = torch.randn(1, 5, CLASSES, dtype=torch.float64)
    target = torch.full((1, 5), -100)

    def loss(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(split(x).flatten(0, 1), target.flatten())

    program = partitioned(lambda *xs: (loss(*xs),), [x, target], size)
    outputs, _ = gradients(program.gm, size, [x.requires_grad_(), target], [torch.ones((), dtype=torch.float64)])
    assert all(out[0].isnan() for out in outputs)


@pytest.mark.parametrize(("length", "size"), list(itertools.product(LENGTHS, RANKS)))
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("function", [F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss])
def test_elementwise_losses(length: int, size: int, reduction: str, function: Callable[..., torch.Tensor]) -> None:
    x, y = (torch.randn(BATCH, length, WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(2))
    program = compare(lambda x, y: function(split(x), y, reduction=reduction), [x, y], size)
    assert implicit(program) == []


def test_targets_that_are_probabilities_are_gathered_for() -> None:
    x = torch.randn(1, 5, CLASSES, dtype=torch.float64, requires_grad=True)
    y = torch.rand(1, 5, CLASSES, dtype=torch.float64)
    head = torch.randn(CLASSES, CLASSES, dtype=torch.float64, requires_grad=True)

    def loss(x: torch.Tensor, y: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(split(x), head).flatten(0, 1), y.flatten(0, 1))

    program = compare(loss, [x, y, head], 2)
    assert len(implicit(program)) == 1
