"""The lock-step simulator: each operator on lists, sharing, in-place writes, pads, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fxsp.kernels.ops  # noqa: F401
import poisoning as oracle
from fxsp.errors import UnsupportedError, VerificationError
from fxsp.simulation.machine import assemble
from fxsp.simulation.reference import ops as meaning
from fxsp.simulation.reference.lanes import total
from fxsp.torch_internals import trace_on_fakes
from fxsp.types import Partial, Replicate, Segment, Sequence, Shard
from poisoning import run, simulate
from replicated import check_replicated
from with_grads import simulate_with_grads

ops = torch.ops.fxsp
GROUP = "simulated"


@st.composite
def sequences(draw: st.DrawFn, max_size: int = 5) -> tuple[list[int], list[bool], int]:
    """Lengths, wholeness (at least one segment is split), and a number of ranks."""
    lengths = draw(st.lists(st.integers(1, 11), min_size=1, max_size=3))
    whole = [draw(st.booleans()) for _ in lengths[1:]]
    whole.insert(draw(st.integers(0, len(whole))), False)
    return lengths, whole, draw(st.integers(1, max_size))


def _graph(function: Callable[..., Any], *inputs: Any) -> torch.fx.GraphModule:
    return trace_on_fakes(function, inputs)


@given(sequences(), st.integers(0, 2), st.booleans())
@settings(max_examples=60, deadline=None)
def test_local_operators_agree_with_the_kernels(
    case: tuple[list[int], list[bool], int], dim: int, zero_pads: bool
) -> None:
    lengths, whole, size = case
    shape = [2, 3, 4]
    shape[dim] = sum(lengths)
    x = torch.randn(shape)
    expected = meaning.shard(oracle.Lanes([x] * size), dim, lengths, whole, zero_pads, size=size)
    masked = meaning.mask_pads(expected, dim, lengths, whole, size=size)
    scaled = meaning.scale_whole(expected, dim, lengths, whole, size=size)
    places = meaning.positions(lengths, whole, size=size)
    for rank in range(size):
        own = ops.shard(x, dim, lengths, whole, zero_pads, rank, size, GROUP)
        assert torch.equal(own, expected[rank])
        assert torch.equal(ops.mask_pads(own, dim, lengths, whole, rank, size), masked[rank])
        torch.testing.assert_close(ops.scale_whole(own, dim, lengths, whole, size), scaled[rank])
        assert torch.equal(ops.positions(lengths, whole, rank, size, torch.device("cpu")), places[rank])


@given(sequences(), st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_shard_then_gather_is_identity(case: tuple[list[int], list[bool], int], dim: int) -> None:
    lengths, whole, size = case
    shape = [2, 3, 4]
    shape[dim] = sum(lengths)
    x = torch.randn(shape)
    rows = meaning.shard(oracle.Lanes([x] * size), dim, lengths, whole, False, size=size)
    for lane in meaning.gather(rows, dim, lengths, whole, size=size):
        assert torch.equal(lane, x)
    type_ = Shard(dim, Sequence(tuple(Segment(n, not w) for n, w in zip(lengths, whole, strict=True))))
    assert torch.equal(assemble(type_, rows), x)


def test_assemble_inner_and_outer_factors() -> None:
    x = torch.arange(2 * 5 * 3)
    rows = meaning.shard(oracle.Lanes([x.view(2, 5, 3)] * 2), 1, [5], [False], False, size=2)
    lanes = [lane.reshape(-1) for lane in rows]
    assert torch.equal(assemble(Shard(0, Sequence.of(5), 2, 3), lanes), x)
    assert torch.equal(assemble(Partial(), [x, x]), 2 * x)
    assert assemble(Replicate(), [x, x]) is x


def test_all_to_all_is_a_transpose_of_blocks() -> None:
    sent = oracle.Lanes([torch.tensor([[10 * r + j] for j in range(3)]) for r in range(3)])
    received = meaning.all_to_all(sent, size=3)
    assert [lane.flatten().tolist() for lane in received] == [[0, 10, 20], [1, 11, 21], [2, 12, 22]]


def test_total_accumulates_half_precision_in_float32() -> None:
    lanes = [torch.tensor([256.0], dtype=torch.bfloat16)] + [torch.tensor([1.0], dtype=torch.bfloat16)] * 4
    assert total(lanes).item() == 260.0
    assert total([torch.tensor(True), torch.tensor(True)]).item() is True


def _mean_over_tokens(n: int, size: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def function(x: torch.Tensor) -> torch.Tensor:
        rows = ops.shard(x, 1, [n], [False], False, 0, size, GROUP)
        rows = F.gelu(rows)
        return ops.all_reduce(ops.mask_pads(rows, 1, [n], [False], 0, size).sum(1) / n, GROUP)

    return function


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_simulated_mean(size: int, n: int) -> None:
    x = torch.randn(2, n, 3, dtype=torch.float64)
    gm = _graph(_mean_over_tokens(n, size), x)
    for poison in (False, True):
        (out,) = check_replicated(simulate(gm, size, [x], poison_pads=poison))
        torch.testing.assert_close(out, F.gelu(x).mean(1))


def test_poison_shows_a_dependence_on_pads() -> None:
    def forgets_the_mask(x: torch.Tensor) -> torch.Tensor:
        return ops.all_reduce(ops.shard(x, 0, [3], [False], False, 0, 2, GROUP).sum(0), GROUP)

    x = torch.randn(3, 2)
    gm = _graph(forgets_the_mask, x)
    copied, poisoned = (simulate(gm, 2, [x], poison_pads=poison)[0][0] for poison in (False, True))
    torch.testing.assert_close(copied, x.sum(0) + x[2])
    torch.testing.assert_close(poisoned, x.sum(0) + 0.75 * x[0])
    rows = oracle.bind("shard", [oracle.Lanes([torch.arange(3)] * 2), 0, [3], [False], False, 0, 2, ""], {}, 2)
    assert [lane.tolist() for lane in rows.run(poison_pads=True)] == [[0, 1], [2, 0]]
    blocks = oracle.bind("pack", [oracle.Lanes([torch.arange(3)] * 2), [3], 2, False], {}, 2)
    assert [lane.tolist() for lane in blocks.run()] == [[[0, 1], [2, 2]]] * 2
    assert [lane.tolist() for lane in blocks.run(poison_pads=True)] == [[[0, 1], [2, 0]]] * 2


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
def test_pads_of_small_numbers_are_poisoned(dtype: torch.dtype) -> None:
    """Formats of 8 bits have neither products nor indexed copies of their own."""
    lanes = oracle.Lanes([torch.tensor([4.0, 1.0, 2.0]).to(dtype)] * 2)
    rows = oracle.bind("shard", [lanes, 0, [3], [False], False, 0, 2, ""], {}, 2).run(poison_pads=True)
    assert [lane.float().tolist() for lane in rows] == [[4.0, 1.0], [2.0, 3.0]]
    dealt = oracle.bind("deal", [lanes, 0, [3], [True], False, 2], {}, 2)
    assert dealt.run(poison_pads=True)[0].float().tolist() == [4.0, 3.0, 1.0, 2.0]


def test_equal_values_are_computed_once() -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.exp(), ops.shard(x, 0, [4], [False], False, 0, 2, GROUP).exp()

    x = torch.randn(4)
    outputs = simulate(_graph(function, x), 2, [x])
    assert outputs[0][0] is outputs[1][0]
    assert outputs[0][1] is not outputs[1][1]


def test_in_place_writes_of_ranks_do_not_meet() -> None:
    """A shared value that ranks write differently gets one storage per rank; its views, made before, follow."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    base = graph.call_function(torch.ops.aten.clone.default, (x,))
    view = graph.call_function(torch.ops.aten.slice.Tensor, (base, 0, 0, 2))
    rows = graph.call_function(ops.shard.default, (x, 0, [4], [False], False, 0, 2, GROUP))
    graph.call_function(torch.ops.aten.copy_.default, (view, rows))
    graph.output((base, view, x))
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    outputs = simulate(torch.fx.GraphModule({}, graph), 2, [x])
    assert [[value.tolist() for value in out] for out in outputs] == [
        [[1, 2, 3, 4], [1, 2], [1, 2, 3, 4]],
        [[3, 4, 3, 4], [3, 4], [1, 2, 3, 4]],
    ]


