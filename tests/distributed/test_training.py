"""One training step: loss and every gradient are those of one process; gradients travel in buckets.

Two ranks are processes, but for a Flux under checkpoints, as a Wan and a Llama are; more are simulated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from distributed import Pool
from fxsp import SequenceParallelInput
from training import Step, StepCase, run_step, simulate_step

Ranks = Callable[[int], Pool]

IDS = {"plan": {"": {"input_ids": SequenceParallelInput(1)}}}
FLUX = {"batch": 2, "image": 13, "text": 5}
WAN = {"batch": 2, "frames": 3}


def llama(**arguments: Any) -> dict[str, Any]:
    return {"batch": 2, "tokens": 13, "layers": 1, **arguments}


def check(steps: list[Step], case: StepCase) -> Step:
    for rank, step in enumerate(steps):
        where = (case, rank, step.worst)
        assert step.loss_error <= 1e-5, where
        assert step.gradient_error <= 1e-5, where
        assert not step.mismatched, where
        assert step.gradients > 10, where
        assert step.compiles == 1, where
        assert not step.unsharded, where
        assert not step.implicit, where
        assert not step.warnings, where
        assert (step.forward, step.backward) == (steps[0].forward, steps[0].backward), where
    return steps[0]


def expect_exchanges(step: Step, method: str, count: int) -> None:
    """The backward pass of an attention exchanges what its forward pass did, checkpointed or not."""
    if method == "ulysses":
        assert step.forward["all_to_all"] == step.backward["all_to_all"] == 2 * count
    else:
        assert step.backward["reduce_scatter"] == count
    assert step.attentions.count(method) == count


#: Number of ranks, the step, the method of the split attentions and how many.
CASES = [
    (2, StepCase("flux", FLUX), "ulysses", 2),
    (2, StepCase("flux", FLUX, checkpoint=True), "ulysses", 2),
    (3, StepCase("flux", {**FLUX, "image": 7}, loss="function"), "gather_kv", 2),
    (2, StepCase("wan", WAN, checkpoint=True), "ulysses", 1),
    (3, StepCase("wan", WAN), "gather_kv", 1),
    (2, StepCase("llama", llama(mask=True), IDS, loss="labels"), "ulysses", 1),
    (2, StepCase("llama", llama(layers=2), IDS, loss="labels", checkpoint=True), "ulysses", 2),
    (3, StepCase("llama", llama(tokens=11, mask=True), IDS, loss="labels", checkpoint=True), "gather_kv", 1),
    (4, StepCase("llama", llama(tokens=3), IDS, loss="outside"), "gather_kv", 1),
]


@pytest.mark.parametrize(("size", "case", "method", "count"), CASES, ids=[f"{row[0]}-{row[1]}" for row in CASES])
def test_gradients(ranks: Ranks, size: int, case: StepCase, method: str, count: int) -> None:
    real = size == 2 and not (case.model == "flux" and case.checkpoint)
    step = check(ranks(size).run(run_step, case, timeout=300.0) if real else [simulate_step(size, case)], case)
    expect_exchanges(step, method, count)


def test_gradients_of_parameters_travel_in_one_bucket(ranks: Ranks) -> None:
    case = StepCase("llama", llama(layers=2), IDS, loss="outside")
    step = check(ranks(2).run(run_step, case, timeout=300.0), case)
    assert step.gradients == 21
    assert step.backward == {"all_to_all": 4, "all_reduce": 1}


@pytest.mark.parametrize(
    "case",
    [
        StepCase("llama", llama(), {**IDS, "grad_reduce": "defer"}, loss="labels", reduce=True),
        StepCase("flux", FLUX, {"grad_reduce": "defer"}, reduce=True),
    ],
    ids=str,
)
def test_deferred_gradients_are_summands(ranks: Ranks, case: StepCase) -> None:
    """What an outer reducer sums up is the gradient; before that it is not, and those of inputs are whole already."""
    step = check(ranks(2).run(run_step, case, timeout=300.0), case)
    assert step.before_reduce > 0.1
    if case.model == "llama":
        assert step.backward["all_reduce"] == 0


@pytest.mark.parametrize(
    "case",
    [
        StepCase("flux", FLUX, {"inner": "eager"}),
        StepCase("llama", llama(mask=True), {**IDS, "inner": "eager"}, loss="labels"),
    ],
    ids=str,
)
def test_inner_eager(ranks: Ranks, case: StepCase) -> None:
    """Without AOTAutograd there are no buckets, and the numbers are the same."""
    step = check(ranks(2).run(run_step, case, timeout=300.0), case)
    expect_exchanges(step, "ulysses", 2 if case.model == "flux" else 1)
