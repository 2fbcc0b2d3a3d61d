"""A program run on copies of its inputs, and two runs compared."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fxsp.simulation.compare import Ran, accepted, differences, run_once


def _program(x: Tensor, weight: Tensor, unused: Tensor, seen: Tensor, times: int) -> tuple[Tensor, int]:
    seen.add_(1)
    return torch.nn.functional.dropout(x, 0.5) @ weight * times, times


def _inputs() -> list[Any]:
    x, weight, unused = (torch.randn(2, 2, requires_grad=True) for _ in range(3))
    return [x, weight, unused, torch.zeros(3), 2]


def test_a_run_leaves_inputs_and_random_numbers_alone() -> None:
    args = _inputs()
    state = torch.get_rng_state()
    first, second = (run_once(_program, args, gradients=True) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(args[3], torch.zeros(3))
    assert all(x.grad is None for x in args[:3])
    assert first.written == [False, False, False, True, False]
    assert torch.equal(first.inputs[3], torch.ones(3))
    assert list(first.gradients) == [0, 1, 2]
    assert first.gradients[2] is None
    assert [s is None for s in first.seeds] == [False, True]
    assert [d.error for d in differences([second], first, "abcde")] == [0.0] * 4
    without = run_once(_program, args, gradients=False)
    assert (without.gradients, without.seeds) == ({}, [])
    assert torch.equal(without.outputs[0], first.outputs[0])


def test_differences_say_what_differs_and_how_much() -> None:
    wanted = run_once(_program, _inputs(), gradients=True)
    wrong = Ran([1.5 * wanted.outputs[0]], list(wanted.inputs), wanted.written, dict(wanted.gradients), wanted.seeds)
    wrong.inputs[3] = torch.full((3,), math.inf)
    wrong.gradients[2] = torch.ones(2, 2)
    found = {d.what: (d.kind, d.error) for d in differences([wanted, wrong], wanted, "abcde")}
    assert list(found) == [
        "output 0",
        "d after the call",
        "the gradient of a",
        "the gradient of b",
        "the gradient of c",
    ]
    assert found["output 0"] == ("output", pytest.approx(0.5))
    assert found["d after the call"] == ("written", math.inf)
    assert found["the gradient of a"] == ("gradient", 0.0)
    assert found["the gradient of c"][1] > 1, "one that is there and should not is compared with zeros"


def test_what_is_accepted_goes_by_the_widest_tolerance() -> None:
    assert accepted(torch.ones(1), "text", torch.ones(1, dtype=torch.bfloat16)) == 5e-2
    assert accepted(torch.ones(1, dtype=torch.int64)) == 0.0
    assert accepted() == 0.0
