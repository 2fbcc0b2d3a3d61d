"""Fixtures of all tests, and the order in which several processes take them."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

import rank_server
from distributed import Pool

# What Inductor makes for tests runs once: code without vectors takes a quarter of the time to compile.  Read by torch,
# also in the processes of tests.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")
# What was measured of this machine (fxsp.calibrate) decides nothing in tests that do not ask for it.
os.environ["FXSP_CACHE_DIR"] = f"{os.devnull}/none"

#: Seconds that a test may take, roughly: one marked ``slow``, one on real processes, and any other one.
SLOW, PROCESSES, USUAL = 30.0, 5.0, 0.3


def pytest_configure(config: pytest.Config) -> None:
    """Several processes of pytest share the servers of ranks, which are loaded while tests are collected."""
    if config.getoption("numprocesses", None) and not config.option.collectonly:
        rank_server.start()
        config.option.loadscopereorder = False  # the order below


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files are dealt whole to several processes, as what their tests share is made once: long ones first."""
    if not config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return
    files: Counter[object] = Counter()
    for item in items:
        slow = item.get_closest_marker("slow")
        files[item.path] += SLOW if slow else PROCESSES if "ranks" in getattr(item, "fixturenames", ()) else USUAL
    items.sort(key=lambda item: -files[item.path])


def pytest_collection_finish() -> None:
    """What is loaded lives as long as the tests: the collector need not look at it again, nor as often as it does."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*rank_server.THRESHOLDS)


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # what ends with the process is collected then


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