def test_mutated_inputs_are_returned_and_the_callers_kept() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    doubled = graph.call_function(torch.ops.aten.mul.Tensor, (x, 2))
    graph.call_function(torch.ops.aten.copy_.default, (x, doubled))
    graph.output((doubled,))
    x = torch.ones(2)
    result = run(torch.fx.GraphModule({}, graph), 3, [x])
    assert x.tolist() == [1, 1]
    assert [inputs[0].tolist() for inputs in result.inputs] == [[2, 2]] * 3


def test_ranks_draw_the_same_random_numbers() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.rand_like(ops.shard(x, 0, [4], [False], False, 0, 2, GROUP))

    x = torch.randn(4)
    a, b = simulate(_graph(function, x), 2, [x])
    assert torch.equal(a[0], b[0])


def test_errors_name_the_node() -> None:
    x = torch.randn(4)
    gm = _graph(lambda x: ops.shard(x, 0, [4], [False], False, 0, 2, GROUP), x)
    with pytest.raises(VerificationError, match="for 2 ranks, the simulation has 3") as raised:
        simulate(gm, 3, [x])
    assert "while simulating" in raised.value.__notes__[0]
    with pytest.raises(UnsupportedError, match="does not know fxsp::nonsense"):
        oracle.bind("nonsense", [], {}, 2)
    with pytest.raises(VerificationError, match=r"output 0 of rank 1 is not that of rank 0"):
        check_replicated(simulate(gm, 2, [x]))


