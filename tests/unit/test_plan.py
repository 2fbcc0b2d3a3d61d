from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxsp.plan as p
from fxsp.capture.resolve import forward_signature, resolve_plan, submodules, unwrap
from fxsp.errors import PlanError
from fxsp.plan import (
    PlanEntry,
    SequenceParallelConfig,
    SequenceParallelInput,
    SequenceParallelOutput,
    SequenceParallelPartialInput,
    find_plan,
    owns_plan,
    parse_plan,
)

X = SequenceParallelInput(split_dim=1)


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


class Attention(nn.Module):
    @decorated
    def forward(self, hidden_states: torch.Tensor, rotary_emb: Any = None) -> torch.Tensor:
        return hidden_states


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        return self.attn(hidden_states)


class Open(nn.Module):
    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return x


class Model(nn.Module):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.rope = nn.Identity()
        self.blocks = nn.ModuleList([Block() for _ in range(layers)])
        self.open = Open()
        self.proj_out = nn.Linear(4, 4)

    def forward(self, hidden_states: torch.Tensor, txt_ids: torch.Tensor) -> torch.Tensor:
        return hidden_states


def refused(plan: Any, model: nn.Module | None = None) -> str:
    with pytest.raises(PlanError) as error:
        resolve_plan(parse_plan(plan), Model() if model is None else model)
    return str(error.value)


# --- the dictionary form


def test_specs_show_what_is_not_default() -> None:
    assert repr(SequenceParallelInput(1)) == "SequenceParallelInput(split_dim=1)"
    assert repr(SequenceParallelInput(0, 3, True)) == (
        "SequenceParallelInput(split_dim=0, expected_dims=3, split_output=True)"
    )
    assert repr(SequenceParallelOutput(1, shard_group="img")) == (
        "SequenceParallelOutput(gather_dim=1, shard_group='img')"
    )
    assert repr(SequenceParallelPartialInput(0, "txt_ids")) == (
        "SequenceParallelPartialInput(split_dim=0, text_len_source='txt_ids')"
    )


def test_every_form_becomes_rows() -> None:
    rows = parse_plan(
        {
            "": {"hidden_states": X},
            "rope": {0: SequenceParallelInput(0, 2, split_output=True)},
            "blocks.*": {"rotary_emb": [X, None, X]},
            "pair": [SequenceParallelOutput(1), None, SequenceParallelOutput(2)],
            "proj_out": SequenceParallelOutput(gather_dim=-1),
        }
    )
    assert [str(row) for row in rows] == [
        "<root>[hidden_states]: SequenceParallelInput(split_dim=1)",
        "rope[0]: SequenceParallelInput(split_dim=0, expected_dims=2, split_output=True)",
        "blocks.*[rotary_emb][0]: SequenceParallelInput(split_dim=1)",
        "blocks.*[rotary_emb][2]: SequenceParallelInput(split_dim=1)",
        "pair[0]: SequenceParallelOutput(gather_dim=1)",
        "pair[2]: SequenceParallelOutput(gather_dim=2)",
        "proj_out: SequenceParallelOutput(gather_dim=-1)",
    ]
    assert [row.kind for row in rows] == ["shard"] * 4 + ["gather"] * 3
    assert rows[2].part == (0, 3)
    assert parse_plan(rows) == rows
    assert len(set(rows)) == len(rows)


def test_specs_of_diffusers_are_read_by_their_fields() -> None:
    diffusers = pytest.importorskip("diffusers.models._modeling_parallel")
    rows = parse_plan(
        {
            "blocks.0": {"hidden_states": diffusers.ContextParallelInput(split_dim=1, expected_dims=3)},
            "rope": {1: diffusers.ContextParallelInput(split_dim=0, split_output=True)},
            "proj_out": diffusers.ContextParallelOutput(gather_dim=1, expected_dims=3),
        }
    )
    assert [row.spec for row in rows] == [
        SequenceParallelInput(1, 3),
        SequenceParallelInput(0, split_output=True),
        SequenceParallelOutput(1, 3),
    ]


