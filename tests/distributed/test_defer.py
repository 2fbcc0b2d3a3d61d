"""Gradients that are left to an outer reducer: its sum, or its mean, is the gradient, whatever ran whole."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fxsp.kernels.ops  # noqa: F401  (defines fxsp::scale_grad)
from deferring import KINDS, outer_reducers, run_changes, run_kind, run_outer
from distributed import Pool
from fxsp.summands import Convention

Ranks = Callable[[int], Pool]


def check(pool: Pool, function: Callable[..., dict[str, float]], *args: object) -> None:
    for rank, errors in enumerate(pool.run(function, *args)):
        wrong = {name: error for name, error in errors.items() if not error <= 1e-5}
        assert errors, rank
        assert not wrong, (rank, wrong)


@pytest.mark.parametrize("how", ["defer", "defer_mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_runs_whole(ranks: Ranks, kind: str, how: str) -> None:
    check(ranks(2), run_kind, kind, how)


@pytest.mark.parametrize("outer", outer_reducers())
def test_outer_reducers_beside_eager_code(ranks: Ranks, outer: str) -> None:
    check(ranks(2), run_outer, outer, "EagerBlock")


@pytest.mark.parametrize("outer", outer_reducers())
def test_outer_reducers_over_data_and_sequence(ranks: Ranks, outer: str) -> None:
    check(ranks(4), run_outer, outer, "Draining", 2)


@pytest.mark.parametrize("options", [{"inner": "eager"}, {"inner": "inductor"}, {"verify": True}], ids=str)
def test_inner_compilers(ranks: Ranks, options: dict[str, object]) -> None:
    """With a term of the loss that no graph sees."""
    check(ranks(2), functools.partial(run_kind, **options), "Eager", "defer", True)


@pytest.mark.parametrize("how", ["defer", "defer_mean"])
def test_three_ranks(ranks: Ranks, how: str) -> None:
    check(ranks(3), run_kind, "Tied", how, True)


def test_the_last_convention_holds(ranks: Ranks) -> None:
    """The same model deferred, then not, then again: graphs that are there already bring their own."""
    for errors in ranks(2).run(run_changes):
        assert all(error <= 1e-5 for error in errors), errors


# The hook on a parameter.


def test_hooks_of_the_user_get_summands() -> None:
    parameter, seen = nn.Parameter(torch.ones(3)), []
    parameter.register_hook(lambda g: seen.append(g.clone()))
    Convention(4).apply([parameter])
    Convention(4).apply([parameter])  # once is enough
    (8 * parameter).sum().backward()
    torch.testing.assert_close(seen, [torch.full((3,), 2.0)])
    torch.testing.assert_close(parameter.grad, torch.full((3,), 2.0))
    (again,) = torch.autograd.grad((8 * parameter.square()).sum(), parameter, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(again.sum(), parameter)[0], torch.ones(3))
    Convention(2).apply([parameter])
    assert torch.autograd.grad((8 * parameter).sum(), parameter)[0].tolist() == [4, 4, 4]
    Convention(1).apply([parameter])
    assert torch.autograd.grad((8 * parameter).sum(), parameter)[0].tolist() == [8, 8, 8]


@pytest.mark.parametrize("sparse", [False, True])
def test_copies_and_other_tensors_have_no_hook(sparse: bool) -> None:
    table = nn.Embedding(3, 2, sparse=sparse)
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    Convention(2).apply([table.weight, frozen])
    table(torch.tensor([1])).sum().backward()
    torch.testing.assert_close(table.weight.grad.to_dense(), torch.tensor([[0, 0], [0.5, 0.5], [0, 0]]))
    file = io.BytesIO()
    torch.save(table, file)
    file.seek(0)
    for other in (copy.deepcopy(table), torch.load(file, weights_only=False)):
        other.zero_grad()
        other(torch.tensor([1])).sum().backward()
        torch.testing.assert_close(other.weight.grad.to_dense(), torch.tensor([[0.0, 0], [1, 1], [0, 0]]))
    frozen.requires_grad_()
    frozen.sum().backward()
    assert frozen.grad.tolist() == [1, 1]


def test_scale_grad_is_nothing_forward() -> None:
    x = torch.randn(3, 4).t().requires_grad_()
    torch.library.opcheck(torch.ops.fxsp.scale_grad.default, (x, 3))
    y = torch.ops.fxsp.scale_grad(x, 3)
    assert torch.equal(y, x)
    assert y.stride() == x.stride()
    assert torch.autograd.grad(y.sum(), x)[0].unique().tolist() == [3]
