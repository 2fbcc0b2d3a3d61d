"""Gradients that are left to an outer reducer: its sum, or its mean, is the gradient, whatever ran whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from deferring import KINDS, outer_reducers, run_kind, run_outer
from distributed import Pool

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