@pytest.mark.parametrize(
    ("plan", "parts"),
    [
        ([X], ["a plan is a dictionary", "not list"]),
        ({3: {"x": X}}, ["plan key 3", "a module path is a string"]),
        ({"rope": {0: X}}, ["rope[0]", "split_output=True"]),
        ({"rope": {0: [X, X]}}, ["rope[0]", "an output index takes one spec"]),
        ({"rope": {-1: SequenceParallelInput(0, split_output=True)}}, ["rope[-1]", "not negative"]),
        ({"rope": {1.5: X}}, ["rope[1.5]", "neither an argument name nor an output index"]),
        ({"rope": {True: X}}, ["neither an argument name nor an output index"]),
        ({"b": {"x": SequenceParallelInput(0, split_output=True)}}, ["b[x]", "use an output index instead of 'x'"]),
        ({"b": {"x": SequenceParallelOutput(0)}}, ["b[x]", "an argument cannot be gathered"]),
        ({"b": X}, ["b: SequenceParallelInput(split_dim=1)", "needs the name of an argument"]),
        ({"b": {"x": 1}}, ["b[x]: 1", "int is not a spec", "SequenceParallelInput", "ContextParallelInput"]),
        ({"b": {"x": {"split_dim": 1}}}, ["dict is not a spec"]),
        ({"b": {"x": SequenceParallelInput("1")}}, ["split_dim is '1'"]),  # type: ignore[arg-type]
        ({"b": {"x": SequenceParallelInput(True)}}, ["split_dim is True"]),
        ({"b": SequenceParallelOutput(None)}, ["gather_dim is None"]),  # type: ignore[arg-type]
        ({"b": {"x": SequenceParallelInput(3, 3)}}, ["split_dim=3 is out of range for expected_dims=3: -3..2"]),
        ({"b": {"x": SequenceParallelInput(-4, 3)}}, ["split_dim=-4 is out of range"]),
        ({"b": {"x": SequenceParallelInput(0, 0)}}, ["expected_dims is 0"]),
        ({"b": {"x": SequenceParallelPartialInput(0, -1)}}, ["text_len_source is -1"]),
        ({"b": {"x": SequenceParallelPartialInput(0, 1.5)}}, ["text_len_source is 1.5"]),  # type: ignore[arg-type]
    ],
)
def test_a_plan_without_meaning_is_refused(plan: Any, parts: list[str]) -> None:
    with pytest.raises(PlanError) as error:
        parse_plan(plan)
    for part in parts:
        assert part in str(error.value)


def test_the_plan_is_the_options_else_the_models() -> None:
    model = Model()
    assert find_plan(model) is None
    assert not owns_plan(model)
    model._cp_plan = {"a": 1}
    assert find_plan(model) == {"a": 1}
    model._sp_plan = {"b": 1}
    assert find_plan(model) == {"b": 1}
    assert owns_plan(model)
    assert find_plan(model, {}) == {}

    class Carrier(Model):
        _sp_plan = None
        _cp_plan = {"c": 1}  # noqa: RUF012

    assert find_plan(Carrier()) == {"c": 1}


# --- modules and arguments


def test_patterns_find_modules() -> None:
    model = Model()
    rows = resolve_plan(
        parse_plan({"": {"txt_ids": X}, "blocks.*.attn": {"hidden_states": X}, "open": {"anything": X}}), model
    )
    assert [row.path for row in rows] == ["", "blocks.0.attn", "blocks.1.attn", "blocks.2.attn", "open"]
    assert rows[2].module is model.blocks[1].attn
    assert str(rows[2]) == "blocks.1.attn[hidden_states]: SequenceParallelInput(split_dim=1)"


