"""Gradients that are left to an outer reducer: its sum, or its mean, is the gradient, whatever ran whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from deferring import KINDS, run_kind
from distributed import Pool

Ranks = Callable[[int], Pool]


def check(pool: Pool, *args: object) -> None:
    for rank, errors in enumerate(pool.run(run_kind, *args)):
        wrong = {name: error for name, error in errors.items() if not error <= 1e-5}
        assert errors, rank
        assert not wrong, (rank, wrong)


@pytest.mark.parametrize("how", ["defer", "defer_mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_runs_whole(ranks: Ranks, kind: str, how: str) -> None:
    check(ranks(2), kind, how)
