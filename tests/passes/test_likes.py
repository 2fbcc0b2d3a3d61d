"""Operators that read a shape only: nothing is gathered or summed for them, and a draw is that of one device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxsp
from fxsp.passes.base import Program
from fxsp.passes.graph import type_of
from fxsp.types import Shard
from poisoning import simulate
from replicated import check_replicated
from tracing import check, collectives, partition, shard

Function = Callable[[Tensor], Any]


def model(use: Function, text: int = -1) -> Callable[[Tensor, Tensor], Any]:
    return lambda x, w: use(F.linear(shard(x, 1, text), w))


def inputs(length: int = 5) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, length, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)


def gathers(program: Program) -> list[str]:
    return [str(g) for g in program.report.implicit_gathers]


CONSTANT: dict[str, Function] = {
    "zeros_like": lambda y: (y + torch.zeros_like(y)).sum(1),
    "ones_like": lambda y: (y * torch.ones_like(y, dtype=torch.float32)).sum(1),
    "full_like": lambda y: (y * torch.full_like(y, 3.0)).sum(1),
    "empty_like that is written": lambda y: (y * torch.empty_like(y).fill_(2.0)).sum(1),
    "of a transposed value": lambda y: (y.mT + torch.ones_like(y.mT)).sum(2),
    "of a flattened value": lambda y: (y.flatten(0, 1) + torch.ones_like(y.flatten(0, 1))).sum(0),
    "where all tokens are needed": lambda y: torch.ones_like(y).cumsum(1).sum(1) + y.sum(1),
    "as an output": lambda y: (torch.zeros_like(y), y.sum(1)),
    "of a sum over tokens": lambda y: (torch.ones_like(y.sum(1)), y.sum(1).new_zeros(3), y.mean(1)),
    "new_ones": lambda y: (y * y.new_ones(y.shape)).sum(1),
    "new_full": lambda y: (y * y.new_full((1, 1, 4), 0.5)).sum(1),
}


@pytest.mark.parametrize("name", CONSTANT)
@pytest.mark.parametrize(("length", "size", "text"), [(5, 2, -1), (2, 4, -1), (7, 3, 2)])
def test_constants_ask_for_nothing(name: str, length: int, size: int, text: int) -> None:
    program = check(model(CONSTANT[name], text), *inputs(length), size=size)
    assert not gathers(program)
    assert collectives(program) == {"all_reduce": 1}


def test_constants_of_shards_are_made_in_their_size() -> None:
    program = partition(model(CONSTANT["zeros_like"]), *inputs(), size=2)
    (full,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.full.default)
    assert isinstance(type_of(full), Shard)
    assert full.args[0] == [2, 3, 4]


def test_a_sum_that_only_lends_its_shape_is_not_summed() -> None:
    program = partition(model(lambda y: (torch.ones_like(y.sum(1)), torch.rand_like(y.mean(1)))), *inputs(), size=2)
    assert collectives(program) == {}


def test_halves_that_are_summed_in_fp32_lend_their_own_dtype() -> None:
    x, w = (v.bfloat16() for v in inputs())
    program = partition(model(lambda y: torch.ones_like(y.sum(1))), x, w, size=2)
    (out,) = check_replicated(simulate(program.gm, 2, [x, w]))
    assert out.dtype == torch.bfloat16


DRAWN: dict[str, Function] = {
    "randn_like": lambda y: (y * torch.randn_like(y)).sum(1),
    "rand_like of another dtype": lambda y: (y * torch.rand_like(y, dtype=torch.float32)).sum(1),
    "of a transposed value": lambda y: (y.transpose(1, 2) * torch.randn_like(y.transpose(1, 2))).sum(2),
    "of heads": lambda y: (
        y.unflatten(2, (2, 2)).transpose(1, 2) * torch.rand_like(y.unflatten(2, (2, 2)).transpose(1, 2))
    ).sum((1, 2)),
    "randint_like": lambda y: (y * torch.randint_like(y, 9)).sum(1),
    "randint_like between": lambda y: (y * torch.randint_like(y, 3, 9)).sum(1),
    "bernoulli_": lambda y: (y * torch.empty_like(y).bernoulli_(0.3)).sum(1),
    "bernoulli_ of a half": lambda y: (y * torch.empty_like(y).bernoulli_()).sum(1),
    "uniform_": lambda y: (y * torch.empty_like(y).uniform_(1, 2)).sum(1),
    "normal_": lambda y: (y * torch.zeros_like(y).normal_(1, 2)).sum(1),
    "exponential_": lambda y: (y * torch.empty_like(y).exponential_()).sum(1),
    "twice": lambda y: (y * torch.randn_like(y) + torch.rand_like(y)).sum(1),
    "cumsum of it": lambda y: (y * torch.rand_like(y).cumsum(1)).sum(1),
}


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize(
    ("length", "size", "text", "rng"), [(2, 4, -1, "global"), (7, 3, 2, "global"), (5, 2, -1, "per_rank")]
)
def test_a_draw_is_that_of_one_device(name: str, length: int, size: int, text: int, rng: str) -> None:
    x, w = inputs(length)
    function = model(DRAWN[name], text)
    program = partition(function, x, w, size=size, rng=rng)
    torch.manual_seed(7)
    expected = function(x, w)
    torch.manual_seed(7)
    (found,) = check_replicated(simulate(program.gm, size, [x, w], poison_pads=True))
    torch.testing.assert_close(found, expected)
    assert not gathers(program)
    assert collectives(program) == {"all_reduce": 1}
    assert any("draws for the whole value" in note for note in program.report.notes) == (rng == "per_rank")


class Noisy(nn.Module):
    """A diffusion step's noise, in training."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        h = h + 0.1 * torch.randn_like(h) + torch.zeros_like(h)
        return self.out(h).mean(1)


def _processes(rank: int, size: int) -> tuple[list[str], dict[str, int]]:
    from running import collectives as ran
    from running import compiled, error_of

    model, x = Noisy(), torch.randn(2, 7, 8)
    leaves = list(model.parameters())
    fast = compiled(model, plan={"": {"x": fxsp.SequenceParallelInput(1)}}, strict=True)
    outs = []
    for run in (model, fast):
        torch.manual_seed(3)
        outs.append(run(x))
    wanted, got = (torch.autograd.grad(out.sum(), leaves) for out in outs)
    pairs = zip((outs[1], *got), (outs[0], *wanted), strict=True)
    problems = [f"{i}" for i, (a, b) in enumerate(pairs) if error_of(a, b) > 1e-5]
    with torch.no_grad():
        fast(x)
        with ran() as counts:
            fast(x)
    return problems, dict(counts)


def test_on_real_ranks(ranks: Any) -> None:
    for problems, counts in ranks(2).run(_processes):
        assert not problems
        assert counts == {"all_reduce": 1}
