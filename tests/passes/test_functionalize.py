"""*functionalize*: in-place writes become values; what eager mode computes, shares and writes to inputs stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils._pytree import tree_leaves

from inplace_programs import PROGRAMS, gap, halves, inputs_swapped, parts_of_what_was_written, rotary
from models import wan
from normalizing import Passes, compare

# Dynamo looks at the gradients of inputs that have a history.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
aten = torch.ops.aten
torch.manual_seed(0)
X, Y = torch.randn(4, 8), torch.randn(4, 8)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_same_as_eager(program: Any, train: bool) -> None:
    compare(program, X, Y, train=train)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_same_as_eager_with_symbolic_sizes(program: Any) -> None:
    compare(program, X, Y, dynamic=True)


@pytest.mark.parametrize("dynamic", [False, True])
def test_writes_to_parts_of_what_was_written_before(dynamic: bool) -> None:
    compare(parts_of_what_was_written, X, Y, dynamic=dynamic)


def test_parts_of_a_split() -> None:
    def parts(x):
        x = x * 1
        a, b = x.chunk(2, -1)
        a.mul_(2)
        b.add_(a)
        x.unbind(0)[1].zero_()
        return x, b * 1

    compare(parts, X)
    compare(parts, X, dynamic=True)


def test_a_slice_that_is_all_of_the_length_seen_is_a_slice_at_another_length() -> None:
    def first_four(x):
        x = x * 1
        x.narrow(0, 0, 4).mul_(2)
        return x

    backend = Passes()
    torch._dynamo.reset()
    compiled = torch.compile(first_four, backend=backend, fullgraph=True)
    for rows in (4, 7):
        x = torch.randn(rows, 8)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(x), first_four(x))
    assert len(backend.graphs) == 1


def test_bodies_of_islands_lose_nothing() -> None:
    """The calls that end a level of functorch have no users, and are no dead code."""

    def mapped(x, y):
        x = x * 1
        x.mul_(2)
        return torch.func.vmap(lambda row: row.softmax(0) * row.sum())(x) + y

    compare(mapped, X, Y)
    compare(mapped, X, Y)


def test_interleaved_writes_become_one_stack() -> None:
    targets = compare(rotary, X, Y).targets()
    assert targets.count(aten.stack.default) == targets.count(aten.flatten.using_ints) == 1
    assert not {aten.slice_scatter.default, aten.empty_like.default} & set(targets)


def test_adjacent_writes_become_one_cat() -> None:
    targets = compare(halves, X, Y).targets()
    assert targets.count(aten.cat.default) == 1
    assert not {aten.slice_scatter.default, aten.empty_like.default} & set(targets)


def test_writes_with_gaps_keep_the_rest() -> None:
    targets = compare(gap, X, Y).targets()
    assert targets.count(aten.slice_scatter.default) == 2


def test_written_inputs_are_copied_to_in_order() -> None:
    graph = compare(inputs_swapped, X, Y).graph
    writes = [node for node in graph.nodes if node.target is aten.copy_.default]
    assert [node.args[0].name for node in writes] == ["l_x_", "l_y_"]


def test_wan_has_no_writes_and_no_uninitialised_memory() -> None:
    model, inputs = wan()
    backend = Passes()
    with torch.no_grad():
        torch.compile(model, backend=backend)(**inputs)
    assert aten.empty_like.default not in backend.targets()
    assert aten.slice_scatter.default not in backend.targets()
    assert backend.targets().count(aten.stack.default) == 2  # q and k of one self-attention


def test_graph_without_writes_is_untouched() -> None:
    from fxsp.passes.functionalize.functionalize import functionalize

    backend = compare(lambda x: x.view(-1).sin(), X, backend=Passes(functional=False))
    (gm,) = backend.graphs
    before = list(gm.graph.nodes)
    assert functionalize(gm) is gm
    assert list(gm.graph.nodes) == before


def test_new_nodes_know_where_they_come_from() -> None:
    class Block(torch.nn.Module):
        def forward(self, x):
            out = torch.empty_like(x)
            out[..., 0::2] = x[..., :4]
            out[..., 1::2] = x[..., 4:]
            return out

    model = torch.nn.Sequential(Block())
    graph = compare(model, X).graph
    (stack,) = graph.find_nodes(op="call_function", target=aten.stack.default)
    assert "Block" in str(stack.meta["nn_module_stack"])
    assert __file__ in stack.meta["stack_trace"]


def test_write_to_an_annotated_value_is_a_write_to_the_value() -> None:
    def program(x):
        x = x * 1
        y = x.sin()
        x.add_(1)
        return x + y

    def annotate(gm: torch.fx.GraphModule) -> None:
        (write,) = gm.graph.find_nodes(op="call_method", target="add_")
        value = write.args[0]
        with gm.graph.inserting_before(write):
            new = gm.graph.call_function(torch.ops.fxsp.annotate.default, (value, "shard", 1, -1, "entry"))
        new.meta = dict(value.meta)
        write.args = (new, *write.args[1:])
        gm.recompile()

    assert torch.ops.fxsp.annotate.default in compare(program, X, backend=Passes(change=annotate)).targets()


def test_random_draws_stay_in_order() -> None:
    def program(x):
        x = x * 1
        unused = torch.rand_like(x)
        unused.add_(1)
        x.add_(torch.rand_like(x))
        return x

    torch.manual_seed(3)
    want = program(X)
    torch._dynamo.reset()
    torch.manual_seed(3)
    assert torch.equal(torch.compile(program, backend=Passes())(X), want)


def unfolded(x):
    x = x * 1
    x.unfold(1, 2, 2).add_(1)
    return x


def through_detach(x):
    x = x * 1
    x.detach().mul_(2)
    return x


def lists(x):
    a = x * 1
    torch._foreach_add_([a], 1.0)
    return a


def batch_norm(x):
    return torch.nn.functional.batch_norm(x, torch.zeros(8), torch.ones(8), training=True)


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (unfolded, ["unfold", "view", "test_functionalize.py:"]),
        (through_detach, ["mul_", "detach()", "test_functionalize.py:"]),
        (lists, ["_foreach_add_", "test_functionalize.py:"]),
        (batch_norm, ["batch_norm", "test_functionalize.py:"]),
    ],
    ids=lambda p: getattr(p, "__name__", ""),
)
def test_refuses_writes_it_does_not_know(program: Any, words: list[str]) -> None:
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match="UnsupportedError") as caught:
        torch.compile(program, backend=Passes())(X.clone().requires_grad_())
    assert all(word in str(caught.value) for word in words)


def test_many_writes_cost_linearly_many_nodes() -> None:
    def program(x, n):
        z = torch.empty_like(x)
        for i in range(n):
            z[:, i % 8].add_(i)
            z = z.view(4, 8)
        return z

    def nodes(n: int) -> int:
        torch._dynamo.reset()
        backend = Passes()
        torch.compile(program, backend=backend)(X, n)
        return len(backend.graph.nodes)

    assert nodes(40) < 2.5 * nodes(20)


def test_outputs_share_memory_as_before() -> None:
    def program(x, y):
        a = x * 1
        b = torch.empty_like(x)
        b.copy_(a)
        return a, b, a.view(-1)

    assert len(tree_leaves(compare(program, X, Y).graph.output_node().args)) == 3
