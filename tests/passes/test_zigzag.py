"""Causal rings are balanced: heads and tails of the sequence on each rank, and the same work for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from test_losses import split
from test_ring_processes import WIDTH, Model
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import fxsp
import models
import poisoning as oracle
from fxsp.config import Options
from fxsp.inspection.report_text import attention_lines
from fxsp.kernels import collectives
from fxsp.kernels.attention import ring
from fxsp.kernels.attention.ring_blocks import pairs_of
from fxsp.passes.base import Program
from fxsp.passes.graph import facts
from fxsp.passes.pipeline import partition_program
from fxsp.report import Report
from fxsp.simulation.reference import ops as meaning
from fxsp.types import Ranks, Sequence, Shard
from lockstep import gradients
from running import error_of
from simulated import Simulated, by_plan

ops = torch.ops.fxsp
PLACES = ((2, 1), (3, 1), (4, 1), (8, 1), (4, 2), (8, 2))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# Rows are dealt, and put back.


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize(("lengths", "head_tail"), [([7], [True]), ([1], [True]), ([3, 9, 5], [True, False, True])])
def test_deal_and_undeal(size: int, lengths: list[int], head_tail: list[bool]) -> None:
    """Against the oracle, and each the adjoint of the other but for pads, which nobody reads."""
    x = torch.randn(2, sum(lengths), 3, dtype=torch.float64, requires_grad=True)
    rows = meaning.deal(oracle.Lanes([x.detach()]), 1, lengths, head_tail, False, size)[0]
    dealt = ops.deal(x, 1, lengths, head_tail, False, size)
    zeroed = ops.deal(x, 1, lengths, head_tail, True, size)
    assert torch.equal(dealt, rows)
    assert torch.equal(zeroed, meaning.deal(oracle.Lanes([x.detach()]), 1, lengths, head_tail, True, size)[0])
    assert torch.equal(ops.undeal(dealt, 1, lengths, head_tail, size), x)
    g = torch.randn_like(rows)
    (back,) = torch.autograd.grad(dealt, x, g)
    assert torch.equal(back, ops.undeal(g, 1, lengths, head_tail, size))
    torch.testing.assert_close((zeroed * g).sum(), (x * back).sum())
    y = g.clone().requires_grad_()
    out = ops.undeal(y, 1, lengths, head_tail, size)
    h = torch.randn_like(out)
    assert torch.equal(torch.autograd.grad(out, y, h)[0], ops.deal(h, 1, lengths, head_tail, True, size))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [1, 3, 7, 8, 16])
def test_positions_and_pads(length: int, size: int) -> None:
    """Of each rank's rows: those that dealing puts there."""
    tokens = torch.arange(length)
    whole, head_tail = [False], [True]
    local = int(Sequence.of(length, layout="head-tail").local_length(size))
    for device_rank in range(size):
        place = slice(device_rank * local, (device_rank + 1) * local)
        mine = ops.deal(tokens, 0, [length], head_tail, False, size)[place]
        got = ops.positions([length], whole, device_rank, size, tokens.device, head_tail)
        assert got.tolist() == mine.tolist()
        assert ops.place_positions([length], whole, 1, device_rank, size, tokens.device, head_tail).tolist() == (
            mine.tolist()
        )
        real = ops.deal(torch.ones(length), 0, [length], head_tail, True, size)[place]
        kept = ops.mask_pads(torch.ones(local), 0, [length], whole, device_rank, size, head_tail)
        assert kept.tolist() == real.tolist()
    for name, more in (("positions", ()), ("place_positions", (1,))):
        lanes = oracle.bind(name, [[length], whole, *more, 0, size, "cpu", head_tail], {}, size).run()
        assert torch.cat(list(lanes)).tolist() == ops.deal(tokens, 0, [length], head_tail, False, size).tolist()


# The work of each rank, from the blocks that the ring calls.


