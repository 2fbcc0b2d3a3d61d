"""Small functions through the passes: traced on fakes, propagated, partitioned, and compared with themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import fxsp.kernels.ops  # noqa: F401
from fxsp.config import Options
from fxsp.inspection.printer import format_graph
from fxsp.inspection.wire import bytes_sent
from fxsp.passes.base import Program
from fxsp.passes.functionalize.functionalize import functionalize
from fxsp.passes.graph import facts
from fxsp.passes.pipeline import Runner, partition_program
from fxsp.passes.propagate.propagate import Propagate
from fxsp.types import Ranks
from lockstep import gradients
from poisoning import simulate
from replicated import check_replicated

__all__ = ["check", "collectives", "gather", "graph_of", "partition", "shard", "text_of", "trace", "types_of"]

Function = Callable[..., Any]


def shard(x: torch.Tensor, dim: int = 1, text: int = -1) -> torch.Tensor:
    """A plan entry: the tokens of ``x`` along ``dim`` are to be split; the first ``text`` stay whole."""
    return torch.ops.fxsp.annotate(x, "shard", dim, text, f"split dim {dim}")


def gather(x: torch.Tensor) -> torch.Tensor:
    """A plan entry: ``x`` is to be whole."""
    return torch.ops.fxsp.annotate(x, "gather", -1, -1, "whole again")


def trace(function: Function, *inputs: Any, symbolic: bool = False) -> GraphModule:
    mode = "symbolic" if symbolic else "fake"
    with torch.no_grad():
        return functionalize(make_fx(function, pre_dispatch=True, tracing_mode=mode)(*inputs))


def types_of(function: Function, *inputs: Any, size: int = 2) -> list[str]:
    """``"name type"`` of every value after *propagate*."""
    gm = trace(function, *inputs)
    Propagate().apply(Program(gm, Ranks(0, size, "simulated")))
    lines = []
    for node in gm.graph.nodes:
        type_ = facts(node).type
        if type_ is not None:
            texts = [str(t) for t in type_] if isinstance(type_, tuple) else [str(type_)]
            lines.append(f"{node.name} {', '.join(texts)}")
    return lines


def partition(
    function: Function,
    *inputs: Any,
    size: int = 2,
    prepare: Callable[[GraphModule], None] = lambda gm: None,
    training: bool = False,
    **options: Any,
) -> Program:
    gm = trace(function, *inputs)
    prepare(gm)
    program = Program(gm, Ranks(0, size, "simulated"), training=training, options=Options(**options))
    return partition_program(program, Runner(check=True))


def collectives(program: Program) -> dict[str, int]:
    """How often each collective is called (a gather of rows that are whole on every rank sends nothing)."""
    names = [n.target._opname for n in program.graph.nodes if bytes_sent(n, program.ranks)]
    return dict(Counter(names))


def graph_of(program: Program) -> list[str]:
    """The local program: ``name type operator(operands)`` of each value that is no input."""
    lines = []
    for line in format_graph(program.gm, program.ranks).splitlines()[1:]:
        cells = [cell for cell in line.strip("▶ ").split("  ") if cell]
        if not cells[-1].strip().startswith("input"):
            lines.append(" ".join(" ".join(cell.split()) for cell in cells))
    return lines


def text_of(function: Function, *inputs: Any, size: int = 2, **options: Any) -> str:
    program = partition(function, *inputs, size=size, **options)
    return "\n".join(line.rstrip() for line in format_graph(program.gm, program.ranks).splitlines())


def check(
    function: Function, *inputs: torch.Tensor, size: int = 2, training: bool = True, tolerance: float = 1e-9
) -> Program:
    """Values, with pads that are copies and others, and gradients, are those of the function; the program."""
    program = partition(function, *inputs, size=size)
    expected = function(*inputs)
    wanted = list(expected) if isinstance(expected, (tuple, list)) else [expected]
    for poison in (False, True):
        got = check_replicated(simulate(program.gm, size, inputs, poison_pads=poison))
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
    if training:
        _check_gradients(function, inputs, size, tolerance)
    return program


def _check_gradients(function: Function, inputs: Any, size: int, tolerance: float) -> None:
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    expected = function(*leaves)
    wanted = list(expected) if isinstance(expected, (tuple, list)) else [expected]
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in wanted]
    pairs = [(y, g) for y, g in zip(wanted, given, strict=True) if y.requires_grad]
    floating = [x for x in leaves if x.requires_grad]
    grads = torch.autograd.grad([p[0] for p in pairs], floating, [p[1] for p in pairs], materialize_grads=True)
    program = partition(function, *inputs, size=size, training=True)
    for poison in (False, True):
        _, found = gradients(program.gm, size, leaves, given, poison_pads=poison)
        for a, b in zip(check_replicated(found), grads, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