def test_check_replicated_allows_the_order_of_sums_only() -> None:
    a = torch.tensor([1.0, float("nan")], dtype=torch.float64)
    check_replicated([[a], [a * (1 + 1e-15)]])
    with pytest.raises(VerificationError, match="largest difference"):
        check_replicated([[a], [a * (1 + 1e-6)]])
    with pytest.raises(VerificationError, match="NaN in one"):
        check_replicated([[a], [a.nan_to_num()]])


# Partitioned programs written by hand, and what they compute: f(x, w) with one gradient for each.


def _whole_text(x: torch.Tensor, w: torch.Tensor, n: int, t: int, size: int) -> torch.Tensor:
    """Linear and gelu on [text whole | image], then gathered."""
    at = ([t, n - t], [True, False], 0, size, GROUP)
    rows = ops.shard(x, 1, *at[:2], False, *at[2:])
    return ops.gather(F.gelu(F.linear(rows, ops.use(w, GROUP))), 1, *at)


def _split_linear(x: torch.Tensor, w: torch.Tensor, n: int, t: int, size: int) -> torch.Tensor:
    at = ([t, n - t], [False, False], 0, size, GROUP)
    rows = ops.shard(x, 1, *at[:2], False, *at[2:])
    return ops.gather(F.gelu(F.linear(rows, ops.use(w, GROUP))), 1, *at)


def _plain(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.gelu(F.linear(x, w))


def _used_gather(x: torch.Tensor, w: torch.Tensor, n: int, t: int, size: int) -> torch.Tensor:
    """Scores of own queries against gathered keys."""
    at = ([n], [False], 0, size, GROUP)
    rows = F.linear(ops.shard(x, 1, *at[:2], False, *at[2:]), ops.use(w, GROUP))
    keys = ops.gather_used(rows, 1, *at)
    return ops.gather(torch.softmax(rows @ keys.transpose(1, 2), -1) @ keys, 1, *at)


def _plain_scores(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    rows = F.linear(x, w)
    return torch.softmax(rows @ rows.transpose(1, 2), -1) @ rows


def _reduced(x: torch.Tensor, w: torch.Tensor, n: int, t: int, size: int) -> torch.Tensor:
    """Linear attention: a sum over tokens is partial, and used with shards again."""
    at = ([t, n - t], [True, False], 0, size)
    rows = ops.shard(x, 1, *at[:2], False, *at[2:], GROUP)
    rows = F.linear(rows, ops.use(w, GROUP))
    state = ops.all_reduce(ops.mask_pads(rows, 1, *at).transpose(1, 2) @ rows, GROUP)
    return ops.gather(rows @ ops.use(state, GROUP), 1, *at, GROUP)


def _plain_reduced(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    rows = F.linear(x, w)
    return rows @ (rows.transpose(1, 2) @ rows)


def _exchanged(x: torch.Tensor, w: torch.Tensor, n: int, t: int, size: int) -> torch.Tensor:
    """Tokens to channels and back, a cumulative sum over all tokens between."""
    at = ([n], [False], 0, size, GROUP)
    local, channels = -(-n // size), 12 // size
    rows = F.linear(ops.shard(x, 1, *at[:2], False, *at[2:]), ops.use(w, GROUP)).repeat(1, 1, 4)
    sent = rows.view(2, local, size, channels).permute(2, 0, 1, 3).contiguous()
    tokens = ops.all_to_all(sent, GROUP).permute(1, 0, 2, 3).reshape(2, size * local, channels).narrow(1, 0, n)
    tokens = F.pad(tokens.cumsum(1).transpose(1, 2), (0, size * local - n), mode="replicate").transpose(1, 2)
    sent = tokens.reshape(2, size, local, channels).transpose(0, 1).contiguous()
    rows = ops.all_to_all(sent, GROUP).permute(1, 2, 0, 3).reshape(2, local, 12)
    return ops.gather(rows, 1, *at)


def _plain_cumsum(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.linear(x, w).repeat(1, 1, 4).cumsum(1)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [2, 5, 8])
@pytest.mark.parametrize(
    ("local", "plain"),
    [
        (_whole_text, _plain),
        (_split_linear, _plain),
        (_used_gather, _plain_scores),
        (_reduced, _plain_reduced),
        (_exchanged, _plain_cumsum),
    ],
)
def test_gradients_of_ranks_are_those_of_one_process(
    local: Callable[..., torch.Tensor], plain: Callable[..., torch.Tensor], n: int, size: int
) -> None:
    x = torch.randn(2, n, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    gm = _graph(lambda x, w: local(x, w, n, 1, size), x.detach(), w.detach())
    expected = plain(x, w)
    g = torch.randn_like(expected)
    outputs, grads = simulate_with_grads(gm, size, [x, w], [g])
    torch.testing.assert_close(check_replicated(outputs)[0], expected.detach())
    for ours, theirs in zip(check_replicated(grads), torch.autograd.grad(expected, [x, w], g), strict=True):
        torch.testing.assert_close(ours, theirs)