def _called(size: int, ulysses: int, length: int, layout: str) -> list[int]:
    """Pairs of a query and a key, by rank, that reach the kernel of blocks; and what the report counts is the same."""
    sequence = Sequence.of(length, layout=layout)  # type: ignore[arg-type]
    where = (list(sequence.lengths), [False], list(sequence.lengths), [False], True, None, ulysses)
    heads = (list(sequence.head_tail),) * 2
    rows = ulysses * int(sequence.local_length(size))
    found = []
    for rank in range(size):
        pairs = 0

        def block(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float, _: None) -> Any:
            nonlocal pairs
            allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
            pairs += int((allowed.tril() if causal else allowed).sum())
            assert bias is None
            return torch.zeros_like(q), torch.zeros(q.shape[:3]), torch.zeros(q.shape[:3])

        x = torch.zeros(1, 1, rows, 4)
        with (
            mock.patch.object(ring, "block_forward", block),
            mock.patch.object(collectives, "start_shift", lambda flat, *_: flat),
            mock.patch.object(collectives, "wait", lambda flat: flat),
        ):
            ring.ring_attention(x, x, x, None, *where, rank, size, "none", *heads)
        tokens = (sequence.lengths, sequence.whole, sequence.head_tail)
        assert pairs == pairs_of(tokens, tokens, True, ulysses, size // ulysses, rank // ulysses)
        found.append(pairs)
    return found


@pytest.mark.parametrize(("size", "ulysses"), PLACES)
@pytest.mark.parametrize("length", [16 * 16, 16 * 16 + 5, 1000])
def test_each_rank_has_the_same_work(length: int, size: int, ulysses: int) -> None:
    balanced, contiguous = (_called(size, ulysses, length, layout) for layout in ("head-tail", "contiguous"))
    assert max(balanced) <= 1.1 * min(balanced)
    places = size // ulysses
    assert max(contiguous) > (1.4 if places == 2 else 1.6) * min(contiguous)
    # What is masked is skipped: all that is computed in vain are pads, and halves of nothing.
    assert sum(balanced[::ulysses]) <= 1.1 * length * (length + 1) // 2


# Whole programs: values and gradients, on any number of ranks.


def _compiled(model: Any, size: int, ulysses: int, reports: list[Report], plan: Any = None) -> tuple[Any, Simulated]:
    torch._dynamo.reset()
    options: dict[str, Any] = {"ulysses_degree": ulysses, "ring_degree": size // ulysses}
    backend = Simulated(size, by_plan(options | ({"plan": plan} if plan else {}), reports))
    return torch.compile(model, backend=backend, dynamic=False), backend


def _layouts(program: Program | None) -> set[str]:
    assert program is not None
    types = [facts(node).type for node in program.graph.nodes]
    return {segment.layout for t in types if isinstance(t, Shard) for segment in t.sequence.segments}


@pytest.mark.parametrize(("size", "ulysses"), PLACES)
def test_values_and_gradients(size: int, ulysses: int) -> None:
    model = Model(kv=4 if ulysses > 1 else 2, causal=True)
    for length, poison in ((1, False), (size + 1, True), (2 * size, False), (4 * size - 3, True)):
        reports: list[Report] = []
        fast, backend = _compiled(model, size, ulysses, reports)
        backend.poison_pads = poison
        x = torch.randn(2, length, WIDTH)
        results = []
        for f in (model, fast):
            y = x.clone().requires_grad_()
            out = f(y)
            grads = torch.autograd.grad((out * torch.arange(WIDTH)).square().mean(), [y, *model.parameters()])
            results.append([out.detach(), *grads])
        for want, got in zip(*results, strict=True):
            assert error_of(got, want) <= 1e-5
        if length == 1:
            assert reports[0].unsharded.startswith("there is nothing to split")
            continue
        assert _layouts(backend.programs[0]) == {"head-tail"}
        assert {a.method for a in reports[0].attentions} == {"ring" if ulysses == 1 else "hybrid"}


LLAMA = {"": {"input_ids": fxsp.SequenceParallelInput(split_dim=1)}}


@pytest.mark.parametrize(("size", "ulysses", "tokens"), [(3, 1, 13), (4, 1, 5), (4, 2, 21)])
def test_a_language_model(size: int, ulysses: int, tokens: int) -> None:
    """Rotary positions, a causal loss with targets that are ignored: the shift is over all tokens, in their order."""
    model, inputs = models.llama(tokens=tokens, layers=1, kv_heads=2)
    ids = inputs["input_ids"]
    labels = ids.clone()
    labels[:, ::3] = -100
    reports: list[Report] = []
    fast, backend = _compiled(model, size, ulysses, reports, LLAMA)
    results = []
    for f in (model, fast):
        model.zero_grad()
        loss = f(input_ids=ids, labels=labels).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for want, got in zip(*results, strict=True):
        assert error_of(got, want) <= 1e-5
    assert any("head-tail" in _layouts(p) for p in backend.programs if p is not None)
    assert "head-tail" in "".join(attention_lines(reports[0].attentions))


# What looks at the order of tokens, over a sequence of heads and tails.


def _attend(x: Tensor, w: Tensor) -> Tensor:
    q, k, v = F.linear(x, w).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind()
    return x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


USES: dict[str, Callable[..., Tensor]] = {
    "cumsum": lambda x: x.cumsum(1),
    "conv": lambda x: F.conv1d(x.transpose(1, 2), torch.ones(8, 1, 3, dtype=x.dtype), padding=1, groups=8),
    "first": lambda x: x[:, 0].tanh(),
    "last": lambda x: x[:, -1].tanh(),
    "one kept": lambda x: x[:, 2:3] * 2,
    "shifted": lambda x: x[:, :-1] * x[:, 1:],
    "flip": lambda x: x.flip(1) * torch.arange(8),
    "sum": lambda x: x.square().sum(1),
    "mean": lambda x: x.exp().mean(1),
    "softmax": lambda x: x.softmax(1),
    "positions": lambda x: x * torch.arange(x.shape[1]).unsqueeze(1),
    "linear attention": lambda x: x.softmax(-1) @ (x.transpose(1, 2) @ x),
    "flat": lambda x: F.linear(x.flatten(0, 1), torch.ones(3, 8, dtype=x.dtype)).unflatten(0, (2, -1)),
    "joined": lambda x: torch.cat([torch.ones(2, 3, 8, dtype=x.dtype), x], 1).tanh(),
    "cut": lambda x: torch.cat([torch.ones(2, 3, 8, dtype=x.dtype), x * 2], 1)[:, 3:],
    "not causal": lambda x: F.scaled_dot_product_attention(*(x.unflatten(2, (2, 4)).transpose(1, 2),) * 3),
    "indexed": lambda x: x.index_select(1, torch.arange(3).flip(0)),
    "max": lambda x: x.amax(1),
}


@pytest.mark.parametrize(("size", "ring_degree"), [(2, 2), (3, 3), (4, 2)])
def test_what_needs_the_order(size: int, ring_degree: int) -> None:
    """One program with all of them: the attention before makes the sequence one of heads and tails."""

    def function(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y = _attend(split(x), w)
        return tuple(use(y) for use in USES.values())

    for length in (5, 13):
        x = torch.randn(2, length, 8, dtype=torch.float64, requires_grad=True)
        w = torch.randn(24, 8, dtype=torch.float64, requires_grad=True) * 0.3
        w = w.detach().requires_grad_()
        gm = make_fx(function, pre_dispatch=True, tracing_mode="fake")(x, w)
        ranks = Ranks(0, size, "test")
        options = Options(ulysses_degree=size // ring_degree, ring_degree=ring_degree)
        program = Program(gm, ranks, training=True, options=options)
        program = partition_program(program)
        assert "head-tail" in _layouts(program)
        expected = function(x, w)
        given = [torch.randn_like(y) for y in expected]
        wanted = torch.autograd.grad(expected, [x, w], given)
        for poison in (False, True):
            outputs, found = gradients(program.gm, size, [x, w], given, poison_pads=poison)
            for rank in range(size):
                for name, got, want in zip(USES, outputs[rank], expected, strict=True):
                    torch.testing.assert_close(got, want.detach(), rtol=1e-9, atol=1e-12, msg=name)
                torch.testing.assert_close(list(found[rank]), list(wanted), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("segments", ["two", "whole text"])
@pytest.mark.parametrize(("size", "ring_degree"), [(2, 2), (3, 3), (4, 2)])
def test_several_segments(segments: str, size: int, ring_degree: int) -> None:
    """Heads and tails of each segment: a causal ring over text and image is balanced too."""

    def function(text: Tensor, image: Tensor, w: Tensor) -> Tensor:
        text = split(text) if segments == "two" else text
        joined = torch.cat([text, split(image)], 1)
        if segments == "whole text":
            joined = ops.annotate(torch.cat([text, image], 1), "shard", 1, text.shape[1], "test")
        return _attend(joined, w)[:, text.shape[1] :].tanh()

    tensors = [torch.randn(2, n, 8, dtype=torch.float64, requires_grad=True) for n in (3, 11)]
    w = torch.randn(24, 8, dtype=torch.float64).mul_(0.3).requires_grad_()
    inputs = [*tensors, w]
    gm = make_fx(function, pre_dispatch=True, tracing_mode="fake")(*inputs)
    options = Options(ulysses_degree=size // ring_degree, ring_degree=ring_degree)
    program = Program(gm, Ranks(0, size, "test"), training=True, options=options)
    program = partition_program(program)
    assert "head-tail" in _layouts(program)
    expected = function(*inputs)
    given = [torch.randn_like(expected)]
    wanted = torch.autograd.grad(expected, inputs, given)
    outputs, found = gradients(program.gm, size, inputs, given, poison_pads=True)
    for rank in range(size):
        torch.testing.assert_close(outputs[rank][0], expected.detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(list(found[rank]), list(wanted), rtol=1e-8, atol=1e-10)
