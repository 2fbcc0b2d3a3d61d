"""What operators do to dimensions, against the operators themselves."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch

from fxsp.passes.graph import Call
from fxsp.passes.rules.dims import kept, order, position
from fxsp.passes.rules.families import family
from fxsp.types import Length
from rule_recorder import Sample
from rule_samples import SAMPLES
from rule_validation import rule_for

aten = torch.ops.aten
S = sympy.Symbol("s", positive=True, integer=True)

#: In place, as functionalize meets them.
IN_PLACE = [(aten.transpose_.default, (0, -1)), (aten.t_.default, ()), (aten.swapaxes_.default, (1, 0))]


@pytest.mark.parametrize("sample", [s for op in sorted(family("permute"), key=str) for s in SAMPLES[op]], ids=str)
def test_order_is_that_of_the_operator(sample: Sample) -> None:
    node, _ = rule_for(sample)
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    probe = torch.empty([d + 2 for d in range(rank)], dtype=torch.complex64, device="meta")
    moved = sample.op(probe, *sample.args[1:], **sample.kwargs)
    assert order(sample.op, Call(node).arguments, rank) == [n - 2 for n in moved.shape]


@pytest.mark.parametrize(("op", "args"), IN_PLACE, ids=str)
def test_order_of_operators_in_place(op: Any, args: tuple[Any, ...]) -> None:
    node = torch.fx.Graph().call_function(op, (torch.empty(2, 3), *args))
    moved = op(torch.empty(2, 3, device="meta"), *args)
    assert order(op, Call(node).arguments, 2) == [n - 2 for n in moved.shape]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((2, 1, 3), (2, 3), {0: 0, 1: 2}),
        ((2, 3), (1, 2, 1, 3), {1: 0, 3: 1}),
        ((S, 1), (1, S), {1: 0}),
        ((1,), (), {}),
        ((2, 3), (6,), None),
        ((2, 3), (3, 2), None),
    ],
)
def test_kept_dimensions(
    before: tuple[Length, ...], after: tuple[Length, ...], expected: dict[int, int] | None
) -> None:
    assert kept(before, after) == expected


@pytest.mark.parametrize("bound", [None, 0, 3, 5, 9, -1, -5, -9, 2**63 - 1])
@pytest.mark.parametrize("which", ["start", "end"])
def test_positions_are_those_of_python(bound: int | None, which: str) -> None:
    found = position(bound, 0 if which == "start" else 5, 5)
    start, end, _ = (slice(bound, None) if which == "start" else slice(None, bound)).indices(5)
    assert found == (start if which == "start" else end)


def test_positions_of_symbolic_lengths() -> None:
    assert position(-2, 0, S) == S - 2
    assert position(2**63 - 1, S, S) == S
    assert position(3, 0, S) == 3
