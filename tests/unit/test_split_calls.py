"""Which calls of modules make whole what they return, and what in it is changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxsp.split_values.calls import as_outermost, is_under_way, watch_calls, watch_roots
from fxsp.split_values.results import with_tensors


class Model(nn.Module):
    """Its block is compiled, as far as anybody can see."""

    def __init__(self, fails: type[BaseException] | None = None) -> None:
        super().__init__()
        self.fails = fails
        self.seen: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(is_under_way())
        watch_calls()
        if self.fails is not None:
            raise self.fails("on purpose")
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
    model = Model(fails=ValueError)
    for _ in range(2):
        with pytest.raises(ValueError, match="on purpose"):
            model(torch.ones(1))
        assert not is_under_way()
    assert model.seen == [False, True]


def test_after_an_interrupt() -> None:
    """Which hooks do not see: the next call finds out."""
    model = Model()
    model(torch.ones(1))
    model.fails = KeyboardInterrupt
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            model(torch.ones(1))
    model.fails = None
    model(torch.ones(1))
    assert not is_under_way()
    with pytest.raises(KeyboardInterrupt):
        Model(fails=KeyboardInterrupt)(torch.ones(1))
    assert as_outermost(None, is_under_way)
    assert not is_under_way()


def test_the_models_of_a_part_that_is_compiled() -> None:
    block, other = Model(), Model()
    stack = nn.ModuleList([nn.Sequential(block), other])  # is called by nobody
    watch_roots(block)
    assert not stack._forward_hooks

    first, second = nn.Sequential(block, other), nn.Sequential(nn.Sequential(block))
    watch_roots(block)
    watch_roots(other)
    for model in (first, second):
        assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 1
        block.seen.clear()
        model(torch.ones(1))
        assert block.seen == [True]
    assert not block._forward_hooks
    assert not is_under_way()

    compiled = torch.compile(nn.Sequential(Model()), backend="eager")  # stands for another, and nothing more
    watch_roots(compiled._orig_mod)
    assert not compiled._forward_hooks


def test_a_model_that_is_compiled_as_a_whole() -> None:
    model = nn.Sequential(Model())
    watch_roots(model[0])
    graphs = []

    def backend(gm: Any, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    with torch.no_grad():
        torch.compile(nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU())), backend=backend)(torch.ones(1))
        parts = nn.Sequential(nn.ReLU())
        whole = nn.Sequential(parts)
        watch_roots(parts)
        torch.compile(whole, backend=backend, fullgraph=True)(torch.ones(1))
    assert len(graphs) == 2


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
