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
        (2, "wan", "model offload", False),
        (3, "wan", "faster cache", False),
        (2, "flux", "image prompts", True),
        (2, "flux", "leaf offload", True),
    ],
)
def test_steps_of_denoising(ranks: Ranks, size: int, name: str, helper: str, first: bool) -> None:
    found = ranks(size).run(run_helper, name, helper, first, {"batch": 2} if helper == "faster cache" else {})
    for one in found:
        assert max(one.errors) <= 1e-5, one.errors
        assert one.ran == found[0].ran
    counts = [sum(ran.values()) for ran in found[0].ran]
    assert min(counts) >= 1, "something is split in every step"
    if helper == "leaf offload":  # every layer is a graph of its own; Dynamo leaves some of them to Python
        assert found[0].ran[1]["all_to_all"] == 4
        assert found[0].ran[1]["all_gather"] <= 2
        assert any("recompile limit" in text for text in found[0].warnings)
    elif "offload" in helper:
        assert found[0].compiles[1:] == [0, 0, 0, 0]
        own = {"all_to_all": 2, "all_gather": 2} if name == "wan" else {"all_to_all": 4, "all_gather": 1}
        assert found[0].ran[1] == own, "of attentions (of Wan, the text's keys, too) and the end, and no other"
    elif helper == "image prompts":
        assert found[0].ran[1] == {"all_to_all": 4, "all_gather": 1}, "they are used with split queries"
    elif helper == "faster cache":
        assert found[0].ran[4] == {"all_gather": 2}, "keys and values of one attention, and the end"
    elif "cache" in helper:
        assert counts[3] < counts[4], "blocks are left out, and then they are not"
        assert found[0].ran[3]["all_gather"] == 1, "what is kept stays split"


def test_hooks_that_dynamo_must_not_trace(ranks: Ranks) -> None:
    """They have their blocks run as they are, whole: right, and it is said."""
    for found in ranks(2).run(run_helper, "flux", "mag cache", False, {}):
        assert max(found.errors) == 0.0
        assert not any(found.ran)
        texts = [text for text in found.warnings if "nothing of its call was traced" in text]
        assert [text.split()[1] for text in texts] == ["FluxTransformerBlock", "FluxSingleTransformerBlock"]


@pytest.mark.parametrize(("size", "name"), [(2, "flux")])
def test_adapters(ranks: Ranks, size: int, name: str) -> None:
    for found in ranks(size).run(run_adapters, name):
        assert max(found.errors) <= 1e-5, found.errors
        assert max(found.gradients) <= 1e-5, found.gradients
        assert found.compiles == [2, 0, 2, 0, 0]
        assert found.ran[1] == found.ran[4] == {"all_to_all": 4, "all_gather": 1}
