"""Random programs of views and writes: the values, the sharing and the gradients of eager mode."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxsp import torch_internals
from fxsp.passes.functionalize.functionalize import functionalize
from fxsp.passes.normalize.normalize import normalize
from normalizing import aliases, check_functional

Program = list[tuple[str, tuple[int, ...]]]

#: A view of any tensor, from three random numbers.
VIEWS = {
    "slice": lambda t, a, b, c: t.narrow(a % t.ndim, 0, 1 + b % t.shape[a % t.ndim]),
    "step": lambda t, a, b, c: t[(slice(None),) * (a % t.ndim) + (slice(b % 2, None, 1 + c % 2),)],
    "tail": lambda t, a, b, c: t[..., t.shape[-1] // 2 :],
    "select": lambda t, a, b, c: t.select(a % t.ndim, b % t.shape[a % t.ndim]) if t.ndim > 1 else t.view(t.shape),
    "transpose": lambda t, a, b, c: t.transpose(a % t.ndim, b % t.ndim),
    "permute": lambda t, a, b, c: t.movedim(0, -1),
    "unsqueeze": lambda t, a, b, c: t.unsqueeze(a % (t.ndim + 1)),
    "flatten": lambda t, a, b, c: t.reshape(-1),
    "unflatten": lambda t, a, b, c: t.unflatten(-1, (-1, 1)),
    "chunk": lambda t, a, b, c: t.chunk(2, a % t.ndim)[0],
    "split": lambda t, a, b, c: t.split(1, a % t.ndim)[-1],
    "alias": lambda t, a, b, c: t.contiguous(),
    "clone": lambda t, a, b, c: t * 2 + 1,
    "empty": lambda t, a, b, c: torch.zeros_like(t),
}
#: A write to a tensor, from another one and a random number.
WRITES = {
    "add": lambda t, s, a: t.add_(s.sum()),
    "mul": lambda t, s, a: t.mul_(1 + a % 3),
    "copy": lambda t, s, a: t.copy_(s.mean()),
    "same": lambda t, s, a: t.copy_(s) if t.shape == s.shape else t.neg_(),
    "fill": lambda t, s, a: t.fill_(a),
    "zero": lambda t, s, a: t.zero_(),
    "clamp": lambda t, s, a: t.clamp_(max=float(a)),
}

view = st.tuples(st.sampled_from(sorted(VIEWS)), st.tuples(*[st.integers(0, 5)] * 4))
write = st.tuples(st.sampled_from(sorted(WRITES)), st.tuples(*[st.integers(0, 9)] * 3))
programs = st.lists(st.one_of(view, write), min_size=1, max_size=9)


def run(program: Program, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    values = [x, y]
    for name, numbers in program:
        if name in VIEWS:
            values.append(VIEWS[name](values[numbers[0] % len(values)], *numbers[1:]))
        else:
            target, source, number = numbers
            WRITES[name](values[target % len(values)], values[source % len(values)], number)
    return tuple(values[2:])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@settings(
    max_examples=int(os.environ.get("FXSP_FUZZ", "60")),
    deadline=None,
    derandomize="FXSP_FUZZ" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
@given(program=programs)
def test_random_programs(train: bool, program: Program) -> None:
    start = [torch.arange(24.0).reshape(2, 3, 4) / 7 - 1, torch.ones(3, 2)]

    def execute(function: Any) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        leaves = [t.clone().requires_grad_(train) for t in start]
        inputs = [t * 1 for t in leaves] if train else leaves
        with torch.set_grad_enabled(train):
            results = [*inputs, *function(*inputs)]
            if not train:
                return results, []
            total = torch.stack([(i + 1) * t.sin().sum() for i, t in enumerate(results)]).sum()
            return results, list(torch.autograd.grad(total, leaves, allow_unused=True))

    try:
        want, want_grads = execute(lambda x, y: run(program, x, y))
    except RuntimeError:
        return  # not a program: a write to a view that autograd forbids

    example = [t * 1 for t in (s.clone().requires_grad_(train) for s in start)] if train else start
    mode = torch_internals.compile_fake_mode()
    fakes = [mode.from_tensor(t) for t in example]
    with torch.set_grad_enabled(train):
        # As in Dynamo's graph: a flat list of operations, with the numbers filled in.
        graph = _record(program)
        gm = functionalize(normalize(graph, fakes))
    check_functional(gm)
    found, found_grads = execute(gm)
    for a, b in zip(want, found, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(b, a)
    assert aliases(found) == aliases(want)
    for a, b in zip(want_grads, found_grads, strict=True):
        if a is not None:
            torch.testing.assert_close(torch.zeros_like(a) if b is None else b, a)


def _record(program: Program) -> torch.fx.GraphModule:
    """The calls that ``program`` makes, as a graph; each operation is one opaque call."""
    graph = torch.fx.Graph()
    nodes = [graph.placeholder("x"), graph.placeholder("y")]
    for name, numbers in program:
        if name in VIEWS:
            nodes.append(graph.call_function(_see, (name, nodes[numbers[0] % len(nodes)], *numbers[1:])))
        else:
            target, source, number = numbers
            pair = (nodes[target % len(nodes)], nodes[source % len(nodes)])
            graph.call_function(_write, (name, *pair, number))
    graph.output(tuple(nodes[2:]))
    return torch.fx.GraphModule({}, graph)


def _see(name: str, t: torch.Tensor, *numbers: int) -> torch.Tensor:
    return VIEWS[name](t, *numbers)


def _write(name: str, t: torch.Tensor, s: torch.Tensor, number: int) -> torch.Tensor:
    return WRITES[name](t, s, number)
