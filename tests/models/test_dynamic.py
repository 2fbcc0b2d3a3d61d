"""Other lengths: the second one compiles once more, with symbolic lengths; after that none does.

Two exceptions, one compile each: no more tokens than ranks, and one token.  One token alone is not split, and that is
in the report.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fxsp
from distributed import Pool
from fxsp import SequenceParallelInput, SequenceParallelPartialInput
from running import Case, Compiler, build, compiled, error_of, on_this_rank, simulate_case, simulating
from small import SPLIT, Model, inputs

Ranks = Callable[[int], Pool]

IDS = {"plan": {"": {"input_ids": SequenceParallelInput(1)}}}


def _images(*lengths: tuple[int, int]) -> tuple[dict[str, Any], ...]:
    return tuple({"image": image, "text": text} for image, text in lengths)


def _tokens(*lengths: int) -> tuple[dict[str, Any], ...]:
    return tuple({"tokens": length} for length in lengths)


#: Number of ranks, the case, how many graphs each call may compile, and how many of these are of one token alone.
CASES = [
    # Dividing, prime, odd, dividing again; then fewer text tokens than ranks, then one token.
    (
        2,
        Case("flux", {"image": 12, "text": 4}, calls=_images((29, 9), (31, 11), (36, 8), (33, 7), (1, 3))),
        "110001",
        0,
    ),
    (3, Case("llama", {"tokens": 12, "mask": True, "layers": 1}, IDS, calls=_tokens(13, 17, 21, 3, 1)), "110011", 1),
    (3, Case("wan", {"frames": 3}, calls=({"frames": 5}, {"frames": 2}, {"frames": 7})), "1100", 0),
]


@pytest.mark.parametrize(
    ("size", "case", "compiles", "single"), CASES, ids=[f"{size}-{case}" for size, case, *_ in CASES]
)
def test_lengths_compile_at_most_once_more(size: int, case: Case, compiles: str, single: int) -> None:
    outcome = simulate_case(size, case)
    assert max(outcome.errors) <= 1e-5, outcome.errors
    assert all(found <= int(most) for found, most in zip(outcome.compiles, compiles, strict=True)), outcome.compiles
    reasons = [text.partition(":")[0] for text in outcome.unsharded]
    assert reasons == ["there is nothing to split"] * single, outcome.unsharded
    assert not outcome.warnings
    assert not outcome.implicit


def _llama_steps(rank: int, size: int, lengths: list[int]) -> list[tuple[float, float, int]]:
    """Training steps of several lengths: error of the loss and of the worst gradient, graphs compiled."""
    model, _ = build("llama", {"layers": 1})
    fast, found = compiled(model, **IDS), []
    for tokens in lengths:
        made = build("llama", {"layers": 1, "tokens": tokens, "batch": 2, "mask": True})[1]
        made["labels"] = torch.where(torch.arange(tokens) % 3 == 1, -100, made["input_ids"])
        expected = model(**made).loss
        expected.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad()
        before = len(fxsp.reports())
        loss = fast(**made).loss
        loss.backward()
        worst = max(error_of(p.grad, gradients[name]) for name, p in model.named_parameters())
        found.append((error_of(loss, expected), worst, len(fxsp.reports()) - before))
        model.zero_grad()
    return found


def test_training_with_other_lengths(ranks: Ranks) -> None:
    for found in ranks(2).run(_llama_steps, [12, 13, 17, 20], timeout=600.0):
        assert max(max(loss, gradient) for loss, gradient, _ in found) <= 1e-5, found
        compiles = [count for _, _, count in found]
        assert compiles[0] == 1
        assert compiles[1] <= 1
        assert compiles[2:] == [0, 0]


def _every_length(
    rank: int,
    size: int,
    lengths: list[int],
    dynamic: bool | None,
    text: int = 0,
    compiler_of: Callable[[dict[str, Any]], Compiler] = on_this_rank,
) -> tuple[list[float], list[int]]:
    torch.manual_seed(1)
    model = Model().eval()  # in training, the rate of its dropout would be a symbol too, and cost an attempt
    behind = {"": {"x": SequenceParallelPartialInput(1, text_len_source=text)}}
    compiler = compiler_of({"plan": behind if text else SPLIT})
    fast, errors, compiles = torch.compile(model, **compiler.arguments, dynamic=dynamic), [], []
    with torch.no_grad():
        for length in lengths:
            x, before = inputs(length), len(compiler.reports())
            errors.append(error_of(fast(x), model(x)))
            compiles.append(len(compiler.reports()) - before)
    return errors, compiles


@pytest.mark.parametrize("size", [2, 3])
def test_every_length_is_right(ranks: Ranks, size: int) -> None:
    """From one token to several times as many as ranks, up and down; three ranks are simulated."""
    lengths = [7, *range(8, 20), *range(6, 0, -1), 7, 64]
    if size == 2:
        found = ranks(2).run(_every_length, lengths, None, timeout=600.0)
    else:
        found = [_every_length(0, size, lengths, None, compiler_of=simulating(size))]
    for errors, compiles in found:
        assert max(errors) <= 1e-5, errors
        by_length = dict(zip(lengths, compiles, strict=True))
        assert sum(compiles) <= 4
        assert all(not by_length[n] for n in lengths if n not in (7, 8, 1) and n > size), by_length


def test_symbolic_from_the_start() -> None:
    errors, compiles = _every_length(0, 2, [9, 10, 5, 23], True, compiler_of=simulating(2))
    assert max(errors) <= 1e-5, errors
    assert compiles == [1, 0, 0, 0]


@pytest.mark.filterwarnings("ignore::fxsp.UnshardedWarning")
@pytest.mark.parametrize("dynamic", [None, True])
def test_a_text_that_leaves_nothing_to_split(dynamic: bool | None) -> None:
    """The graph of longer sequences is not for those that are no longer than their text."""
    errors, _ = _every_length(0, 2, [17, 20, 7, 3, 1, 12], dynamic, 7, simulating(2))
    assert max(errors) <= 1e-5, errors


def _other_batch(rank: int, size: int) -> list[int]:
    """Batch and length change together, then each alone."""
    torch.manual_seed(1)
    model, compiles = Model(), []
    fast = compiled(model, plan=SPLIT)
    with torch.no_grad():
        for batch, length in ((2, 6), (3, 7), (3, 9), (5, 9), (4, 10)):
            x, before = inputs(length)[:1].repeat(batch, 1, 1), len(fxsp.reports())
            assert error_of(fast(x), model(x)) <= 1e-5
            compiles.append(len(fxsp.reports()) - before)
    return compiles


def test_batch_and_length(ranks: Ranks) -> None:
    for compiles in ranks(2).run(_other_batch):
        assert compiles == [1, 1, 0, 0, 0]
