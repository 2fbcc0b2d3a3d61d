"""Joining and cutting the tokens themselves: local at the boundaries of segments, a gather elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxsp.passes.builder import Builder
from tracing import check, collectives, gather, partition, shard, types_of

TEXT, IMAGE = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)


def joined(text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """``[text|image]``, not to be had whole without communication."""
    return torch.softmax(torch.cat([shard(text), shard(image)], 1), -1)


def whole_text(text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """``[text whole|image]``."""
    return torch.softmax(shard(torch.cat([text, image], 1), 1, text.shape[1]), -1)


#: A cut of [3|5] tokens, and the types of its results.
AT_BOUNDARIES: list[tuple[Any, str]] = [
    (lambda x: x[:, :3], "S(1, [3])"),
    (lambda x: x[:, 3:], "S(1, [5])"),
    (lambda x: x[:, :-5], "S(1, [3])"),
    (lambda x: x[:, -5:], "S(1, [5])"),
    (lambda x: x[:, 3:100], "S(1, [5])"),
    (lambda x: x[:, :], "S(1, [3|5])"),
    (lambda x: x.narrow(1, 3, 5), "S(1, [5])"),
    (lambda x: x.split([3, 5], 1), "S(1, [3]), S(1, [5])"),
    (lambda x: torch.split(x, (3, 5), dim=-2), "S(1, [3]), S(1, [5])"),
    (lambda x: x.transpose(1, 2).split([3, 5], -1), "S(2, [3]), S(2, [5])"),
    (lambda x: torch.cat([x[:, :3], x[:, :3]], 1).chunk(2, 1), "S(1, [3]), S(1, [3])"),
    (lambda x: torch.cat([x[:, :3], x[:, :3]], 1).split(3, 1), "S(1, [3]), S(1, [3])"),
    (lambda x: torch.cat([x[:, :3], x[:, :3]], 1).tensor_split(2, 1), "S(1, [3]), S(1, [3])"),
    (lambda x: torch.cat([x, x, x], 1)[:, 8:16], "S(1, [3|5])"),
    (lambda x: x.flatten(1, 2)[:, : 3 * 4], "S(1, 1*[3]*4)"),
    (lambda x: x.flatten(1, 2)[:, 3 * 4 :], "S(1, 1*[5]*4)"),
]

OFF_BOUNDARIES: list[Any] = [
    lambda x: x[:, 1:-1],
    lambda x: x[:, ::2],
    lambda x: x[:, 3:3],
    lambda x: x.split([4, 4], 1),
    lambda x: x.chunk(2, 1),
    lambda x: x.unbind(1)[2],
]

#: Between tokens that are no boundary, and within one token, which is four elements.
OFF_BOUNDARIES_OF_UNITS: list[Any] = [
    lambda x: x.flatten(1, 2)[:, : 2 * 4],
    lambda x: x.flatten(1, 2)[:, : 3 * 4 + 1],
]


def _cut(function: Any, last: str) -> str:
    lines = [
        line for line in types_of(lambda t, i: function(joined(t, i)), TEXT, IMAGE) if not line.startswith("getitem")
    ]
    return lines[-1].split(" ", 1)[1]


def _outputs(function: Any, make: Any = joined) -> Any:
    def program(text: torch.Tensor, image: torch.Tensor) -> Any:
        out = function(make(text, image))
        return tuple(out) if isinstance(out, (tuple, list)) else out

    return program


@pytest.mark.parametrize(("function", "last"), AT_BOUNDARIES)
def test_cuts_at_boundaries_are_local(function: Any, last: str) -> None:
    assert _cut(function, last) == last
    for size in (2, 3):
        program = check(_outputs(function), TEXT, IMAGE, size=size)
        # The outputs are gathered, each once, and nothing else.
        assert collectives(program) == {"gather": last.count("S(")}
        assert not [g for g in program.report.implicit_gathers if g.kind == "implicit"]


@pytest.mark.parametrize(
    ("function", "tokens"),
    [*((f, "[3|5]") for f in OFF_BOUNDARIES), *((f, "[12 by 4|20 by 4]") for f in OFF_BOUNDARIES_OF_UNITS)],
)
def test_cuts_elsewhere_gather(function: Any, tokens: str) -> None:
    program = check(_outputs(function), TEXT, IMAGE)
    assert collectives(program) == {"gather": 1}
    (record,) = program.report.implicit_gathers
    assert record.kind == "implicit"
    assert f"whole (the tokens {tokens})" in record.reason
    # Two rows of text and three of images, of four float64, in two batches, to one other rank.
    assert record.bytes == (2 + 3) * 4 * 8 * 2


@pytest.mark.parametrize("function", [lambda x: x[:, :1], lambda x: x[:, 3], lambda x: x[:, -2:], lambda x: x[:, 2:4]])
@pytest.mark.parametrize("make", [joined, whole_text])
def test_a_few_tokens_cost_less_than_all(function: Any, make: Any) -> None:
    """The first token, the last: no more than a gather, often a small all-reduce."""
    for size in (2, 3):
        program = check(_outputs(function, make), TEXT, IMAGE, size=size)
        assert sum(collectives(program).values()) <= 1


@pytest.mark.parametrize("function", [*(f for f, _ in AT_BOUNDARIES), *OFF_BOUNDARIES, *OFF_BOUNDARIES_OF_UNITS])
def test_cuts_beside_whole_text(function: Any) -> None:
    for size in (2, 4):
        check(_outputs(function, whole_text), TEXT, IMAGE, size=size)


def test_a_whole_segment_is_cut_out_without_communication() -> None:
    program = check(lambda t, i: whole_text(t, i)[:, :3], TEXT, IMAGE, size=4)
    assert collectives(program) == {}
    (line,) = [x for x in types_of(lambda t, i: whole_text(t, i)[:, :3], TEXT, IMAGE) if x.startswith("slice")]
    assert line.endswith(" R")


def test_a_whole_segment_cut_out_shares_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank has the rows, and would count their gradient P times."""
    check(lambda t, i: whole_text(t, i)[:, :3], TEXT, IMAGE, size=4)
    monkeypatch.setattr(Builder, "leave", lambda self, x, length: x)
    with pytest.raises(AssertionError, match="not close"):
        check(lambda t, i: whole_text(t, i)[:, :3], TEXT, IMAGE, size=4)


