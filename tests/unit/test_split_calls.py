"""Which calls of modules make whole what they return, and what in it is changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxsp.split_values.calls import is_under_way, watch_calls
from fxsp.split_values.results import with_tensors


class Model(nn.Module):
    """Its block is compiled, as far as anybody can see."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.fails = fails
        self.seen: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(is_under_way())
        watch_calls()
        if self.fails:
            raise ValueError("on purpose")
        return x


@pytest.mark.parametrize("hooked", [False, True], ids=["", "a hook of somebody else"])
def test_from_the_second_call_on(hooked: bool) -> None:
    model = Model()
    if hooked:  # the hooks that a call gets are run at its end, then
        model.register_forward_hook(lambda *_: None)
    for _ in range(3):
        model(torch.ones(1))
        assert not is_under_way()
    assert model.seen == [False, True, True]


def test_the_outermost_of_nested_ones() -> None:
    inner = Model()
    outer = nn.Sequential(inner)
    for call in (outer, inner, outer, inner):
        call(torch.ones(1))
    assert inner.seen == [False, False, True, True]
    assert not is_under_way()


def test_after_an_error() -> None:
    model = Model(fails=True)
    for _ in range(2):
        with pytest.raises(ValueError, match="on purpose"):
            model(torch.ones(1))
        assert not is_under_way()
    assert model.seen == [False, True]


@dataclass(frozen=True)
class Output:
    sample: Any
    other: Any = None


def test_only_what_is_asked_for_is_changed() -> None:
    plain, ones = torch.zeros(2), torch.ones(2)
    is_one, change = (lambda x: x is ones), (lambda x: x + 1)
    output = Output({"a": [ones, plain]}, plain)
    assert with_tensors(output, is_one, change) is output
    assert output.sample["a"][0].tolist() == [2, 2]
    assert output.sample["a"][1] is plain
    assert output.other is plain
    kept = {"a": [plain]}
    assert with_tensors(kept, is_one, change) is kept
