"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

import rank_server
from distributed import Pool


def pytest_configure(config: pytest.Config) -> None:
    """Several processes of pytest share the servers of ranks, which are loaded while tests are collected."""
    if config.getoption("numprocesses", None) and not config.option.collectonly:
        rank_server.start()


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