@pytest.mark.parametrize(
    ("plan", "parts"),
    [
        (
            {"blokcs.0": {"hidden_states": X}},
            [
                "`blokcs.0[hidden_states]: SequenceParallelInput(split_dim=1)`",
                'Model has no module "blokcs"',
                "Its modules: rope, blocks, open, proj_out",
                'Did you mean "blocks.0"?',
            ],
        ),
        ({"blocks.7": {"temb": X}}, ['"blocks" (ModuleList) has no module "7"', "Its modules: 0, 1, 2"]),
        ({"blocks.0.attention": {"x": X}}, ['"blocks.0" (Block)', "modules: attn", 'mean "blocks.0.attn"?']),
        ({"attn": {"x": X}}, ['Model has no module "attn"']),
        ({"proj_out.weight": SequenceParallelOutput(1)}, ['"proj_out" (Linear) has no module "weight"', "none"]),
        (
            {"blocks.*": {"hidden_stats": X}},
            [
                "`blocks.0[hidden_stats]: ",
                'Block.forward has no argument "hidden_stats"',
                "It has: hidden_states, temb",
                'Did you mean "hidden_states"?',
            ],
        ),
        ({"blocks.0.attn": {"rotary": X}}, ["Attention.forward", "It has: hidden_states, rotary_emb", "rotary_emb"]),
        ({"": {"self": X}}, ['Model.forward has no argument "self"', "It has: hidden_states, txt_ids"]),
        ({"*": {"x": X}}, ["`*` matches the children of a ModuleList", "Model is none", "Its modules: rope"]),
        ({"rope.*": {"x": X}}, ['"rope" (Identity) is none']),
        ({"blocks.*.attn.*": {"x": X}}, ["at most one `*`"]),
        ({"blocks": {"hidden_states": X}}, ["a ModuleList is never called itself", "`blocks.*[hidden_states]: "]),
        (
            {"blocks.0": {"temb": SequenceParallelPartialInput(0, "text_ids")}},
            [
                'text_len_source names no argument of Block.forward, nor of the model: "text_ids"',
                "They have: hidden_states, temb, txt_ids",
                'Did you mean "txt_ids"?',
            ],
        ),
        (
            {"blocks.0": {"temb": X}, "blocks.*": {"temb": SequenceParallelInput(2)}},
            [
                "`blocks.0[temb]: SequenceParallelInput(split_dim=2)`: it contradicts",
                "`blocks.0[temb]: SequenceParallelInput(split_dim=1)`",
            ],
        ),
        ({"blocks.0": {"temb": X}, "blocks.*": {"temb": X}}, ["it repeats the entry `blocks.0[temb]"]),
        (
            {"rope": {0: SequenceParallelInput(1, split_output=True)}, "ro" + "pe.": SequenceParallelOutput(1)},
            ["rope.:"],
        ),
    ],
)
def test_a_wrong_plan_says_what_exists(plan: Any, parts: list[str]) -> None:
    message = refused(plan)
    for part in parts:
        assert part in message


def test_one_output_cannot_be_split_and_gathered() -> None:
    rows = (
        PlanEntry("rope", 0, SequenceParallelInput(1, split_output=True)),
        PlanEntry("rope", None, SequenceParallelOutput(1)),
    )
    assert "it contradicts the entry `rope[0]: SequenceParallelInput" in refused(rows)


def test_entries_for_tensors_of_different_rank_do_not_contradict() -> None:
    plan = {
        "blocks.0": {"temb": SequenceParallelInput(1, expected_dims=2)},
        "blocks.*": {"temb": SequenceParallelInput(0, expected_dims=3)},
    }
    assert len(resolve_plan(parse_plan(plan), Model())) == 4


def test_a_shared_module_is_resolved_once() -> None:
    model = Model()
    model.blocks[2] = model.blocks[0]
    assert [row.path for row in resolve_plan(parse_plan({"blocks.*": {"temb": X}}), model)] == ["blocks.0", "blocks.1"]
    plan = {"blocks.0": {"temb": X}, "blocks.2": {"temb": X}}
    assert [row.path for row in resolve_plan(parse_plan(plan), model)] == ["blocks.0"]
    plan["blocks.2"] = {"temb": SequenceParallelInput(2)}
    assert "contradicts" in refused(plan, model)


def test_wrappers_have_no_name_in_a_path() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = Model()
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    outer = torch.compile(model, backend="eager")
    assert unwrap(outer) is model
    (row,) = resolve_plan(parse_plan({"blocks.0": {"temb": X}}), outer)
    assert isinstance(row.module, Block)
    assert [path for path, _ in submodules(outer)][:4] == ["", "rope", "blocks", "blocks.0"]


def test_the_signature_is_that_of_the_undecorated_forward() -> None:
    assert list(forward_signature(Attention()).parameters) == ["hidden_states", "rotary_emb"]


# --- the configuration


def test_config_has_the_degrees_of_vllm_omni() -> None:
    config = SequenceParallelConfig(ulysses_degree=4, ring_degree=2)
    assert (config.sequence_parallel_size, config.allgather_degree, config.convert_to_fp32) == (8, 1, True)
    assert SequenceParallelConfig(allgather_degree=3).sequence_parallel_size == 3
    assert SequenceParallelConfig().sequence_parallel_size == 1
    with pytest.raises(ValueError, match="ring_degree is 0"):
        SequenceParallelConfig(ring_degree=0)
    with pytest.raises(ValueError, match="excludes"):
        SequenceParallelConfig(allgather_degree=2, ulysses_degree=2)


def test_long_listings_are_shortened() -> None:
    assert p.listing(range(3)) == "0, 1, 2"
    assert p.listing([]) == "none"
    assert p.listing(range(30)).endswith("23, ... (6 more)")