@pytest.mark.parametrize(
    ("function", "type_"),
    [
        (lambda t, i: torch.cat([shard(t), shard(i)], 1), "S(1, [3|5])"),
        (lambda t, i: torch.cat([shard(t), i], 1), "S(1, [3|5])"),
        (lambda t, i: torch.cat([t, shard(i), t], 1), "S(1, [3|5|3])"),
        (lambda t, i: torch.cat([torch.cat([shard(t), shard(i)], 1), shard(t)], 1), "S(1, [3|5|3])"),
        (lambda t, i: torch.cat([shard(i), shard(i)], 1), "S(1, [5|5])"),
        (lambda t, i: torch.cat([shard(i), shard(i)], 2), "S(1, [5])"),
        (lambda t, i: torch.cat([shard(i), i], -1), "S(1, [5])"),
        (lambda t, i: torch.cat([shard(i), i[:, :0]], 1), "S(1, [5])"),
        (lambda t, i: torch.cat([shard(torch.cat([t, i], 1), 1, 3), shard(i)], 1), "S(1, [3 whole|5|5])"),
        (lambda t, i: torch.cat([shard(i, 0), i], 1), "S(0, [2])"),
        (lambda t, i: torch.cat([shard(i, 0), shard(i, 0)], 0), "S(0, [2|2])"),
        (lambda t, i: torch.stack([shard(i), i], 1), "S(2, [5])"),
        (lambda t, i: torch.stack([shard(i), shard(i)], 2).flatten(1, 2), "S(1, 1*[5]*2)"),
    ],
)
def test_joined_tokens(function: Any, type_: str) -> None:
    lines = types_of(lambda t, i: torch.softmax(function(t, i), -1), TEXT, IMAGE)
    assert lines[-1] == f"softmax {type_}"
    for size in (2, 3):
        program = check(lambda t, i: torch.softmax(function(t, i), -1), TEXT, IMAGE, size=size)
        assert collectives(program) == {"gather": 1}


def test_joined_tokens_of_which_some_are_inside_a_dimension_are_gathered() -> None:
    def function(t: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        pairs = torch.softmax(shard(i), -1).flatten(0, 1)
        return torch.cat([pairs, t.flatten(0, 1)], 0)

    program = check(function, TEXT, IMAGE)
    assert [g.kind for g in program.report.implicit_gathers] == ["implicit"]


def test_two_sequences_side_by_side_and_apart_again() -> None:
    """What a joint attention block does with text and images around its residual."""

    def function(t: torch.Tensor, i: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        t, i = torch.softmax(shard(t), -1), torch.softmax(shard(i), -1)
        both = torch.cat([t, i], 1).exp()
        out_t, out_i = both.split([3, 5], 1)
        return t + out_t, gather(i + out_i)

    for size in (2, 3, 4):
        program = check(function, TEXT, IMAGE, size=size)
        assert collectives(program) == {"gather": 2}


def test_boundaries_of_symbolic_lengths() -> None:
    def function(t: torch.Tensor, i: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        both = torch.softmax(torch.cat([shard(t), shard(i)], 1), -1)
        return both[:, : t.shape[1]], both[:, t.shape[1] :]

    from fxsp.passes.base import Program
    from fxsp.passes.pipeline import Runner, partition_program
    from fxsp.simulation.machine import simulate
    from fxsp.types import Ranks
    from replicated import check_replicated
    from tracing import trace

    gm = trace(function, TEXT, IMAGE, symbolic=True)
    shape_env = gm.graph.find_nodes(op="placeholder")[0].meta["val"].fake_mode.shape_env
    before = len(shape_env.guards)
    program = partition_program(Program(gm, Ranks(0, 2, "simulated")), Runner(check=True))
    assert collectives(program) == {"gather": 2}
    assert len(shape_env.guards) == before
    # One graph serves every length.
    for text, image in ((3, 5), (4, 6), (1, 1), (2, 9)):
        inputs = [torch.randn(2, n, 4, dtype=torch.float64) for n in (text, image)]
        got = check_replicated(simulate(program.gm, 2, inputs))
        for a, b in zip(got, function(*inputs), strict=True):
            torch.testing.assert_close(a, b)


def test_strict_allows_what_is_local() -> None:
    partition(lambda t, i: joined(t, i)[:, 3:].exp(), TEXT, IMAGE, strict=True)
