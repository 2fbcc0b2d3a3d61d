"""How often a value moves: one conversion per value, and gathers that nobody asked for, with their reasons."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.fx import GraphModule

from fxsp.errors import StrictError
from splitting import W, X, Y, implicit, tokens
from tracing import check, collectives, gather, graph_of, partition, shard

# One conversion per value.


def test_gather_then_shard_is_nothing() -> None:
    program = check(lambda x: torch.softmax(shard(gather(tokens(x))), -1), X)
    assert collectives(program) == {"gather": 1}
    assert not any("shard_default_1" in line for line in graph_of(program))


def test_an_output_that_the_plan_gathers_and_the_next_entry_shards() -> None:
    """Two blocks, each gathered and sharded by the plan: nothing moves between them."""

    def block(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return gather(F.linear(shard(x), w).relu())

    program = check(lambda x, w: block(block(block(x, w), w), w), X, W)
    assert collectives(program) == {"gather": 1}


def test_a_value_is_gathered_once() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        x = tokens(x)
        return x.cumsum(1) * x.flip(1) + x.roll(1, 1) + x[:, torch.tensor([4, 3, 2, 1, 0])]

    program = check(function, X)
    assert collectives(program) == {"gather": 1}
    (record,) = implicit(program)
    assert record.op == "aten.cumsum.default"


def test_a_value_is_gathered_once_for_views_of_it() -> None:
    """Keys against queries, and the same tokens whole: the transposed whole is a view of the whole."""

    def function(x: torch.Tensor) -> torch.Tensor:
        x = tokens(x)
        return x.cumsum(1) + (x @ x.transpose(1, 2)) @ x

    program = check(function, X)
    assert collectives(program) == {"gather": 2}
    assert [g.op for g in implicit(program)] == ["aten.cumsum.default"]


def test_a_value_is_gathered_once_for_shards_and_for_whole_operators() -> None:
    """In training the two have different gradients: one gather all the same."""

    def function(x: torch.Tensor) -> torch.Tensor:
        x = tokens(x)
        y = x.transpose(1, 2)
        return (x @ y).sum(2, keepdim=True) * x + y.cumsum(2).mean()

    program = partition(function, X, training=True)
    assert collectives(program) == {"gather_used": 1, "gather": 1}
    # The second gather is that of the graph's output; what is whole already is only given another gradient.
    assert [g.kind for g in program.report.implicit_gathers] == ["implicit", "output"]
    check(function, X, size=3)


def test_an_input_is_sliced_once() -> None:
    def function(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        x = tokens(x)
        return (x + b) * b - torch.tanh(x - b)

    program = check(function, X, Y)
    shards = [n for n in program.graph.nodes if n.target is torch.ops.fxsp.shard.default]
    assert len(shards) == 2


def test_a_parameter_is_used_with_shards_once() -> None:
    """Each conversion is an all-reduce of the gradient."""

    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        x = tokens(x)
        for _ in range(3):
            x = torch.tanh(F.linear(x, w))
        return x

    program = partition(function, X, W, training=True)
    assert sum(n.target is torch.ops.fxsp.use.default for n in program.graph.nodes) == 1
    assert not any(n.target is torch.ops.fxsp.use.default for n in partition(function, X, W).graph.nodes)
    check(function, X, W)


# Implicit gathers.


def _in_module(gm: GraphModule) -> None:
    for node in gm.graph.nodes:
        node.meta["nn_module_stack"] = {"L__self___blocks_0_mix": ("L['self'].blocks.0.mix", torch.nn.Module)}
        node.meta["stack_trace"] = 'File "/home/me/model.py", line 42, in forward\n    x = mix(x)'


MIXING: list[tuple[str, Any, str]] = [
    (
        "conv1d",
        lambda x: F.conv1d(x.transpose(1, 2), torch.ones(4, 4, 3, dtype=x.dtype)),
        "dimension 2 of operand 0 whole",
    ),
    ("cumsum", lambda x: x.cumsum(1), "dimension 1 of operand 0 whole"),
    ("softmax", lambda x: x.softmax(1), "dimension 1 of operand 0 whole"),
    ("roll", lambda x: x.roll(1, 1), "dimension 1 of operand 0 whole"),
    ("flip", lambda x: x.flip(1), "dimension 1 of operand 0 whole"),
    ("sort", lambda x: x.sort(1)[0], "dimension 1 of operand 0 whole"),
    ("var", lambda x: x.var(1), "dimension 1 of operand 0 whole"),
    ("index", lambda x: x[:, torch.tensor([0, 2])], "dimension 1 of operand 0 whole"),
    ("unbind", lambda x: x.unbind(1)[0], "dimension 1 of operand 0 whole"),
    ("layer_norm", lambda x: F.layer_norm(x, x.shape[1:]), "dimension 1 of operand 0 whole"),
    ("reshape", lambda x: x.reshape(2, 2, 10), "dimension 1 of operand 0 whole"),
    ("avg_pool1d", lambda x: F.avg_pool1d(x.transpose(1, 2), 2), "dimension 2 of operand 0 whole"),
    ("pad", lambda x: F.pad(x, (0, 0, 1, 1)), "dimension 1 of operand 0 whole"),
    ("var", lambda x: x.var(1), "dimension 1 of operand 0 whole"),
    ("diagonal", lambda x: x.diagonal(0, 0, 2), "has no sharding rule for this use"),
]


@pytest.mark.parametrize(("name", "mix", "reason"), MIXING, ids=[m[0] for m in MIXING])
def test_mixing_tokens_gathers_and_says_so(name: str, mix: Any, reason: str) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return mix(tokens(x))

    program = partition(function, X, prepare=_in_module)
    record = implicit(program)[0]
    assert record.op.startswith(f"aten.{name}.")
    assert (record.module, record.source) == ("blocks.0.mix", "model.py:42")
    assert reason in record.reason
    assert record.bytes == 2 * 3 * 4 * 8
    assert str(record) == f"{record.op} in blocks.0.mix (model.py:42): {record.reason}; 192 bytes per rank"
    (collective,) = [c for c in program.report.collectives if c.kind == "all_gather"]
    assert (collective.bytes, collective.reason) == (192, record.reason)
    with pytest.raises(StrictError) as raised:
        partition(function, X, prepare=_in_module, strict=True)
    assert str(raised.value) == (
        f"implicit gather: {record}. With strict=True this is an error: annotate the value with a "
        "SequenceParallelOutput before this operator, or leave its tokens whole."
    )
    # With that entry it is none.
    assert not implicit(partition(lambda x: mix(gather(tokens(x))), X, strict=True))
    for size in (2, 3, 8):
        check(function, X, size=size)


def test_tokens_are_split_again_after_a_gather() -> None:
    """The operator alone runs whole: the next one that meets a shard slices its result."""

    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        x = tokens(x)
        return F.linear(x + x.cumsum(1), w)

    program = check(function, X, W)
    assert collectives(program) == {"gather": 2}
    lines = [line.split(" f64")[0] for line in graph_of(program)]
    assert "cumsum R" in lines
    assert "add_tensor S(1, [5])" in lines
    assert "linear_default S(1, [5])" in lines


def test_cheap_operators_on_inputs_are_computed_again() -> None:
    """A rotary table from whole inputs, used split and whole: no gather."""

    def function(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        cos = shard(angles, 0).cos().unsqueeze(0)
        return tokens(x) * cos + cos.cumsum(1)

    program = check(function, X, torch.randn(5, 4, dtype=torch.float64))
    assert collectives(program) == {"gather": 1}
    assert not implicit(program)
    assert sum(n.target is torch.ops.aten.cos.default for n in program.graph.nodes) == 2


def test_other_layouts_of_an_input_cost_nothing() -> None:
    """A table sharded as one sequence, used against text and image in segments of their own."""

    def function(text: torch.Tensor, image: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        table = shard(table, 1).cos()
        return torch.cat([tokens(text), tokens(image)], 1) * table

    program = check(function, X[:, :3].clone(), Y, torch.randn(1, 8, 1, dtype=torch.float64), size=3)
    assert collectives(program) == {"gather": 1}


def test_a_written_input_is_an_output() -> None:
    """It has its global value afterwards; strict allows that, as it allows outputs."""

    def function(x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        y = tokens(x)
        state.copy_(y)
        return y.sum()

    program = partition(function, X, Y.clone(), strict=True)
    (record,) = program.report.implicit_gathers
    assert (record.kind, record.reason) == ("output", "an input that is written to has its global shape")


def test_an_entry_that_splits_another_dimension_says_so() -> None:
    program = check(lambda x: torch.softmax(shard(tokens(x), 0), -1), X)
    assert collectives(program) == {"gather": 2}
    (record,) = implicit(program)
    assert record.reason == "it is S(1, [5]), and is needed as S(0, [2])"
