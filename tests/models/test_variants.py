"""Constructs that few think of, on ranks simulated in this process: the numbers of one device, and a true report."""

from __future__ import annotations

import pytest
import torch

from construct_variants import GATHERED, SPLIT, WHOLE
from constructs import Construct, Outcome, simulate_construct


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def run(item: Construct) -> Outcome:
    outcome = simulate_construct(item, size=3)
    assert not outcome.failure, outcome.failure
    wrong = {key: error for key, error in outcome.errors.items() if not error <= 1e-5}
    assert not wrong
    assert outcome.aliases[0] == outcome.aliases[1], "the outputs share memory in another way"
    return outcome


@pytest.mark.parametrize("name", SPLIT)
def test_split(name: str) -> None:
    outcome = run(SPLIT[name])
    assert outcome.attentions
    assert any(applied for _, applied, _ in outcome.plan)
    assert not outcome.gathers
    assert not outcome.unsharded


@pytest.mark.parametrize("name", GATHERED)
def test_gathered(name: str) -> None:
    item, words = GATHERED[name]
    outcome = run(item)
    assert outcome.attentions
    assert any(words in text for text in outcome.gathers)
    assert all("construct" in text and " bytes per rank" in text for text in outcome.gathers)
    assert any("ImplicitGatherWarning" in text for text in outcome.warnings)


@pytest.mark.parametrize("name", WHOLE)
def test_whole(name: str) -> None:
    item, words = WHOLE[name]
    outcome = run(item)
    assert any(words in text for text in outcome.unsharded)
    assert any("UnshardedWarning" in text and words in text for text in outcome.warnings)
