"""What code written for vLLM-Omni's hooks of sequence parallelism relies on: names, errors, and plans of today."""

from __future__ import annotations

import copy
import importlib
import inspect
import types
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import fxsp
from annotating import Model as Annotated
from annotating import refused, run
from fxsp import hooks
from fxsp.errors import PlanError
from fxsp.hooks import (
    HookRegistry,
    ModelHook,
    SequenceParallelSplitHook,
    apply_sequence_parallel,
    enable_sequence_parallel_for_model,
    get_sp_plan_from_model,
    module_has_active_hooks,
    remove_sequence_parallel,
    validate_sp_plan,
)
from fxsp.hooks.sequence_parallel import (
    _SP_INPUT_HOOK_TEMPLATE,
    _SP_OUTPUT_HOOK_TEMPLATE,
    _get_submodule_by_name,
)
from fxsp.plan import SequenceParallelConfig, parse_plan
from hook_parts_base import Deep, In, Out, Partial, x

#: Module of vLLM-Omni -> module here and the names that it has.
NAMES = {
    "fxsp.hooks": "StateManager ModelHook HookRegistry module_has_active_hooks SequenceParallelSplitHook "
    "SequenceParallelGatherHook apply_sequence_parallel remove_sequence_parallel",
    "fxsp.hooks.base": "BaseState StateManager ModelHook HookRegistry module_has_active_hooks",
    "fxsp.hooks.sequence_parallel": "ModuleForwardMetadata SequenceParallelSplitHook SequenceParallelGatherHook "
    "apply_sequence_parallel remove_sequence_parallel enable_sequence_parallel_for_model "
    "disable_sequence_parallel_for_model _get_submodule_by_name _SP_INPUT_HOOK_TEMPLATE _SP_OUTPUT_HOOK_TEMPLATE",
    "fxsp.hooks.sp_plan": "SequenceParallelConfig SequenceParallelInput SequenceParallelOutput "
    "SequenceParallelPartialInput AnySequenceParallelInput SequenceParallelInputType SequenceParallelOutputType "
    "SequenceParallelModelPlan validate_sp_plan get_sp_plan_from_model",
}


@pytest.mark.parametrize("module", NAMES)
def test_names(module: str) -> None:
    found = importlib.import_module(module)
    assert [name for name in NAMES[module].split() if not hasattr(found, name)] == []


# --- plans without a model


def test_plans_that_are_valid() -> None:
    validate_sp_plan({})
    validate_sp_plan(
        {
            "": {"x": In(1, 3, auto_pad=True, shard_group="image", clone_shard=True), "texts": [In(1), Partial(1, 3)]},
            "rope": {0: In(1, 4, split_output=True), 1: Partial(0, "txt_ids", 2, split_output=True)},
            "proj_out": Out(1, 3, shard_group="image"),
            "pair": [Out(1), None],
        }
    )


