"""Writes into slices of split tokens: local where the slice is made of segments, right everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxsp.passes.base import Program
from fxsp.passes.pipeline import Runner, partition_program
from fxsp.simulation.machine import simulate
from fxsp.types import Ranks
from replicated import check_replicated
from tracing import check, collectives, shard, trace

TEXT, IMAGE = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)


def joined(text: Tensor, image: Tensor) -> Tensor:
    """``[text|image]``, not to be had whole without communication."""
    return torch.softmax(torch.cat([shard(text), shard(image)], 1), -1)


def whole_text(text: Tensor, image: Tensor) -> Tensor:
    """``[text whole|image]``."""
    return torch.softmax(shard(torch.cat([text, image], 1), 1, text.shape[1]), -1)


def _second(x: Tensor, text: Tensor, image: Tensor) -> Tensor:
    x = x.clone()
    x[:, 3:] = torch.softmax(x[:, 3:] * 2, -1)
    return x


def _first_by_a_whole_value(x: Tensor, text: Tensor, image: Tensor) -> Tensor:
    x = x.clone()
    x[:, :3] = text.cos()
    return x


def _both(x: Tensor, text: Tensor, image: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[:, :3], out[:, 3:] = torch.softmax(x[:, :3], -1), torch.softmax(x[:, 3:], 1 - 2)
    return out


def _transposed(x: Tensor, text: Tensor, image: Tensor) -> Tensor:
    y = x.transpose(1, 2).clone()
    y[..., -5:] *= 3
    return y.transpose(1, 2)


@pytest.mark.parametrize("function", [_second, _first_by_a_whole_value, _both, _transposed])
@pytest.mark.parametrize("make", [joined, whole_text])
def test_segments_are_written_in_place(function: Any, make: Any) -> None:
    for size in (2, 3, 8):
        program = check(lambda t, i: function(make(t, i), t, i), TEXT, IMAGE, size=size)
        assert collectives(program) == {"gather": 1}
        assert not [g for g in program.report.implicit_gathers if g.kind == "implicit"]


@pytest.mark.parametrize("place", [(0, 5), (2, 7), (4, 9)])
def test_a_whole_buffer_becomes_split(place: tuple[int, int]) -> None:
    def function(text: Tensor, image: Tensor) -> Tensor:
        out = image.new_zeros(2, 9, 4)
        out[:, place[0] : place[1]] = torch.softmax(shard(image), -1)
        return torch.softmax(out + text.mean(), -1)

    for size in (2, 3):
        program = check(function, TEXT, IMAGE, size=size)
        assert collectives(program) == {"gather": 1}
        assert not [g for g in program.report.implicit_gathers if g.kind == "implicit"]


@pytest.mark.parametrize("place", [slice(0, 4), slice(2, 6), slice(0, 8, 2)])
def test_other_places_are_gathered(place: slice) -> None:
    def function(text: Tensor, image: Tensor) -> Tensor:
        x = joined(text, image).clone()
        x[:, place] = 2.0
        return x

    for size in (2, 3):
        program = check(function, TEXT, IMAGE, size=size)
        assert [g.kind for g in program.report.implicit_gathers] == ["implicit"]


def test_symbolic_lengths() -> None:
    def function(text: Tensor, image: Tensor) -> Tensor:
        x = joined(text, image).clone()
        x[:, text.shape[1] :] = torch.softmax(x[:, text.shape[1] :] * 2, -1)
        return x

    gm = trace(function, TEXT, IMAGE, symbolic=True)
    program = partition_program(Program(gm, Ranks(0, 2, "simulated")), Runner(check=True))
    assert collectives(program) == {"gather": 1}
    (out,) = check_replicated(simulate(program.gm, 2, [TEXT, IMAGE]))
    torch.testing.assert_close(out, function(TEXT, IMAGE))
