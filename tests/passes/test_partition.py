"""Local programs: what moves, how often, and what the report says about it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.fx import GraphModule

from fxsp.config import Options
from fxsp.errors import VerificationError
from fxsp.passes.base import Program
from fxsp.passes.builder import Builder
from fxsp.passes.graph import facts, mark
from fxsp.passes.pipeline import Runner, partition_program
from fxsp.simulation.machine import simulate
from fxsp.types import Ranks
from lockstep import gradients
from replicated import check_replicated
from splitting import W, X, Y, implicit, tokens
from tracing import check, collectives, gather, graph_of, partition, shard, text_of, trace

# Golden programs.


def test_the_example_of_the_pass() -> None:
    text = text_of(lambda x: torch.softmax(shard(x), -1).flatten(0, 1), torch.randn(2, 5, 8))
    assert text.splitlines() == [
        "P=2, 6 values, 1 collective sends 192 B per rank",
        "  x_1                R              f32[2, 5, 8]  input",
        "  shard_default      S(1, [5])      f32[2, 3, 8]  shard(x_1, 1, [5], rank)",
        "  softmax_int        S(1, [5])      f32[2, 3, 8]  softmax(shard_default, -1)",
        "  reshape_default    S(0, 2*[5]*1)  f32[6, 8]     reshape(softmax_int, [6, 8])",
        "  reshape_default_1                 f32[2, 3, 8]  reshape(reshape_default, [2, 3, 8])",
        "▶ gather_default                    f32[2, 5, 8]  gather(reshape_default_1, 1, [5], rank)  192 B",
        "  reshape_default_2  R              f32[10, 8]    reshape(gather_default, [10, 8])",
        "                                                  return reshape_default_2",
    ]


def test_the_text_is_the_same_on_every_rank() -> None:
    def text(rank: int) -> str:
        from fxsp.inspection.printer import format_graph

        program = Program(trace(lambda x, w: F.linear(tokens(x), w).mean(1), X, W), Ranks(rank, 3, "simulated"))
        return format_graph(partition_program(program).gm, program.ranks)

    assert text(0) == text(1) == text(2)


def test_mean_over_tokens_is_one_all_reduce_of_masked_summands() -> None:
    assert graph_of(partition(lambda x: tokens(x).mean(1), X)) == [
        "shard_default S(1, [5]) f64[2, 3, 4] shard(x_1, 1, [5], rank)",
        "softmax_int S(1, [5]) f64[2, 3, 4] softmax(shard_default, -1)",
        "mask_pads_default f64[2, 3, 4] mask_pads(softmax_int, 1, [5], rank)",
        "sum_dim_int_list f64[2, 4] sum(mask_pads_default, [1], False, dtype=f64)",
        "div_tensor P f64[2, 4] div(sum_dim_int_list, 5)",
        "all_reduce_default R f64[2, 4] all_reduce(div_tensor) 64 B",
        "return all_reduce_default",
    ]


def test_linear_attention_is_one_small_all_reduce() -> None:
    """``K^T V`` contracts over the tokens."""

    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        x = F.linear(tokens(x), w)
        return x @ (x.transpose(1, 2) @ x)

    for size in (2, 3, 4):
        program = check(function, X, W, size=size)
        assert collectives(program) == {"all_reduce": 1, "gather": 1}
        (record,) = [c for c in program.report.collectives if c.kind == "all_reduce"]
        assert record.bytes == -(-2 * (size - 1) * (2 * 4 * 4 * 8) // size)


def test_mlp_sends_nothing() -> None:
    assert graph_of(partition(lambda x, w: gather(F.gelu(F.linear(shard(x), w))).sum(), X, W)) == [
        "shard_default S(1, [5]) f64[2, 3, 4] shard(x_1, 1, [5], rank)",
        "linear_default S(1, [5]) f64[2, 3, 4] linear(shard_default, w_1)",
        "gelu_default S(1, [5]) f64[2, 3, 4] gelu(linear_default)",
        "gather_default f64[2, 5, 4] gather(gelu_default, 1, [5], rank) 192 B",
        "contiguous_default R f64[2, 5, 4] contiguous(gather_default)",
        "sum_1 R f64[] sum(contiguous_default)",
        "return sum_1",
    ]


# Sums and means.


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("text", [-1, 2])
@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sum(1),
        lambda x: x.mean(1, keepdim=True),
        lambda x: x.sum(),
        lambda x: x.mean((0, 1)),
        lambda x: x.flatten(0, 1).mean(0),
        lambda x: x.flatten(1, 2).sum(1),
        lambda x: x - x.mean(1, keepdim=True),
        lambda x: (x - x.mean(1, keepdim=True)).pow(2).mean(1),
        lambda x: (x > 0.25).sum(1),
        lambda x: torch.einsum("bsc,bsd->bcd", x, x),
    ],
)
def test_sums_over_tokens(function: Any, text: int, size: int) -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        return function(tokens(x, text))

    found = check(program, X, size=size)
    assert not implicit(found)
    assert collectives(found)["all_reduce"] in (1, 2)


def test_pads_must_be_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Builder, "mask_pads", lambda self, x, dim, sequence: x)
    with pytest.raises(AssertionError, match="not close"):
        check(lambda x: tokens(x).mean(1), X)


def test_pads_are_masked_once_for_all_sums() -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = tokens(x)
        return x.mean(1), x.sum(1), x.sum((0, 1))

    program = check(function, X)
    assert sum(n.target is torch.ops.fxsp.mask_pads.default for n in program.graph.nodes) == 1
    # Lengths that divide have no pads.
    program = check(function, X[:, :4].clone())
    assert not any(n.target is torch.ops.fxsp.mask_pads.default for n in program.graph.nodes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_single(dtype: torch.dtype) -> None:
    """257 summands of one: half precision itself would lose the last."""
    x = torch.ones(1, 257, 1, dtype=dtype)

    def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = shard(x).cos().sign()
        return x.sum(1), x.transpose(1, 2) @ x

    program = partition(function, x, size=2)
    total, product = check_replicated(simulate(program.gm, 2, [x]))
    assert total.dtype == product.dtype == dtype
    for graph in (n for n in program.graph.nodes if n.target is torch.ops.fxsp.all_reduce.default):
        assert facts(graph.args[0]).local.dtype == torch.float32
    assert total.item() == torch.tensor(257.0).to(dtype).item()


# Text that stays whole.


@pytest.mark.parametrize("size", [2, 3, 4])
def test_partial_input(size: int) -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = F.gelu(F.linear(shard(x, 1, 2), w))
        scale = 1 + x.mean(1, keepdim=True)
        return gather(x * scale), x[:, :2] * 3

    program = check(function, X, W, size=size)
    assert collectives(program) == {"all_reduce": 1, "gather": 1}
    # The image's rows travel, the text's do not.
    (record,) = [c for c in program.report.collectives if c.kind == "all_gather"]
    assert record.bytes == (size - 1) * 2 * -(-3 // size) * 4 * 8


# Shapes.


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_sizes_are_made_local(n: int, size: int) -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        b, s, c = x.shape
        x = tokens(x)
        heads = F.linear(x, w).view(b, s, 2, 2).transpose(1, 2).reshape(b * 2, s, 2)
        both = heads.view(b, 2, s, 2).permute(0, 2, 1, 3).reshape(b, s, c)
        wide = both.unsqueeze(1).expand(b, 3, s, c).sum(1).expand_as(x).view_as(x)
        return wide + torch.arange(s, dtype=x.dtype)[:, None] / s + x.reshape(b * s, c).view(b, s, c)

    program = check(function, X[:, :1].repeat(1, n, 1) + torch.arange(n)[:, None], W, size=size)
    # One token beside other sizes of 1: which of them is the tokens is a guess, that costs a gather if it is wrong.
    assert n == 1 or collectives(program) == {"gather": 1}


def test_sizes_of_a_split_value_lend_global_sizes() -> None:
    """``view_as`` and ``expand_as`` of a whole value beside a split one: its global shape counts."""

    def function(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = tokens(x)
        return y.view_as(x), z.expand_as(x), y.type_as(x), torch.zeros_like(x).sum() + y.sum()

    check(function, X, Y.reshape(2, 20), torch.randn(4, dtype=torch.float64))


def test_data_dependent_sizes_are_computed_on_whole_values() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        x = tokens(x)
        return x[x > 0.25].sum() + x.mean()

    program = check(function, X, training=False)
    assert [g.op for g in implicit(program)] == ["aten.index.Tensor"]


def test_broadcast_from_one_token() -> None:
    """A split sequence of one token against more: it is made whole, as any size of 1."""
    check(lambda x, y: tokens(x) * y + tokens(y), X[:, :1].clone(), Y, size=2)


# What the checks between passes find.


def test_a_wrong_local_shape_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxsp.passes.special import sums as sized

    def global_sizes(build: Any, node: Any, type_: Any) -> list[Any]:
        return list(node.meta["val"].shape)

    monkeypatch.setattr(sized, "local_sizes", global_sizes)
    with pytest.raises((VerificationError, RuntimeError), match=r"local shape|invalid for input"):
        partition(lambda x: tokens(x).unsqueeze(0).expand(2, -1, -1, -1), X)


def test_a_value_without_type_is_found() -> None:
    from fxsp.passes.verify import verify_types

    gm = trace(lambda x: shard(x).exp(), X)
    with pytest.raises(VerificationError, match="no type: "):
        verify_types(Program(gm, Ranks(0, 2, "g")))


# Gradients left to an outer reducer.


def test_deferred_gradients_are_summands() -> None:
    """Parameters keep their own rank's part; the sum over the ranks is the gradient, of one number, too."""

    def function(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return F.linear(tokens(x), w), w.sum() * b + b

    leaves = [t.clone().requires_grad_() for t in (X, W, torch.tensor(2.0, dtype=torch.float64))]
    outputs = function(*leaves)
    given = [torch.randn_like(y) for y in outputs]
    expected = torch.autograd.grad(outputs, leaves, given)

    def parameters(gm: GraphModule) -> None:
        for node in gm.graph.find_nodes(op="placeholder")[1:]:
            mark(node, is_parameter=True)

    gm = trace(function, *(x.detach() for x in leaves))
    parameters(gm)
    program = Program(gm, Ranks(0, 3, "simulated"), training=True, options=Options(grad_reduce="defer"))
    local = partition_program(program, Runner(check=True)).gm
    assert not any(n.target is torch.ops.fxsp.use.default for n in local.graph.nodes)
    _, grads = gradients(local, 3, leaves, given)
    torch.testing.assert_close(grads[0][0], expected[0])
    for i in (1, 2):
        torch.testing.assert_close(sum(g[i] for g in grads), expected[i])
