"""Blocks that are compiled by themselves, with what people put around a model: step caches, offloading, adapters."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from distributed import Pool
from regional_helpers import run_adapters, run_helper

Ranks = Callable[[int], Pool]


@pytest.mark.parametrize(
    ("size", "name", "helper", "first"),
    [
        (2, "flux", "first block cache", False),
        (3, "flux", "taylor seer", True),
        (2, "wan", "attention broadcast", True),
        (2, "flux", "group offload", False),
        (2, "wan", "accelerate", True),
    ],
)
def test_steps_of_denoising(ranks: Ranks, size: int, name: str, helper: str, first: bool) -> None:
    found = ranks(size).run(run_helper, name, helper, first)
    for one in found:
        assert max(one.errors) <= 1e-5, one.errors
        assert one.ran == found[0].ran
    counts = [sum(ran.values()) for ran in found[0].ran]
    assert min(counts) >= 1, "something is split in every step"
    if "offload" in helper:
        assert found[0].compiles[1:] == [0, 0, 0, 0]
        assert found[0].ran[1] == {"all_to_all": 4, "all_gather": 1}, "nothing is gathered between blocks"
    elif "cache" in helper:
        assert counts[3] < counts[4], "blocks are left out, and then they are not"
        assert found[0].ran[3]["all_gather"] == 1, "what is kept stays split"


@pytest.mark.parametrize(("size", "name"), [(2, "flux")])
def test_adapters(ranks: Ranks, size: int, name: str) -> None:
    for found in ranks(size).run(run_adapters, name):
        assert max(found.errors) <= 1e-5, found.errors
        assert max(found.gradients) <= 1e-5, found.gradients
        assert found.compiles == [2, 0, 2, 0, 0]
        assert found.ran[1] == found.ran[4] == {"all_to_all": 4, "all_gather": 1}
