"""Models that are compiled block by block: nothing is gathered between the blocks, and the numbers are those of one
process.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from distributed import Pool
from fxsp import SequenceParallelInput, SequenceParallelOutput
from regional import Regional, run_regional, run_split_outputs, whole_bytes

Ranks = Callable[[int], Pool]
INFER = {"plan": "infer"}


def run(
    ranks: Ranks,
    size: int,
    name: str,
    calls: list[dict[str, Any]],
    training: bool,
    way: str,
    options: dict[str, Any] = INFER,
) -> Regional:
    found: list[Regional] = ranks(size).run(run_regional, name, calls, training, options, way)
    for one in found:
        assert one.classes == {"Tensor"}
        assert max(one.errors) <= 1e-5, one.errors
        assert not training or max(one.gradients) <= 1e-5, one.gradients
    return found[0]


#: Models, and how many kinds of blocks they have: SD3's last one is one of its own.
MODELS: list[tuple[str, dict[str, Any], int]] = [
    ("flux", {"layers": 2, "single_layers": 3}, 2),
    ("flux2", {"layers": 2, "single_layers": 2}, 2),
    ("qwen_image", {}, 1),
    ("wan", {}, 1),
    ("llama", {"tokens": 13}, 1),
    ("sd3", {"size": 10}, 2),
]


@pytest.mark.parametrize(("name", "arguments", "kinds"), MODELS, ids=lambda x: x if isinstance(x, str) else "")
def test_sends_what_the_whole_model_sends(ranks: Ranks, name: str, arguments: dict[str, Any], kinds: int) -> None:
    found = run(ranks, 2, name, [arguments] * 3, training=False, way="blocks")
    assert 0 < found.bytes <= 1.02 * whole_bytes(2, name, arguments, INFER), found.ran
    assert found.compiles == [kinds, 0, 0]
    assert found.reported == (found.ran.total(), found.bytes)


def test_the_report_of_a_whole_model(ranks: Ranks) -> None:
    found = run(ranks, 2, "wan", [{}] * 2, training=False, way="whole")
    assert found.reported == (found.ran.total(), found.bytes)
    assert found.bytes == whole_bytes(2, "wan", {}, INFER)


#: Of Wan: image tokens where its blocks begin, text in all of them.
PLAN = {
    "blocks.0": {"hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3)},
    "blocks.*": {"encoder_hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3)},
    "proj_out": SequenceParallelOutput(gather_dim=1),
}


@pytest.mark.parametrize(
    ("name", "options", "applied"),
    [
        ("wan", {"plan": PLAN}, {"blocks.0[hidden_states]", "blocks.0[encoder_hidden_states]"}),
        ("qwen_image", {}, {"transformer_blocks.0[hidden_states]", "transformer_blocks.0[encoder_hidden_states]"}),
        ("flux", {}, set()),
    ],
)
def test_plan_of_the_model(ranks: Ranks, name: str, options: dict[str, Any], applied: set[str]) -> None:
    """Its entries act in the blocks; where they split what the model is called with, the blocks find their own."""
    found = run(ranks, 2, name, [{}] * 2, training=False, way="blocks", options=options)
    assert 0 < found.bytes <= 1.02 * whole_bytes(2, name, {}, options), found.ran
    assert found.compiles[-1] == 0
    assert applied <= found.applied, found.applied


@pytest.mark.parametrize(
    ("size", "name", "arguments"),
    [(3, "flux", {"image": 25, "layers": 2}), (2, "llama", {"tokens": 7}), (4, "wan", {"frames": 2})],
)
def test_gradients(ranks: Ranks, size: int, name: str, arguments: dict[str, Any]) -> None:
    found = run(ranks, size, name, [arguments] * 3, training=True, way="blocks")
    assert found.compiles[-1] == 0
    assert found.ran["all_gather"] >= 1


@pytest.mark.parametrize("way", ["optimized", "checkpoint", "reentrant", "inside"])
def test_however_the_blocks_are_called(ranks: Ranks, way: str) -> None:
    found = run(ranks, 2, "wan", [{"layers": 2}] * 3, training=True, way=way)
    assert found.compiles[-1] == 0
    assert found.ran == _by_blocks(ranks).ran


@pytest.mark.parametrize(("size", "name", "way"), [(2, "flux", "broken"), (2, "llama", "broken"), (3, "flux", "mixed")])
def test_parts_of_it_are_not_compiled(ranks: Ranks, size: int, name: str, way: str) -> None:
    """A graph break in every block, or blocks in between that are eager: nothing is gathered there."""
    arguments = {"tokens": 7, "layers": 2}
    if name == "flux":
        arguments = {"layers": 2, "single_layers": 2, "image": 25, "heads": 6}
    found = run(ranks, size, name, [arguments] * 3, training=True, way=way)
    assert found.compiles[1:] == [0, 0]
    assert found.ran["all_gather"] == 1
    assert found.ran["all_to_all"] == 2 * (4 if name == "flux" else 2)


@cache
def _by_blocks(ranks: Ranks) -> Regional:
    return run(ranks, 2, "wan", [{"layers": 2}] * 3, training=True, way="blocks")


def test_lengths_change(ranks: Ranks) -> None:
    calls = [{"image": n, "text": 7} for n in (24, 24, 31, 28, 35)]
    found = run(ranks, 3, "flux", calls, training=False, way="blocks")
    assert found.compiles[3:] == [0, 0]


def test_more_ranks_than_tokens(ranks: Ranks) -> None:
    run(ranks, 4, "llama", [{"tokens": 3}] * 3, training=True, way="blocks")


@pytest.mark.parametrize("by_blocks", [False, True], ids=["whole", "by blocks"])
def test_who_asks_is_given_split_values(ranks: Ranks, by_blocks: bool) -> None:
    for found in ranks(3).run(run_split_outputs, by_blocks):
        assert found["class"] == "SplitTensor"
        assert set(found["ran"]) <= {"all_reduce"}
        assert max(found["loss"], found["logits"], found["gradients"]) <= 1e-5
