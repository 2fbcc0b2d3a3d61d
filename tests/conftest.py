"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from distributed import Pool


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Pool]]:
    """``ranks(2).run(fn, *args)``: ``fn(rank, size, *args)`` on two gloo processes that live as long as the session."""
    pools: dict[int, Pool] = {}

    def pool(size: int) -> Pool:
        if size not in pools:
            pools[size] = Pool(size)
        return pools[size]

    yield pool
    for each in pools.values():
        each.close()