GROUPED: dict[str, Any] = {"split_output": True, "auto_pad": True, "shard_group": "image"}


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("not a dict", "must be a dict"),
        ([In(1)], "must be a dict"),
        ({123: {"x": In(1)}}, "keys must be strings"),
        ({"rope": {0: In(1)}}, "split_output=True"),
        ({"prepare": {0: In(1, split_output=True, shard_group="image")}}, "requires auto_pad=True"),
        ({"a": {0: In(1, **GROUPED)}, "b": {0: In(1, **GROUPED)}}, "multiple split boundaries"),
        ({"a": {"x": "x"}}, "is not a spec"),
        ({"a": {1.5: In(1)}}, "neither an argument name nor an output index"),
    ],
)
def test_plans_that_are_not(plan: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate_sp_plan(plan)


@pytest.mark.parametrize("plan", [{3: {"x": In(1)}}, [In(1)]])
def test_the_compiler_says_the_same(plan: Any) -> None:
    with pytest.raises(PlanError, match=r"must be a dict|keys must be strings"):
        parse_plan(plan)


def test_the_plan_of_a_model() -> None:
    class Planned(Deep):
        _sp_plan: ClassVar[Any] = {"body": {"x": In(1)}}

    assert get_sp_plan_from_model(Planned()) is Planned._sp_plan
    assert get_sp_plan_from_model(Deep()) is None
    Planned._sp_plan = {"body": {"x": In(1, shard_group="image")}}
    for read in (get_sp_plan_from_model, enable_sequence_parallel_for_model):
        model = Planned()
        with pytest.raises(ValueError, match="requires auto_pad=True"):
            read(model)
        assert not any(module_has_active_hooks(module) for module in model.modules())


def test_a_foreign_entry_keeps_its_fields() -> None:
    theirs = types.SimpleNamespace(
        split_dim=1, expected_dims=3, split_output=False, auto_pad=True, shard_group="image", clone_shard=True
    )
    (entry,) = parse_plan({"": {"x": theirs}})
    assert entry.spec == In(1, 3, auto_pad=True, shard_group="image", clone_shard=True)


# --- modules by name


def test_modules_by_name() -> None:
    model = Deep()
    model.outputs = nn.ModuleDict({"main": nn.Linear(2, 2), "aux": nn.Sequential(nn.ReLU(), nn.Linear(2, 1))})
    assert _get_submodule_by_name(model, "") is model
    assert _get_submodule_by_name(model, "body.blocks.1") is model.body.blocks[1]
    assert _get_submodule_by_name(model, "body.blocks.*") == list(model.body.blocks)
    assert _get_submodule_by_name(model, "body.blocks.*.ff.0") == [block.ff[0] for block in model.body.blocks]
    assert _get_submodule_by_name(model, "outputs.main") is model.outputs["main"]
    assert _get_submodule_by_name(model, "outputs.aux.1") is model.outputs["aux"][1]
    for name, message in [
        ("nonexistent", "not a submodule"),
        ("outputs.mian", "(?s)not a submodule.*outputs.main"),
        ("a.*.b.*", "only be used once"),
        ("outputs.*", "ModuleList"),
    ]:
        with pytest.raises(ValueError, match=message):
            _get_submodule_by_name(model, name)
        with pytest.raises(ValueError, match=message):
            apply_sequence_parallel(model, SequenceParallelConfig(), {name: {"x": In(1)}})


class Outputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.outputs = Deep(), nn.ModuleDict({"main": nn.Linear(3, 2), "aux": nn.Linear(3, 1)})

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.outputs["main"](y) + self.outputs["aux"](y)


def test_names_of_hooks_and_whether_there_are_any() -> None:
    model = Outputs()
    plan = {"body": {"x": In(1)}, "outputs.main": Out(1)}
    assert not module_has_active_hooks(model.body)
    apply_sequence_parallel(model, SequenceParallelConfig(), plan)
    assert _SP_INPUT_HOOK_TEMPLATE.format("body") in HookRegistry.get_or_create(model.body).names
    assert _SP_OUTPUT_HOOK_TEMPLATE.format("outputs.main") in HookRegistry.get_or_create(model.outputs["main"]).names
    assert module_has_active_hooks(model.body)
    assert not module_has_active_hooks(model.outputs["aux"])
    remove_sequence_parallel(model, plan)
    assert not any(module_has_active_hooks(module) for module in model.modules())


def test_a_registry_without_hooks_is_not_active() -> None:
    model = nn.Linear(2, 2)
    registry = HookRegistry.get_or_create(model)
    assert not module_has_active_hooks(model)
    registry.register_hook("mine", ModelHook())
    assert module_has_active_hooks(model)
    registry.remove_hook("mine")
    assert not module_has_active_hooks(model)


def test_other_methods_go_through_hooks() -> None:
    class Coder(nn.Linear):
        def decode(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return self.weight.sum() * x * scale

    class Add(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return (args[0] + 1, *args[1:]), kwargs

    model, value = Coder(2, 2), torch.ones(2)
    expected, before = model.decode(value + 1, scale=2.0), model.decode(value)
    registry = HookRegistry.get_or_create(model)
    registry.wrap_method("decode")
    registry.wrap_method("decode")
    assert torch.equal(model.decode(value), before)
    registry.register_hook("add", Add())
    for one in (model, copy.deepcopy(model)):
        assert torch.equal(one.decode(value, scale=2.0), expected)
    assert list(inspect.signature(model.decode).parameters) == ["x", "scale"]
    registry.unwrap_all_methods()
    assert torch.equal(model.decode(value), before)
    assert "decode" not in vars(model)
    registry.wrap_method("decode")
    registry.reset()
    assert set(vars(model)) == set(vars(Coder(2, 2)))


# --- on ranks


class Lists(nn.Module):
    """A list of sequences, each with a length of its own, and some without tokens."""

    def forward(self, x: Tensor, references: list[Tensor]) -> tuple[Tensor, Tensor]:
        return x * 2, torch.stack([reference.sum(1) for reference in references]).sum(0)


def _lists(rank: int, size: int) -> list[Any]:
    model = Lists()
    value, references = x(5), [x(4), x(7), x(3)[:, :0]]
    expected = model(value, references)
    apply_sequence_parallel(model, None, {"": {"x": In(1), "references": [In(1), In(1), In(1)]}})
    out = model(value, references)
    same = all(torch.allclose(a, b, atol=1e-5) for a, b in zip(out, expected, strict=True))
    try:
        model(value, references[:2])
    except ValueError as error:
        return [same, str(error)]
    return [same, ""]


def test_lists_of_entries(ranks) -> None:
    for same, message in ranks(2).run(_lists):
        assert same
        assert '"references" has 2 values, and the plan lists 3 specs' in message


def test_lists_of_entries_compiled() -> None:
    plan = {"": {"x": In(1), "references": [In(1), In(1), None]}}
    evidence = fxsp.verify(Lists(), x(5), [x(4), x(7), x(3)], world_size=(2, 3), options={"plan": plan})
    assert evidence.ok, str(evidence)
    report = fxsp.explain(Lists(), x(5), [x(4), x(7), x(3)], world_size=2, plan=plan)
    assert [record.applied for record in report.plan] == [True, True, True]


def _memory(rank: int, size: int) -> list[bool]:
    """Of shards by themselves: whether they have memory of their own, and the gradient of one."""
    config = SequenceParallelConfig(ulysses_degree=size)
    found = []
    for tokens in (6, 5):
        for clone in (False, True):
            model = nn.Identity()
            registry = HookRegistry.get_or_create(model)
            registry.register_hook("split", SequenceParallelSplitHook({"input": In(1, clone_shard=clone)}, config))
            whole = x(tokens).detach().requires_grad_()
            local = model(whole)
            storage = local.untyped_storage()
            found.append(storage.data_ptr() != whole.untyped_storage().data_ptr())
            found.append(storage.nbytes() == local.numel() * local.element_size())
    empty = x(3)[:, :0]
    return [*found, model(empty) is empty, model(x(3)[:0]).shape[1] == 2]


def test_shards_own_their_memory_and_empty_values_stay_whole(ranks) -> None:
    assert ranks(2).run(_memory) == [[True] * 10] * 2


class Groups(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.prepare, self.out = Deep(), nn.Identity()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = self.prepare.body(x), self.prepare.body(y)
        return self.out(a.cumsum(1)) + b.sum(1, keepdim=True)


def _groups(rank: int, size: int) -> list[str]:
    entry = In(1, auto_pad=True, shard_group="image")
    found = []
    for plan, second in (
        ({"": {"x": entry, "y": entry}, "out": Out(1, shard_group="image")}, 5),
        ({"": {"x": entry, "y": entry}, "out": Out(1, shard_group="image")}, 6),
        ({"": {"x": entry}, "out": Out(1, shard_group="text")}, 5),
    ):
        torch.manual_seed(0)
        model = Groups()
        expected = model(x(5), x(second))
        apply_sequence_parallel(model, None, plan)
        try:
            found.append(str(torch.allclose(model(x(5), x(second)), expected, atol=1e-5)))
        except (ValueError, RuntimeError) as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def test_groups_have_one_length_and_gathers_a_group_that_was_split(ranks) -> None:
    for right, lengths, missing in ranks(2).run(_groups):
        assert right == "True"
        assert lengths.startswith("PlanError")
        assert "same global sequence length" in lengths
        assert "5 and 6 tokens" in lengths
        assert missing.startswith("RuntimeError")
        assert "shard_group='text'" in missing


# --- the same entries, compiled


def test_the_compiler_reads_the_same_entries() -> None:
    model = Outputs()
    plan = {"body": {"x": In(1, auto_pad=True, shard_group="image", clone_shard=True)}, "outputs.main": Out(1)}
    evidence = fxsp.verify(model, x(5).float(), world_size=(2, 3), options={"plan": plan})
    assert evidence.ok, str(evidence)
    report = fxsp.explain(model, x(5).float(), world_size=2, plan=plan)
    assert [record.applied for record in report.plan] == [True, True]


def test_the_compiler_leaves_an_empty_sequence_whole() -> None:
    class Joined(nn.Module):
        def forward(self, x: Tensor, more: Tensor) -> Tensor:
            return torch.cat([x, more], 1).cumsum(1)

    plan = {"": {"x": In(1), "more": In(1)}}
    evidence = fxsp.verify(Joined(), x(5), x(3)[:, :0], world_size=2, options={"plan": plan})
    assert evidence.ok, str(evidence)
    report = fxsp.explain(Joined(), x(5), x(3)[:, :0], world_size=2, plan=plan)
    assert [(record.applied, "is empty" in record.detail) for record in report.plan] == [(True, False), (False, True)]


def test_the_compiler_refuses_lengths_that_differ_in_a_group() -> None:
    entry = In(1, auto_pad=True, shard_group="image")
    assert "same global sequence length" not in str(run({"": {"x": entry}}, model=Annotated()))

    class Lengths(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return self.two(x, x[:, 1:])

        def __init__(self) -> None:
            super().__init__()
            self.two = Sums()

    class Sums(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x.sum(1) + y.sum(1)

    message = refused({"two": {"x": entry, "y": entry}}, model=Lengths())
    assert "same global sequence length" in message
    assert "shard_group='image'" in message


def test_all_is_in_the_documented_list() -> None:
    assert set(hooks.__all__) >= {"validate_sp_plan", "get_sp_plan_from_model", "module_has_active_hooks"}
