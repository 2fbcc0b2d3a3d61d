"""*normalize*: Dynamo's graph as ATen operators; the same numbers, gradients and facts, whatever the context."""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from fxsp import torch_internals
from fxsp.passes.functionalize.functionalize import functionalize
from fxsp.passes.graph import facts
from fxsp.passes.normalize.normalize import normalize
from models import MODELS, first_tensor, llama, wan
from normalizing import Passes, compare, gradients_of, to_bfloat16

pytestmark = [
    # Dynamo looks at the gradients of inputs that have a history.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    # Autocast and float32 weights.
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),
]
aten = torch.ops.aten


def autocast() -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.fixture
def layer() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(4, 4)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


# --- real models


@pytest.mark.parametrize("name", MODELS)
def test_model_in_inference(name: str) -> None:
    model, inputs = MODELS[name](batch=2)
    backend = Passes()
    torch._dynamo.reset()
    with torch.no_grad():
        found, want = torch.compile(model, backend=backend)(**inputs), model(**inputs)
    torch.testing.assert_close(first_tensor(found), first_tensor(want), rtol=0, atol=1e-6)
    assert len(backend.graphs) == 1
    assert aten.scaled_dot_product_attention.default in backend.targets()
    assert all(torch_internals.is_operator(t) or t.__module__ == "_operator" for t in backend.targets())


