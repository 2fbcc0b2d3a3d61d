"""Helpers for *normalize* and *functionalize*: compile with the passes as the backend, compare with eager mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

import fxsp.kernels.ops  # noqa: F401  (fxsp.annotate)
from fxsp import torch_internals
from fxsp.passes.functionalize.functionalize import functionalize
from fxsp.passes.functionalize.inplace import written_arguments
from fxsp.passes.normalize.normalize import normalize


@dataclass
class Passes:
    """A backend that runs the two passes and then the graph, as it is."""

    change: Callable[[torch.fx.GraphModule], None] = lambda gm: None
    functional: bool = True
    graphs: list[torch.fx.GraphModule] = field(default_factory=list)
    new_guards: set[str] = field(default_factory=set)

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.change(gm)
        env = torch_internals.compile_fake_mode(inputs).shape_env
        before = {str(guard.expr) for guard in env.guards}
        new = normalize(gm, inputs)
        if self.functional:
            new = functionalize(new)
            check_functional(new)
        self.new_guards |= {str(guard.expr) for guard in env.guards} - before
        check_metadata(new)
        self.graphs.append(new)

        def run(*args: Any) -> Any:
            with torch_internals.without_autocast():
                return new(*args)

        return run

    @property
    def graph(self) -> torch.fx.Graph:
        (graph,) = self.graphs
        return graph.graph

    def targets(self) -> list[Any]:
        return [node.target for node in self.graph.nodes if node.op == "call_function"]


def check_functional(gm: torch.fx.GraphModule) -> None:
    """No writes, but for the ``copy_`` to graph inputs at the very end."""
    rest = [node for node in gm.graph.nodes if node.op == "call_function"]
    writes = [node for node in rest if written_arguments(node)]
    for node in writes:
        assert node.target is torch.ops.aten.copy_.default
        assert node.args[0].op == "placeholder"
        assert not [user for user in node.args[0].users if user > node and user not in writes]


def check_metadata(gm: torch.fx.GraphModule) -> None:
    """Values are fakes of one mode, and what an operator gives on the values of its arguments."""
    modes = set()
    for node in gm.graph.nodes:
        if node.op in ("output", "get_attr") or node.target is torch.ops.aten.copy_.default:
            continue
        assert "val" in node.meta, node
        modes |= {torch_internals.fake_mode_of(v) for v in tree_leaves(node.meta["val"]) if isinstance(v, torch.Tensor)}
        if node.op == "call_function" and torch_internals.is_operator(node.target):
            assert node.meta.get("stack_trace"), node
    assert len(modes) <= 1


def compare(
    function: Callable[..., Any],
    *inputs: Any,
    train: bool = False,
    dynamic: bool | None = None,
    backend: Passes | None = None,
    tolerance: float = 1e-6,
    **keywords: Any,
) -> Passes:
    """Eager against compiled: outputs with all their facts, what is written to inputs, aliasing, gradients."""
    torch._dynamo.reset()
    backend = backend or Passes()
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)
    results = []
    for run in (function, compiled):
        leaves = [x.clone().requires_grad_(train and x.is_floating_point()) if _tensor(x) else x for x in inputs]
        # Inputs with a history: only those may be written to while gradients are recorded.
        args = [x * 1 if _tensor(x) and x.requires_grad else x for x in leaves]
        with torch.set_grad_enabled(train):
            output = run(*args, **keywords)
        parameters = [p for p in getattr(function, "parameters", list)() if p.requires_grad]
        results.append((output, args, [x for x in leaves if _tensor(x) and x.requires_grad] + parameters))
    (want, want_args, want_leaves), (found, found_args, found_leaves) = results
    everything, everything_found = tree_leaves((want, want_args)), tree_leaves((found, found_args))
    assert len(everything) == len(everything_found)
    for a, b in zip(everything, everything_found, strict=True):
        assert type(a) is type(b)
        if _tensor(a):
            assert (a.dtype, a.shape, a.requires_grad) == (b.dtype, b.shape, b.requires_grad)
            assert a.stride() == b.stride()
            torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance, equal_nan=True)
        else:
            assert a == b
    assert aliases(everything_found) == aliases(everything)
    if train:
        for a, b in zip(_gradients(want, want_leaves), _gradients(found, found_leaves), strict=True):
            assert b is None or a is not None
            if a is not None:
                # No gradient at all is as good as the zeros that eager mode has for a value that was overwritten.
                torch.testing.assert_close(torch.zeros_like(a) if b is None else b, a, rtol=1e-5, atol=1e-5)
    return backend


def aliases(values: list[Any]) -> list[int]:
    """For each tensor the first one with the same storage."""
    keys = [x.untyped_storage().data_ptr() for x in values if _tensor(x)]
    return [keys.index(key) for key in keys]


def gradients_of(model: torch.nn.Module, output: torch.Tensor) -> list[torch.Tensor | None]:
    return list(torch.autograd.grad(output.float().square().mean(), list(model.parameters()), allow_unused=True))


def _gradients(output: Any, leaves: list[torch.Tensor]) -> list[torch.Tensor | None]:
    terms = [
        x.float().square().sum() * (1 + i) for i, x in enumerate(tree_leaves(output)) if _tensor(x) and x.requires_grad
    ]
    if not terms:
        return []
    return list(torch.autograd.grad(torch.stack(terms).sum(), leaves, allow_unused=True))


def _tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def to_bfloat16(values: Any) -> Any:
    return tree_map(lambda v: v.bfloat16() if _tensor(v) and v.is_floating_point() else v, values)
