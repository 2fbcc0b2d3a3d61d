"""Symbolic lengths on simulated ranks: one more compilation for the second length, none after it, and right values.

What real code does with a length: it is a number of windows, a tensor, a position, a part of another sequence.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxsp import SequenceParallelInput, SequenceParallelPartialInput
from fxsp.report import Report
from running import build, error_of
from simulated import Simulated, by_plan

# Windows regroup the tokens: they are gathered.
pytestmark = pytest.mark.filterwarnings("ignore::fxsp.ImplicitGatherWarning")

Use = Callable[[Tensor, Tensor], Tensor]

USES: dict[str, Use] = {}


def use(function: Use) -> Use:
    """Register what a model does with its tokens ``x [2, S, 8]`` and a weight ``w [8]``; S is a multiple of 4."""
    USES[function.__name__] = function
    return function


def attention(x: Tensor) -> Tensor:
    q = x.unflatten(-1, (2, 4)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q.cos(), q.sin()).transpose(1, 2).flatten(2)


@use
def number_as_tensor(x: Tensor, w: Tensor) -> Tensor:
    mean = x.sum(1, keepdim=True) / torch.as_tensor(x.shape[1], dtype=x.dtype, device=x.device)
    return x * mean + torch.as_tensor(data=x.shape[1]) * w


@use
def number_in_a_new_tensor(x: Tensor, w: Tensor) -> Tensor:
    return torch.where(x.sum(-1, keepdim=True) > 0, torch.tensor(x.shape[1]), 0) * w + torch.tensor([x.shape[1]]) * x


@use
def positions(x: Tensor, w: Tensor) -> Tensor:
    places = torch.arange(x.shape[1], device=x.device)
    return x + (places[:, None] * w).sin() * torch.where(places < x.shape[1] // 2, 1.0, 0.5)[:, None]


@use
def windows(x: Tensor, w: Tensor) -> Tensor:
    return x.view(x.shape[0], x.shape[1] // 4, 4, 8).softmax(2).flatten(1, 2) * w


@use
def attention_in_windows(x: Tensor, w: Tensor) -> Tensor:
    return attention(x.view(-1, 4, 8)).view_as(x) * w


@use
def merged_patches(x: Tensor, w: Tensor) -> Tensor:
    y = x.view(2, x.shape[1] // 4, 2, 2, 8).permute(0, 2, 1, 3, 4).reshape(2, -1, 8)
    return attention(y * w)


@use
def registers(x: Tensor, w: Tensor) -> Tensor:
    y = torch.cat([w.expand(2, 3, 8), x], 1)
    return attention(y)[:, 3:].mean(1) + y.new_zeros(y.shape).sum(1)


@use
def segments_swapped(x: Tensor, w: Tensor) -> Tensor:
    y = torch.cat([x * w, x.mean(1, keepdim=True), x], 1)
    return attention(y)[:, x.shape[1] + 1 :]


class _Model(nn.Module):
    def __init__(self, function: Use) -> None:
        super().__init__()
        self.first, self.function = nn.Linear(8, 8), function
        self.weight = nn.Parameter(torch.linspace(-1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.first(x), self.weight)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.compiler.reset()
    torch.manual_seed(0)


@pytest.mark.parametrize(("name", "size"), [*((name, 3) for name in USES), ("registers", 8)])
def test_uses_of_a_length(name: str, size: int) -> None:
    model, reports = _Model(USES[name]), list[Report]()
    plan = {"": {"x": SequenceParallelInput(1)}}
    backend = Simulated(size, by_plan({"plan": plan}, reports), poison_pads=True)
    fast, compiles = torch.compile(model, backend=backend), []
    for length in (12, 20, 16, 8, 44):
        x = torch.randn(2, length, 8, requires_grad=True)
        leaves = [x, *model.parameters()]
        expected = model(x)
        seed = torch.randn_like(expected)
        wanted = torch.autograd.grad(expected, leaves, seed)
        before = len(backend.programs)
        out = fast(x)
        compiles.append(len(backend.programs) - before)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        for found, grad in zip(torch.autograd.grad(out, leaves, seed), wanted, strict=True):
            torch.testing.assert_close(found, grad, rtol=1e-5, atol=1e-5 * max(1.0, grad.abs().max().item()))
    assert compiles == [1, 1, 0, 0, 0]
    assert not [report.unsharded for report in reports if report.unsharded]


class _Joint(nn.Module):
    """Text and image tokens in one sequence; the block is told how many are text."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.last = _Told(), nn.Linear(8, 8)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        text_length = text.shape[1]
        return self.last(self.block(torch.cat([text, x], 1), text_length))[:, text_length:]


class _Told(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)

    def forward(self, hidden: Tensor, text_length: int) -> Tensor:
        return attention(self.first(hidden))


@pytest.mark.parametrize("target", ["hidden", 0])
def test_a_number_of_text_tokens_that_is_a_size(target: str | int) -> None:
    """Dynamo writes the size anew where it is used, after the block: the plan takes it from the input."""
    spec = SequenceParallelPartialInput(1, "text_length", split_output=target == 0)
    backend, model, compiles = Simulated(3, by_plan({"plan": {"block": {target: spec}}})), _Joint(), []
    fast = torch.compile(model, backend=backend)
    for image, text in ((12, 5), (13, 4), (17, 6), (2, 7)):
        x, y = torch.randn(2, image, 8), torch.randn(2, text, 8)
        before = len(backend.programs)
        torch.testing.assert_close(fast(x, y), model(x, y), rtol=1e-5, atol=1e-6)
        compiles.append(len(backend.programs) - before)
    assert compiles == [1, 1, 0, 0]
    for program in backend.programs:
        assert program is not None
        assert all(record.applied for record in program.report.plan)
        assert not program.report.unsharded


def test_two_sequences_that_vary() -> None:
    plan = {"": {"x": SequenceParallelInput(1), "text": SequenceParallelInput(1)}}
    for size in (3, 8):
        torch.compiler.reset()
        backend, model, compiles = Simulated(size, by_plan({"plan": plan})), _Joint(), []
        fast = torch.compile(model, backend=backend)
        for image, text in ((22, 11), (23, 10), (17, 16), (12, 13)):
            x, y = torch.randn(2, image, 8), torch.randn(2, text, 8)
            before = len(backend.programs)
            torch.testing.assert_close(fast(x, y), model(x, y), rtol=1e-5, atol=1e-6)
            compiles.append(len(backend.programs) - before)
        assert compiles == [1, 1, 0, 0]


def test_a_text_mask_of_many_lengths() -> None:
    """Qwen-Image makes a tensor of the text's length where there is a mask, which Dynamo alone compiles for each."""
    settings = {"height": 4, "width": 6, "mask": True}
    model, _ = build("qwen_image", settings)
    backend = Simulated(3, by_plan({}))
    fast, compiles = torch.compile(model, backend=backend), []
    with torch.no_grad():
        for text in (7, 9, 12, 5):
            inputs = build("qwen_image", {**settings, "text": text})[1]
            before = len(backend.programs)
            assert error_of(fast(**inputs)[0], model(**inputs)[0]) <= 1e-5
            compiles.append(len(backend.programs) - before)
    assert compiles == [1, 1, 0, 0]