@pytest.mark.parametrize("name", ["flux", "wan", "llama"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast"])
def test_model_in_training(name: str, kind: str) -> None:
    model, inputs = MODELS[name]()
    if kind == "bfloat16":
        model, inputs = model.bfloat16(), to_bfloat16(inputs)
    torch._dynamo.reset()
    # Where gradients of a value with several uses are added up in another order, they are rounded differently.
    tolerance = 1e-5 if kind == "float32" else 3e-2
    with autocast() if kind == "autocast" else contextlib.nullcontext():
        found, want = (first_tensor(m(**inputs)) for m in (torch.compile(model, backend=Passes()), model))
    assert found.dtype == want.dtype
    torch.testing.assert_close(found, want, rtol=0, atol=0)
    for a, b in zip(gradients_of(model, want), gradients_of(model, found), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).abs().max() <= tolerance * a.abs().max()


@pytest.mark.parametrize(("build", "key"), [(llama, "tokens"), (wan, "frames")], ids=["llama", "wan"])
def test_one_graph_for_several_lengths(build: Any, key: str) -> None:
    model, _ = build()
    backend = Passes()
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend=backend, dynamic=True)
        for length in (5, 11, 6):
            _, inputs = build(**{key: length})
            found, want = first_tensor(compiled(**inputs)), first_tensor(model(**inputs))
            torch.testing.assert_close(found, want, rtol=0, atol=1e-6)
    assert len(backend.graphs) == 1
    assert not backend.new_guards


def test_guards_are_those_that_aot_autograd_adds_as_well() -> None:
    def program(x: torch.Tensor, n: int) -> torch.Tensor:
        return torch.cat([x[-(n - n // 2) :], x[: n // 2]]).view(1, -1).expand(3, -1) * 2

    backend = Passes()
    theirs: set[str] = set()

    def plain(gm: torch.fx.GraphModule, args: list[Any]) -> Any:
        env = torch_internals.compile_fake_mode(args).shape_env
        before = {str(guard.expr) for guard in env.guards}
        run = aot_autograd(fw_compiler=lambda g, _: make_boxed_func(g))(gm, args)
        theirs.update({str(guard.expr) for guard in env.guards} - before)
        return run

    for each in (backend, plain):
        torch._dynamo.reset()
        torch.compile(program, backend=each, dynamic=True)(torch.randn(20, 4), 9)
    assert backend.new_guards <= theirs


# --- form


def test_one_spelling_and_the_origin_of_each_node(layer: torch.nn.Linear) -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b = x.chunk(2, dim=-1)
            y = F.layer_norm(self.layer(x), (4,)).view(-1, 2, 2).flatten(1)
            return torch.cat([a, b], -1) + y.unflatten(1, (2, 2)).reshape(x.shape)

    graph = compare(Block(), torch.randn(3, 4)).graph
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    for op in ("chunk", "linear", "layer_norm", "view", "flatten.using_ints", "cat", "unflatten.int", "reshape"):
        assert any(name.startswith(f"aten.{op}") for name in names), op
    (linear,) = graph.find_nodes(op="call_function", target=aten.linear.default)
    assert "layer" in str(linear.meta["nn_module_stack"])
    assert "normalize.py" in linear.meta["stack_trace"]
    assert [n.target for n in graph.find_nodes(op="placeholder")] == [
        n.name.replace("l_", "L_", 1) for n in graph.find_nodes(op="placeholder")
    ]


def test_sizes_constants_and_none(x: torch.Tensor) -> None:
    def program(x: torch.Tensor) -> Any:
        n = x.shape[0]
        return x.view(-1) * n, n * 2, x.new_zeros(n + 1), x + torch.tensor([1.0, 2, 3, 4]), None, x

    for dynamic in (None, True):
        compare(program, x, dynamic=dynamic)


def test_works_outside_of_a_compilation() -> None:
    graph = torch.fx.symbolic_trace(lambda x, w: torch.relu(x @ w).sum(-1))
    mode = torch_internals.compile_fake_mode()
    inputs = [mode.from_tensor(t) for t in (torch.randn(2, 3), torch.randn(3, 5))]
    new = normalize(graph, inputs)
    a, b = torch.randn(2, 3), torch.randn(3, 5)
    torch.testing.assert_close(new(a, b), torch.relu(a @ b).sum(-1))
    assert new.graph.output_node().args[0].meta["val"].shape == (2,)


def test_annotations_survive(x: torch.Tensor) -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.fxsp.annotate(x.sin(), "shard", 1, -1, "entry") * 2

    for train in (False, True):
        graph = compare(program, x, train=train).graph
        (node,) = graph.find_nodes(op="call_function", target=torch.ops.fxsp.annotate.default)
        assert node.args[1:] == ("shard", 1, -1, "entry")


# --- contexts


def test_autocast_becomes_casts(layer: torch.nn.Linear, x: torch.Tensor) -> None:
    w = torch.randn(4, 4)

    def program(x: torch.Tensor) -> Any:
        with autocast():
            y = layer(x)
            e = torch.einsum("ij,kj->ik", y, x)
            s = torch.softmax(y, -1)
            n = F.layer_norm(y, (4,))
            c = torch.cat([y, x])
            a = F.scaled_dot_product_attention(x[None], y[None].float(), y[None])
            with torch.autocast("cpu", enabled=False):
                z = layer(x)
        return y, e, s, n, c, a, z, layer(x) @ w

    for train in (False, True):
        backend = compare(program, x, train=train)
    nodes = backend.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert [n.meta["val"].dtype for n in nodes] == [torch.bfloat16, torch.float32, torch.float32]
    assert all(n.args[0].meta["val"].dtype == n.meta["val"].dtype for n in nodes)
    assert not any("autocast" in str(target) for target in backend.targets())


def test_autocast_around_the_compiled_function(layer: torch.nn.Linear, x: torch.Tensor) -> None:
    def program(x: torch.Tensor) -> Any:
        y = layer(x)
        with torch.autocast("cpu", enabled=False):
            z = layer(x)
        return y, z, torch.einsum("ij,kj->ik", z, x)

    with autocast():
        backend = compare(program, x)
        assert torch.is_autocast_enabled("cpu")
    # The casts are in the graph: it gives the same outside.
    assert [o.dtype for o in backend.graphs[0](layer.weight, layer.bias, x)] == [
        torch.bfloat16,
        torch.float32,
        torch.bfloat16,
    ]


def test_einsum_stays_whole_without_autocast(x: torch.Tensor) -> None:
    assert aten.einsum.default in compare(lambda x: torch.einsum("ij,kj->ik", x, x), x).targets()


def test_autocast_state_is_put_back_after_a_failure(x: torch.Tensor) -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        with autocast(), torch.no_grad():
            return x.add_(1)

    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed):
        torch.compile(program, backend=Passes())((x * 1).requires_grad_() * 1)
    assert not torch.is_autocast_enabled("cpu")


def test_no_grad_becomes_detached_values(layer: torch.nn.Linear, x: torch.Tensor) -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        h = layer(x)
        with torch.no_grad():
            m = h.mean(-1, keepdim=True)
            u = torch.zeros_like(h)
            u[0] = h[0]
            with torch.enable_grad():
                v = h * 2
        with torch.inference_mode():
            w = h.exp()
        return h - m + v * u + w

    graph = compare(program, x, train=True).graph
    (mean,) = graph.find_nodes(op="call_function", target=aten.mean.dim)
    assert mean.args[0].target is aten.detach.default
    assert not any(n.args[0].target is aten.detach.default for n in graph.nodes if n.target is aten.linear.default)
    assert not any("grad" in str(n.target) for n in graph.nodes)
    # Without gradients there is nothing to detach.
    assert aten.detach.default not in compare(program, x).targets()


def test_checkpoints_are_recomputed_as_by_torch(layer: torch.nn.Linear, x: torch.Tensor) -> None:
    def body(a: torch.Tensor) -> torch.Tensor:
        return torch.sin(layer(torch.sin(layer(a)))).cos().relu()

    save_matmuls = functools.partial(create_selective_checkpoint_contexts, [aten.addmm.default])
    plain = functools.partial(checkpoint, body, use_reentrant=False)
    selective = functools.partial(checkpoint, body, use_reentrant=False, context_fn=save_matmuls)
    x = x.requires_grad_()

    def saved(block: Any, ours: bool) -> tuple[int, int]:
        """Values kept for the backward pass, and matmuls and sines in the backward graph."""
        counts = []

        def forward(gm: torch.fx.GraphModule, _: Any) -> Any:
            outputs = gm.graph.output_node().args[0]
            counts.append(sum(n.op != "placeholder" and n.target is not aten.t.default for n in outputs))
            return make_boxed_func(gm)

        def backward(gm: torch.fx.GraphModule, _: Any) -> Any:
            counts.append(sum(n.target in (aten.addmm.default, aten.sin.default) for n in gm.graph.nodes))
            return make_boxed_func(gm)

        inner = aot_autograd(fw_compiler=forward, bw_compiler=backward)
        backend = (lambda gm, args: inner(functionalize(normalize(gm, args)), args)) if ours else inner
        torch._dynamo.reset()
        output = torch.compile(lambda x: block(block(x)).sum(), backend=backend, fullgraph=True)(x)
        parameters = [x, *layer.parameters()]
        want = torch.autograd.grad(body(body(x)).sum(), parameters)
        for a, b in zip(want, torch.autograd.grad(output, parameters), strict=True):
            torch.testing.assert_close(b, a)
        return counts[0], counts[1]

    logging.getLogger("torch._higher_order_ops.wrap").disabled = True
    results = {block: saved(block, ours=True) for block in (body, plain, selective)}
    assert results == {block: saved(block, ours=False) for block in (body, plain, selective)}
    assert results[plain][0] < results[selective][0] < results[body][0]


# --- islands


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> Any:
        ctx.save_for_backward(x)
        return x * 2, x @ w

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor, h: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return g * 3 + x, None


def islands(backend: Passes) -> list[str]:
    return [facts(node).island for node in backend.graph.nodes if facts(node).island]


@pytest.mark.parametrize("context", [contextlib.nullcontext, autocast], ids=["plain", "autocast"])
def test_custom_gradient_is_an_island(x: torch.Tensor, context: Any) -> None:
    w = torch.randn(4, 4)

    def program(x: torch.Tensor) -> Any:
        with context():
            a, b = Doubled.apply(x * 1, w)
        return a + 1, b

    backend = compare(program, x, train=True)
    assert islands(backend) == ["higher-order operator autograd_function_apply"]


def test_functorch_transforms_are_islands(x: torch.Tensor) -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        y = torch.vmap(torch.vmap(lambda a, b: a * b + x.sum()))(x, x.cos())
        return torch.func.grad(lambda t: (t**2).sum())(x) + y.sin()

    for train in (False, True):
        backend = compare(program, x, train=train)
        assert islands(backend) == ["functorch transform"] * 2
        assert aten.sin.default in backend.targets()


def test_empty_tensors_that_cat_ignores(x: torch.Tensor) -> None:
    # A key/value cache begins with `torch.tensor([])`.
    def program(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.tensor([]), x, x], 0) * torch.cat([torch.zeros(0, dtype=torch.float64), x, x]).float()

    backend = Passes()
    torch.testing.assert_close(torch.compile(program, backend=backend)(x), program(x), rtol=0, atol=0)
    operands = [len(node.args[0]) for node in backend.graph.nodes if node.target is aten.cat.default]
    assert operands == [2, 3]  # the empty float64 decides the dtype


def test_control_flow_is_an_island(x: torch.Tensor) -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda t: t.sin(), lambda t: t.cos(), (x,))

    assert islands(compare(program, x)) == ["higher-order operator cond"]


# --- refusals


def refusal(program: Any, *inputs: Any, change: Any = lambda gm: None) -> str:
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match="UnsupportedError") as caught:
        torch.compile(program, backend=Passes(change=change))(*inputs)
    return str(caught.value)


def test_refuses_a_write_that_autograd_does_not_see(layer: torch.nn.Linear, x: torch.Tensor) -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        h = layer(x)
        with torch.no_grad():
            h.add_(1)
        return h

    message = refusal(program, x)
    assert "add_ (test_normalize.py:" in message
    assert "no_grad" in message


def test_refuses_facts_that_differ_from_dynamos(x: torch.Tensor) -> None:
    def change(gm: torch.fx.GraphModule) -> None:
        (node,) = gm.graph.find_nodes(op="call_method", target="sin")
        node.target = "double"

    message = refusal(lambda x: x.sin(), x, change=change)
    assert "dtype is torch.float64, but Dynamo recorded torch.float32" in message


def test_refuses_sharing_that_differs_from_dynamos(x: torch.Tensor) -> None:
    def change(gm: torch.fx.GraphModule) -> None:
        (node,) = gm.graph.find_nodes(op="call_method", target="clone")
        node.target = "contiguous"

    assert "shares memory with input 0" in refusal(lambda x: x.clone(), x, change=change)


def test_names_the_operation_that_fails(x: torch.Tensor) -> None:
    def change(gm: torch.fx.GraphModule) -> None:
        (node,) = gm.graph.find_nodes(op="call_method", target="sin")
        node.target = "no_such_method"

    message = refusal(lambda x: x.sin(), x, change=change)
    assert "no_such_method (test_normalize.py:" in message
