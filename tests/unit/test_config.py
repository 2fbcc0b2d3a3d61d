from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from distributed import Pool
from fxsp.config import AttentionDegrees, Options, resolve_degrees, resolve_ranks
from fxsp.errors import OptionError, PlanError
from fxsp.plan import SequenceParallelConfig, SequenceParallelInput
from fxsp.types import Ranks


def test_defaults() -> None:
    options = Options.parse()
    assert options == Options()
    assert (options.inner, options.grad_reduce, options.strict, options.print) == ("inductor", "all_reduce", False, ())


def test_values_are_kept_in_parsed_form() -> None:
    options = Options.parse(
        {"plan": {"b": {"x": SequenceParallelInput(1)}}, "print": "partitioned", "inner": "eager", "strict": True}
    )
    assert [str(entry) for entry in options.plan or ()] == ["b[x]: SequenceParallelInput(split_dim=1)"]
    assert (options.print, options.inner, options.strict) == (("partitioned",), "eager", True)
    assert Options.parse({"print": ["a", "b"]}).print == ("a", "b")
    assert Options.parse({}, mode="max-autotune").mode == "max-autotune"
    assert Options.parse({"mode": "max-autotune"}, mode="max-autotune").mode == "max-autotune"


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (3, ["options is a dictionary, not int", "ulysses_degree, ring_degree"]),
        ({"uly_degree": 2}, ["unknown option 'uly_degree'", 'mean "ulysses_degree"', "Valid options: ulysses_degree,"]),
        ({"inner": "inductr"}, ["'inner' is 'inductr'", "'inductor', 'aot_eager', 'eager'", 'mean "inductor"']),
        ({"inner": ["eager"]}, ["'inner' is ['eager']"]),
        ({"grad_reduce": "sum"}, ["'all_reduce', 'defer'"]),
        ({"mode": "max-autotun"}, ["'reduce-overhead'", 'mean "max-autotune"']),
        ({"strict": 1}, ["'strict' is 1; it must be True or False"]),
        ({"verify": None}, ["'verify' is None"]),
        ({"check_inputs": "yes"}, ["True or False"]),
        ({"ulysses_degree": 0}, ["'ulysses_degree' is 0", "at least 1"]),
        ({"ring_degree": True}, ["'ring_degree' is True"]),
        ({"ring_degree": "2"}, ["'ring_degree' is '2'"]),
        ({"group": "world"}, ["'group' is 'world'", "ProcessGroup"]),
        ({"mesh": 4}, ["'mesh' is 4", "DeviceMesh"]),
        ({"print": 3}, ["'print' is 3", "name of a stage"]),
        ({"print": [3]}, ["name of a stage"]),
        ({"config": {"ulysses_degree": 2}}, ["'config'", "a SequenceParallelConfig"]),
        (
            {"config": SequenceParallelConfig(ulysses_degree=2), "ulysses_degree": 4},
            ["'ulysses_degree' is 4, but config says 2"],
        ),
    ],
)
def test_errors_list_what_is_valid(options: Any, parts: list[str]) -> None:
    with pytest.raises(OptionError) as error:
        Options.parse(options)
    for part in parts:
        assert part in str(error.value)


def test_a_plan_that_cannot_be_read_is_a_plan_error() -> None:
    with pytest.raises(PlanError, match="a plan is a dictionary"):
        Options.parse({"plan": 3})


def test_mode_is_given_once() -> None:
    with pytest.raises(OptionError, match="mode is given twice"):
        Options.parse({"mode": "default"}, mode="max-autotune")


@pytest.mark.parametrize(
    ("options", "size", "degrees"),
    [
        ({}, 4, AttentionDegrees()),
        ({"ulysses_degree": 2}, 4, AttentionDegrees(2, 2, 1)),
        ({"ring_degree": 4}, 4, AttentionDegrees(1, 4, 1)),
        ({"ulysses_degree": 3, "ring_degree": 2}, 6, AttentionDegrees(3, 2, 1)),
        ({"ulysses_degree": 1}, 1, AttentionDegrees(1, 1, 1)),
        ({"config": SequenceParallelConfig(2, 2)}, 4, AttentionDegrees(2, 2, 1)),
        ({"config": SequenceParallelConfig(allgather_degree=3)}, 3, AttentionDegrees(1, 1, 3)),
    ],
)
def test_degrees(options: Any, size: int, degrees: AttentionDegrees) -> None:
    assert resolve_degrees(Options.parse(options), size) == degrees


