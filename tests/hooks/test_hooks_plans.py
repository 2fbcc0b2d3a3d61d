"""Hooks of a plan on small models: what is split and gathered, attention of every kind, values and gradients; what is
attached under which name, and what is refused before anything is attached."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from fxsp.config import OptionError
from fxsp.errors import PlanError
from fxsp.hooks import (
    HookRegistry,
    ModelHook,
    ModuleForwardMetadata,
    SequenceParallelGatherHook,
    SequenceParallelSplitHook,
    apply_sequence_parallel,
    disable_sequence_parallel_for_model,
    enable_sequence_parallel_for_model,
    remove_sequence_parallel,
    report_of,
)
from fxsp.plan import SequenceParallelConfig
from hook_parts import PARTS, Part, Seen, run_part
from hook_parts_base import Body, Deep, In, Out, Partial, x
from hook_parts_values import Prepared, Two

#: float64: rounding cannot hide a mistake.
BOUND = 1e-12


def local_rows(segments: tuple[int, ...], size: int) -> int:
    return sum(n if n >= 0 else -(n // size) for n in segments)


def check(seen: Seen, part: Part, size: int) -> None:
    assert seen.error <= BOUND
    assert seen.gradient_error <= BOUND
    assert seen.implicit == []
    assert seen.notes == []
    assert seen.warnings == []
    for name, segments in part.tokens.items():
        assert seen.tokens[name] == local_rows(segments, size), name


@pytest.mark.parametrize("name", PARTS)
def test_values_and_gradients_are_those_of_one_process(ranks, name: str) -> None:
    for seen in ranks(3).run(run_part, name):
        check(seen, PARTS[name](), 3)
        assert seen.attentions or name == "gather_of_a_list"


#: Of every kind of attention: which methods a configuration leads to.
WAYS = [
    (2, (2, 1, 1), {"ulysses", "local", "whole"}),
    (2, (1, 2, 1), {"ring", "local", "whole"}),
    (2, (1, 1, 2), {"gather_kv", "local", "whole"}),
    (4, (2, 2, 1), {"hybrid", "local", "whole"}),
]
OF_ATTENTION = [
    "two_sequences",
    "three_sequences",
    "cross_attention_to_split_keys",
    "whole_queries_of_split_keys",
    "partial_by_number",
    "masks",
    "causal",
    "checkpoint",
    "checkpoint_reentrant_functions",
]


@pytest.mark.parametrize(("size", "degrees", "methods"), WAYS)
@pytest.mark.parametrize("name", OF_ATTENTION)
def test_attention_by_configuration(ranks, name: str, size: int, degrees: Any, methods: set[str]) -> None:
    for seen in ranks(size).run(run_part, name, degrees):
        check(seen, PARTS[name](), size)
        assert set(seen.attentions) <= methods


@pytest.mark.parametrize(
    ("name", "size", "degrees"), [("shared_heads", 2, (1, 2, 1)), ("one_shared_head", 4, (2, 2, 1))]
)
def test_shared_heads_in_a_ring_or_not(ranks, name: str, size: int, degrees: Any) -> None:
    (seen, *_) = ranks(size).run(run_part, name, degrees)
    check(seen, PARTS[name](), size)
    assert set(seen.attentions) == ({"ring"} if name == "shared_heads" else {"gather_kv"})


# --- what is attached -------------------------------------------------------------------------------------------------


def names_of(model: nn.Module) -> dict[str, list[str]]:
    """Modules with hooks of a plan, and the names of these."""
    found = {}
    for path, module in model.named_modules():
        registry = vars(module).get("_hook_registry")
        names = [] if registry is None else [name for name in registry.names if name != "sp_---root"]
        if names:
            found[path] = names
    return found


def bare(model: nn.Module) -> bool:
    """Whether nothing is attached at all."""
    attributes = ("_hook_registry", "forward", "_omni_original_forward")
    return not any(name in vars(module) for module in model.modules() for name in attributes)


PLAN = {
    "": {"x": In(1, 3)},
    "body.blocks.*": {"x": In(1)},
    "body.blocks.1.ff.0": {"input": In(1)},
    "body.blocks.0.attn": {0: In(1, split_output=True)},
    "body.blocks.2": Out(1),
    "out": Out(1, 3),
}


def test_hooks_are_registered_under_the_key_of_the_plan() -> None:
    model = Deep()
    apply_sequence_parallel(model, SequenceParallelConfig(), PLAN)
    assert names_of(model) == {
        "": ["sp_input---"],
        "body.blocks.0": ["sp_input---body.blocks.*"],
        "body.blocks.0.attn": ["sp_input---body.blocks.0.attn"],
        "body.blocks.1": ["sp_input---body.blocks.*"],
        "body.blocks.1.ff.0": ["sp_input---body.blocks.1.ff.0"],
        "body.blocks.2": ["sp_input---body.blocks.*", "sp_output---body.blocks.2"],
        "out": ["sp_output---out"],
    }
    hook = model.out._hook_registry.get_hook("sp_output---out")
    assert isinstance(hook, SequenceParallelGatherHook)
    assert hook.metadata == [Out(1, 3)]
    assert hook.config == SequenceParallelConfig()
    hook = model.body.blocks[1]._hook_registry.get_hook("sp_input---body.blocks.*")
    assert isinstance(hook, SequenceParallelSplitHook)
    assert hook.metadata == {"x": In(1)}
    assert hook.module_forward_metadata.cached_parameter_indices == {"x": 0}
    whole = copy.deepcopy(model)
    remove_sequence_parallel(model, PLAN)
    assert bare(model)
    assert torch.equal(model(x(5)), whole(x(5)))  # one rank


def test_other_hooks_stay_when_those_of_the_plan_go() -> None:
    model = Deep()
    HookRegistry.get_or_create(model.out).register_hook("mine", ModelHook())
    apply_sequence_parallel(model, None, PLAN)
    remove_sequence_parallel(model, PLAN)
    assert names_of(model) == {"out": ["mine"]}
    remove_sequence_parallel(model, PLAN)  # again: nothing to do
    assert names_of(model) == {"out": ["mine"]}


#: Plans that mean nothing, and what the error says.
WRONG = [
    ({"bodi": {"x": In(1)}}, r'no module "bodi".*\n.*Did you mean "body"'),
    ({"out": Out(1), "body.blocks.7": {"x": In(1)}}, 'no module "7"'),
    ({"out": Out(1), "body.blocks": {"x": In(1)}}, r"body\.blocks\.\*"),
    ({"out": Out(1), "body.*": {"x": In(1)}}, "ModuleList"),
    ({"out": Out(1), "*.blocks.*": {"x": In(1)}}, "at most one"),
    ({"out": Out(1), "body": {"y": In(1)}}, r'no argument "y"'),
    ({"out": Out(1), "body": {0: In(1)}}, "split_output=True"),
    ({"out": Out(1), "body": {"x": In(1, split_output=True)}}, "output index"),
    ({"out": Out(1), "body": {"x": Out(1)}}, "cannot be gathered"),
    ({"out": Out(1), "body": {True: In(1)}}, "neither an argument name"),
    ({"out": Out(1), "body": {-1: In(1, split_output=True)}}, "not negative"),
    ({"out": Out(1), "body": {"x": 1}}, "int is not a spec"),
    ({"out": Out(1), "body": "x"}, "str is not a spec"),
    ({"out": Out(1), "body": In(1)}, "name of an argument"),
    ({"out": Out(1), "body": {"x": In("1")}}, "a dimension is an integer"),
    ({"out": Out(1), "body": {"x": In(3, 3)}}, "out of range"),
    ({"out": Out(1), "body": {"x": Partial(1, "texts")}}, 'no argument.*"texts"'),
    ({"out": Out(1), "body": {"x": Partial(1, -3)}}, "text_len_source is -3"),
    ({"body.blocks.0": {"x": In(1)}, "body.blocks.*": {"x": In(2)}}, "contradicts"),
    ({3: {"x": In(1)}}, "a module path is a string"),
    ([In(1)], "a plan is a dictionary"),
    (None, "a plan is a dictionary"),
]


@pytest.mark.parametrize(("plan", "problem"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_a_wrong_plan_is_refused_and_nothing_is_attached(plan: Any, problem: str) -> None:
    model = Deep()
    with pytest.raises(PlanError, match=f"(?s){problem}"):
        apply_sequence_parallel(model, SequenceParallelConfig(), plan)
    assert bare(model)


def test_hooks_are_not_applied_twice() -> None:
    model = Deep()
    apply_sequence_parallel(model, None, {"": {"x": In(1)}})
    before = names_of(model)
    with pytest.raises(PlanError, match="remove them first"):
        apply_sequence_parallel(model, None, PLAN)
    assert names_of(model) == before


def test_nothing_stays_attached_where_a_module_refuses() -> None:
    """One module of the plan has a registry that does not take the hook."""
    model = Deep()

    class Never(HookRegistry):
        def register_hook(self, name, hook):
            raise RuntimeError("never")

    Never(model.out)._attach()
    with pytest.raises(RuntimeError, match="never"):
        apply_sequence_parallel(model, None, PLAN)
    assert names_of(model) == {}
    assert bare(model.body)


# --- with the plan of the model ---------------------------------------------------------------------------------------


class Planned(Deep):
    _sp_plan: ClassVar = {"": {"x": In(1)}, "out": Out(1)}


def test_enable_and_disable_read_the_plan_of_the_model() -> None:
    model = Planned()
    enable_sequence_parallel_for_model(model)
    assert names_of(model) == {"": ["sp_input---"], "out": ["sp_output---out"]}
    disable_sequence_parallel_for_model(model)
    assert bare(model)


def test_a_model_without_a_plan() -> None:
    model = Deep()
    with pytest.raises(ValueError, match="Deep has no _sp_plan"):
        enable_sequence_parallel_for_model(model)
    disable_sequence_parallel_for_model(model)
    assert bare(model)
    with pytest.raises(ValueError, match="no hooks of sequence parallelism"):
        report_of(model)


def _degrees(rank: int, size: int) -> list[Any]:
    """Of a configuration left out, and of one that does not match."""
    model = Planned()
    enable_sequence_parallel_for_model(model)
    found: list[Any] = [model.out._hook_registry.get_hook("sp_output---out").config]
    model(x(5))
    found.append(report_of(model).attentions[0].method)
    disable_sequence_parallel_for_model(model)
    for wrong in (SequenceParallelConfig(ulysses_degree=4), SequenceParallelConfig(ring_degree=1)):
        with pytest.raises(OptionError, match=f"the group has {size} ranks"):
            enable_sequence_parallel_for_model(model, wrong)
        assert bare(model)
    return found


def test_degrees_come_from_the_process_group(ranks) -> None:
    for seen in ranks(2).run(_degrees):
        assert seen == [SequenceParallelConfig(ulysses_degree=2), "ulysses"]


def test_without_a_process_group_the_first_call_asks_for_it() -> None:
    """Hooks may be attached before ``init_process_group``."""
    model = Planned()
    enable_sequence_parallel_for_model(model, SequenceParallelConfig(ulysses_degree=2))
    hook = model.out._hook_registry.get_hook("sp_output---out")
    assert hook.config == SequenceParallelConfig(ulysses_degree=2)
    with pytest.raises(OptionError, match="is the process group initialized"):
        model(x(5))
    disable_sequence_parallel_for_model(model)
    assert bare(model)


# --- one hook by itself -----------------------------------------------------------------------------------------------


def test_metadata_of_hooks() -> None:
    config = SequenceParallelConfig(ulysses_degree=2)
    hook = SequenceParallelSplitHook({"x": In(1)}, config)
    assert (hook.metadata, hook.config, hook.module_forward_metadata) == ({"x": In(1)}, config, None)
    module = Two()
    assert hook.initialize_hook(module) is module
    assert isinstance(hook.module_forward_metadata, ModuleForwardMetadata)
    gather = SequenceParallelGatherHook([Out(1), None], config)
    assert (gather.metadata, gather.config) == ([Out(1), None], config)
    assert SequenceParallelGatherHook(Out(1), config).metadata == [Out(1)]


def test_places_of_arguments() -> None:
    class Takes(nn.Module):
        def forward(self, x, y=None, *, z=None):
            return x

    find = ModuleForwardMetadata(_cls=Takes)._get_parameter_from_args_kwargs
    assert find("x", (1,)) == (1, False, 0)
    assert find("y", (1, 2), {}) == (2, False, 1)
    assert find("y", (1,), {"y": 3}) == (3, True, None)
    assert find("y", (1,), None) == (None, False, 1)
    assert find("z", (1,), {}) == (None, False, 2)
    with pytest.raises(ValueError, match='no argument "w"'):
        find("w", (1,), {})


def _by_themselves(rank: int, size: int) -> list[Any]:
    """Hooks that are registered without a plan: local numbers between a split and a gather."""
    config = SequenceParallelConfig(ulysses_degree=size)
    model = Body(1)
    block = model.blocks[0]
    whole = copy.deepcopy(block)
    registry = HookRegistry.get_or_create(block)
    registry.register_hook("split", SequenceParallelSplitHook({"x": In(1, 3)}, config))
    local = block(x(5))
    expected = whole(x(5))
    rows = -(-5 // size)
    own = expected[:, rank * rows : (rank + 1) * rows]
    found = [local.shape[1] == rows, bool(np.allclose(local.detach().numpy()[:, : own.shape[1]], own.detach().numpy()))]
    own = torch.cat([own, own[:, -1:].expand(-1, rows - own.shape[1], -1)], 1)  # a pad is a copy of the last row
    found += [torch.allclose(local, own, atol=1e-6), not torch.equal(local, own + 1)]
    registry.register_hook("gather", SequenceParallelGatherHook(Out(1), config))
    return [*found, torch.allclose(block(x(5)), expected, atol=1e-6), type(block(x(5))) is torch.Tensor]


def test_hooks_without_a_plan(ranks) -> None:
    assert ranks(2).run(_by_themselves) == [[True] * 6] * 2


# --- state ------------------------------------------------------------------------------------------------------------


def _separate(rank: int, size: int) -> list[bool]:
    """Two models, a copy, and three threads; each has its own lengths and reports."""
    first, second = Planned(), Prepared(tuple)
    plan = {"prepare": {0: In(1, 3, split_output=True), 1: In(0, split_output=True)}}
    whole = [copy.deepcopy(first), copy.deepcopy(second)]
    enable_sequence_parallel_for_model(first)
    apply_sequence_parallel(second, SequenceParallelConfig(ring_degree=size), plan)
    twin = copy.deepcopy(first)
    third = pickle.loads(pickle.dumps(first))
    same = lambda model, other, n: torch.allclose(model(x(n)), other(x(n)), atol=1e-6)  # noqa: E731
    found = [same(first, whole[0], 7), same(second, whole[1], 3), same(twin, whole[0], 4), same(third, whole[0], 9)]
    found += [same(first, whole[0], 7), report_of(first) is not report_of(twin)]
    methods = [{record.method for record in report_of(model).attentions} for model in (first, second, twin, third)]
    found.append(methods == [{"ulysses"}, {"ring"}, {"ulysses"}, {"ulysses"}])
    disable_sequence_parallel_for_model(twin)
    found += [same(first, whole[0], 2), bare(twin)]
    results: dict[int, bool] = {}
    turn = threading.Lock()

    def work(number: int) -> None:
        # The call of one thread is under way (its length is known) while another thread calls without hooks.
        with turn:
            results[number] = same(first, whole[0], 3 + number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:  # collectives in the same order on every rank
        thread.start()
        thread.join()
    return [*found, *results.values()]


def test_models_copies_and_threads_share_nothing(ranks) -> None:
    for seen in ranks(2).run(_separate):
        assert all(seen), seen
