"""Whatever real code contains, on two gloo processes or as many simulated ranks, and on three: the numbers of one
process, values and gradients.

Each construct of the modules ``construct_*`` runs eagerly and compiled; outputs, gradients of inputs and parameters,
buffers, inputs after the call, and which values share memory are compared.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

import construct_layers
import construct_mixing
import construct_models
import construct_state
import construct_ways
from constructs import CONSTRUCTS, Outcome, run_constructs, simulate_construct
from distributed import Pool

MODULES = (construct_models, construct_state, construct_ways, construct_layers)
#: Constructs of one task of the processes.
BATCH = 8
#: bf16 rounds each product; what is compared are two orders of summation.
LOW_PRECISION = {"autocast_whole": 2e-2, "autocast_region": 2e-2}
#: What AOTAutograd, the inner compiler, several graphs or one that runs whole have a part in; others end in Dynamo's
#: graph and in rules, and are simulated.
ON_PROCESSES = [
    "checkpoint_new", "autocast_whole", "no_grad_region", "break_in_block", "print_in_block", "break_in_root",
    "data_dependent_branch", "disabled_function", "custom_function", "flex", "cond_training",
    "mutated_input", "buffers", "aliased_outputs", "overlapping_inputs", "overlapping_inputs_written",
    "write_through_detach", "random_noise", "running_statistics",
    "train_step_with_backward", "compiled_in_place", "one_module_twice", "returns_dict", "mixing: writes",
]  # fmt: skip
ON_THREE = [
    "checkpoint_new", "custom_function", "mutated_input", "buffers", "aliased_outputs", "dropout", "train_step",
    "called_twice", "running_statistics", "mixing: neighbours", "mixing: writes", "mixing: losses",
]  # fmt: skip


def run(rank: int, size: int, names: list[str]) -> dict[str, Outcome]:
    """In the processes: the modules that hold the constructs have to be there."""
    assert all(module.__name__ in sys.modules for module in MODULES)
    return run_constructs(rank, size, names)


def is_simulated(name: str) -> bool:
    return name not in ON_PROCESSES


class Outcomes:
    """What the ranks saw; a batch runs when one of its constructs is asked for."""

    def __init__(self, ranks: Callable[[int], Pool]) -> None:
        self.ranks = ranks
        self.seen: dict[str, list[Outcome]] = {}

    def __call__(self, name: str) -> list[Outcome]:
        if name not in self.seen and is_simulated(name):
            self.seen[name] = [simulate_construct(CONSTRUCTS[name], 2)]
        elif name not in self.seen:
            names = [each for each in CONSTRUCTS if not is_simulated(each)]
            start = names.index(name) // BATCH * BATCH
            batch = names[start : start + BATCH]
            results = self.ranks(2).run(run, batch, timeout=400.0)
            self.seen |= {n: [result[n] for result in results] for n in batch}
        return self.seen[name]


@pytest.fixture(scope="module")
def outcomes(ranks: Callable[[int], Pool]) -> Outcomes:
    return Outcomes(ranks)


def check(name: str, seen: list[Outcome]) -> None:
    limit = LOW_PRECISION.get(name, 1e-5)
    for rank, outcome in enumerate(seen):
        assert not outcome.failure, f"rank {rank}: {outcome.failure}"
        wrong = {key: error for key, error in outcome.errors.items() if not error <= limit}
        assert not wrong, f"rank {rank}: {wrong}"
        assert outcome.aliases[0] == outcome.aliases[1], "the outputs share memory in another way"


@pytest.mark.parametrize("name", list(CONSTRUCTS))
def test_two_ranks(name: str, outcomes: Outcomes) -> None:
    check(name, outcomes(name))


@pytest.mark.parametrize("name", ON_THREE)
def test_three_ranks(name: str, ranks: Callable[[int], Pool]) -> None:
    if name == "aliased_outputs":  # which outputs share memory is AOTAutograd's work
        check(name, [seen[name] for seen in ranks(3).run(run, [name])])
    else:
        check(name, [simulate_construct(CONSTRUCTS[name], 3)])


# --- what the report says ---------------------------------------------------------------------------------------------

#: Constructs whose tokens are split all the way: one graph, no implicit gather.
ALL_SPLIT = [
    "checkpoint_new", "checkpoint_reentrant", "checkpoint_inside_block", "checkpoint_selective",
    "autocast_region", "autocast_whole", "no_grad_region", "detach", "mutated_input", "buffers", "aliased_outputs",
    "strided_input", "expanded_input", "one_tensor_twice", "overlapping_inputs", "dropout", "dropout_zero",
    "dropout_eval", "compiled_lambda", "train_step", "bound_method", "compiled_forward", "compiled_submodule",
    "compiled_in_place", "two_instances", "called_twice", "nested_lists", "returns_dict", "returns_dataclass",
    "returns_tuple", "module_hooks", "tied_weights", "weight_norm",
]  # fmt: skip


@pytest.mark.parametrize("name", ALL_SPLIT)
def test_split(name: str, outcomes: Outcomes) -> None:
    for outcome in outcomes(name):
        assert outcome.graphs == 1
        assert not outcome.unsharded
        assert not outcome.gathers
        assert "ulysses" in outcome.attentions
        assert all(applied for _, applied, _ in outcome.plan)


#: Constructs that are not opened: the tokens are gathered for them, and the report says what, where and why.
ISLANDS = {
    "custom_function": "autograd_function_apply",
    "functional_vmap": "functorch transform",
    "functional_grad": "functorch transform",
    "functional_jvp": "functorch transform",
    "flex": "flex_attention",
    "cond": "cond",
    "cond_training": "cond",
}


@pytest.mark.parametrize("name", list(ISLANDS))
def test_island(name: str, outcomes: Outcomes) -> None:
    for outcome in outcomes(name):
        assert not outcome.unsharded
        assert outcome.gathers
        for gather in outcome.gathers:
            assert ISLANDS[name] in gather
            assert "not opened, it runs whole" in gather
            assert " in block (construct_models.py:" in gather
        assert any("ImplicitGatherWarning" in text for text in outcome.warnings)


BREAKS = ["break_in_block", "print_in_block", "data_dependent_branch", "disabled_function"]


@pytest.mark.parametrize("name", BREAKS)
def test_graph_break_in_a_block(name: str, outcomes: Outcomes) -> None:
    for outcome in outcomes(name):
        assert outcome.graphs > 1
        assert "ulysses" in outcome.attentions, "the part before the break is split"
        assert any("graph break" in detail for _, applied, detail in outcome.plan if not applied)
        later = [applied for entry, applied, _ in outcome.plan if "split before this graph began" in entry]
        later += ["comes in split" in note for note in outcome.notes]
        assert any(later), "the part after the break goes on with it, or is split again"


def test_graph_break_in_the_root(outcomes: Outcomes) -> None:
    for outcome in outcomes("break_in_root"):
        assert outcome.graphs == 2
        assert outcome.attentions == ["ulysses"]
        assert sum(applied for _, applied, _ in outcome.plan) == 2


def test_called_through_forward(outcomes: Outcomes) -> None:
    for outcome in outcomes("through_forward"):
        assert [applied for _, applied, _ in outcome.plan] == [False, False]
        assert all("not called" in detail for _, _, detail in outcome.plan)
        assert outcome.unsharded == ["no entry of the plan applies to this graph"]


def test_overlapping_inputs_that_are_written(outcomes: Outcomes) -> None:
    for outcome in outcomes("overlapping_inputs_written"):
        assert "shares memory that is written to in place" in outcome.unsharded[0]
        assert any("UnshardedWarning" in text for text in outcome.warnings)


def test_write_through_detach_stays_whole(outcomes: Outcomes) -> None:
    for outcome in outcomes("write_through_detach"):
        assert "writes through detach() while gradients are recorded" in outcome.unsharded[0]
        assert any("UnshardedWarning" in text and "construct_state.py:" in text for text in outcome.warnings)


@pytest.mark.parametrize(("group", "name"), construct_mixing.mixer_names())
def test_mixing_is_reported(group: str, name: str, outcomes: Outcomes) -> None:
    for outcome in outcomes(f"mixing: {group}"):
        gathers = [text for text in outcome.gathers if f" in mixers.{name} (construct_" in text]
        if name in construct_mixing.SPLIT:
            assert not gathers
        else:
            assert gathers
            assert all(" bytes per rank" in text for text in gathers)


def test_linear_attention_is_one_small_all_reduce(outcomes: Outcomes) -> None:
    """``K^T V`` is a summand: [2, DIM, DIM] and [2, 2, DIM / 2, DIM / 2] floats are summed, nothing is gathered."""
    for outcome in outcomes("mixing: attention"):
        sums = [bytes_ for kind, bytes_ in outcome.collectives if kind == "all_reduce"]
        assert sorted(sums)[-2:] == [2 * 4 * 4 * 2 * 4, 2 * 8 * 8 * 4]


def test_running_statistics_stay_whole(outcomes: Outcomes) -> None:
    """A BatchNorm that writes its buffers is not functionalized: the graph runs whole, and a warning says why."""
    for outcome in outcomes("running_statistics"):
        assert "aten.batch_norm.default in norm" in outcome.unsharded[0]
        assert any("UnshardedWarning" in text for text in outcome.warnings)