@pytest.mark.parametrize(
    ("options", "size", "parts"),
    [
        ({"ulysses_degree": 2}, 3, ["ulysses_degree=2", "3 ranks", "(1, 3), (3, 1)"]),
        ({"ulysses_degree": 2, "ring_degree": 2}, 2, ["ulysses_degree=2 * ring_degree=2", "(1, 2), (2, 1)"]),
        ({"ulysses_degree": 2, "ring_degree": 1}, 4, ["4 ranks"]),
        ({"ring_degree": 2}, 1, ["1 rank.", "torchrun"]),
        ({"config": SequenceParallelConfig(4, 2)}, 4, ["is for 8 ranks", "(2, 2)"]),
    ],
)
def test_degrees_that_do_not_match(options: Any, size: int, parts: list[str]) -> None:
    with pytest.raises(OptionError) as error:
        resolve_degrees(Options.parse(options), size)
    for part in parts:
        assert part in str(error.value)


def test_without_a_process_group_there_is_one_rank() -> None:
    assert resolve_ranks(Options.parse()) == Ranks(0, 1, "")
    with pytest.raises(OptionError, match="torchrun"):
        resolve_ranks(Options.parse({"ulysses_degree": 2}))


def test_the_configs_of_diffusers_are_accepted_or_refused() -> None:
    from diffusers import ContextParallelConfig, ParallelConfig

    theirs = ContextParallelConfig(ulysses_degree=2, ring_degree=2)
    for config in (theirs, ParallelConfig(context_parallel_config=theirs)):
        assert Options.parse({"config": config}).config == SequenceParallelConfig(2, 2)
    theirs.mesh = object()
    with pytest.raises(OptionError, match="its mesh is not read"):
        Options.parse({"config": theirs})
    with pytest.raises(OptionError, match="tensor_parallel_config is not supported"):
        Options.parse({"config": types.SimpleNamespace(context_parallel_config=None, tensor_parallel_config=object())})


def test_a_config_of_the_same_fields_is_accepted() -> None:
    class Theirs:
        ulysses_degree = 1
        ring_degree = 2
        convert_to_fp32 = False

    assert Options.parse({"config": Theirs()}).config == SequenceParallelConfig(1, 2, 1, False)
    Theirs.ring_degree = 0
    with pytest.raises(OptionError, match="ring_degree is 0"):
        Options.parse({"config": Theirs()})


def _in_processes(rank: int, size: int) -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh

    world = resolve_ranks(Options.parse({"ulysses_degree": 2}))
    assert (world.rank, world.size, world.group) == (rank, size, dist.group.WORLD.group_name)  # type: ignore[union-attr]
    alone = dist.new_group([0])
    errors = []
    try:
        assert resolve_ranks(Options.parse({"group": alone})).size == 1
    except (OptionError, ValueError) as error:
        errors.append(str(error))
    flat, square = init_device_mesh("cpu", (size,)), init_device_mesh("cpu", (1, size), mesh_dim_names=("dp", "sp"))
    assert resolve_ranks(Options.parse({"mesh": flat})).rank == rank
    assert resolve_ranks(Options.parse({"mesh": square["sp"]})).size == size
    for options in ({"mesh": square}, {"mesh": flat, "group": dist.group.WORLD}, {"ulysses_degree": 3}):
        try:
            resolve_ranks(Options.parse(options))
        except OptionError as error:
            errors.append(str(error))
    return errors


def test_group_and_mesh(ranks: Callable[[int], Pool]) -> None:
    first, second = ranks(2).run(_in_processes)
    assert "2 dimensions of sizes (1, 2)" in first[0]
    assert "mesh['sp']" in first[0]
    assert "'group' and 'mesh' both name the ranks" in first[1]
    assert "(1, 2), (2, 1)" in first[2]
    assert "this process is no member of the group" in second[0]
    assert second[1:] == first
