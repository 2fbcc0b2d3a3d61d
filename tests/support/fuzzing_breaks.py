"""Random programs with graph breaks, code that is not compiled and graphs that run whole, with deferred gradients.

The weights of a program of :mod:`programs` become parameters.  Their gradients are left to an outer reducer, which here
takes the mean over simulated ranks; what runs whole is run once, as it is on every rank.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from fuzzing_cases import Case
from fuzzing_programs import annotate
from fuzzing_values import difference, gradients_of_outputs
from fxsp.config import Options
from fxsp.errors import UnsupportedError
from fxsp.passes.base import Program
from fxsp.passes.functionalize.functionalize import functionalize
from fxsp.passes.graph import mark
from fxsp.passes.normalize.normalize import normalize
from fxsp.passes.partition.defer import scale_summands
from fxsp.passes.pipeline import partition_program
from fxsp.types import Ranks
from programs import INSTRUCTIONS, OFTEN, SLOW, Builder, _add_tokens, every_instruction, finished
from simulated import Simulated

__all__ = ["broken_cases", "check_broken"]

_ANNOTATE = (torch.ops.fxsp.annotate, torch.ops.fxsp.annotate.default)


@st.composite
def broken_cases(draw: st.DrawFn, max_instructions: int = 6) -> Case:
    """A program for 2 to 5 ranks with at least one break; after a break no value, or one, is split again."""
    every_instruction()
    size = draw(st.sampled_from([2, 3, 4, 5]))
    h, d = draw(st.sampled_from([1, 2, 4, size])), draw(st.sampled_from([1, 2]))
    b = Builder(draw, {"1": 1, "B": draw(st.integers(1, 2)), "H": h, "D": d, "C": h * d})
    _add_tokens(b, b.sequence(draw(st.integers(1, 2 * size + 1))), ("shard", "shard", "text"))
    lengths = {name: b.sizes[name] for name in b.expressions}
    names = [name for name in INSTRUCTIONS for _ in range(OFTEN.get(name, 1)) if name not in SLOW]
    count = draw(st.integers(1, max_instructions))
    broken = draw(st.integers(0, count - 1))
    for i in range(count):
        INSTRUCTIONS[b.pick(names)](b)
        if i == broken or b.number(0, 2) == 2:
            _break(b)
    INSTRUCTIONS["linear"](b)
    return finished(b, draw, lengths, size, training=True, dynamic=False)


def _break(b: Builder) -> None:
    """The end of a graph: nothing else, or a layer that is not compiled, and perhaps tokens that are split again."""
    v = b.canonical()
    if b.number(0, 1):
        v = b.emit(f"eager(F.linear, {v.name}, {_weight(b)}) / {math.sqrt(b.size('C')):.4g}", v.dims)
    else:
        b.line("torch._dynamo.graph_break()")
    if b.number(0, 2):
        b.emit(f'annotate({v.name}, "shard", 1, -1, "{v.name}")', v.dims)


def _weight(b: Builder) -> str:
    """A weight: a new one, or one that is used elsewhere too."""
    known = [spec.name for spec in b.inputs if spec.name[0] == "w" and spec.shape == (b.size("C"), b.size("C"))]
    return b.pick([*known, None]) or b.input(("C", "C"))


def _leaves(case: Case) -> list[Any]:
    return [
        nn.Parameter(value) if spec.name[0] == "w" and spec.kind == "normal" else value
        for spec, value in zip(case.inputs, case.values(), strict=True)
    ]


def _run(case: Case, function: Any) -> dict[str, torch.Tensor]:
    leaves = [x if isinstance(x, nn.Parameter) else x.requires_grad_(x.is_floating_point()) for x in _leaves(case)]
    # A program may write to its inputs, which leaves must not see.
    out = function(*[x if isinstance(x, nn.Parameter) else x.clone() for x in leaves])
    outputs = list(out) if isinstance(out, tuple) else [out]
    given = gradients_of_outputs(case, outputs)
    pairs = [(o, g) for o, g in zip(outputs, given, strict=True) if o.requires_grad]
    wanted = {spec.name: x for spec, x in zip(case.inputs, leaves, strict=True) if x.requires_grad}
    grads = torch.autograd.grad(
        [o for o, _ in pairs], list(wanted.values()), [g for _, g in pairs], allow_unused=True, materialize_grads=True
    )
    named = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    return named | {f"the gradient of {name}": g for name, g in zip(wanted, grads, strict=True)}


def check_broken(case: Case, seen: Counter[str]) -> None:
    """Compare outputs and gradients; ``AssertionError`` shows what differs.  ``seen`` counts graphs by kind."""

    def compile_(gm: torch.fx.GraphModule, inputs: Sequence[Any], ranks: Ranks) -> Program | None:
        if not any(node.target in _ANNOTATE for node in gm.graph.nodes):
            seen["whole, with parameters" if any(isinstance(x, nn.Parameter) for x in inputs) else "whole"] += 1
            return None
        try:
            normal = functionalize(normalize(gm, inputs))
        except UnsupportedError:
            seen["unsupported"] += 1
            return None
        for node, value in zip(normal.graph.find_nodes(op="placeholder"), inputs, strict=True):
            mark(node, is_parameter=isinstance(value, nn.Parameter))
        program = partition_program(Program(normal, ranks, training=True, options=Options(grad_reduce="defer")))
        scale_summands(program.gm, ranks.size)
        seen["split"] += 1
        return program

    wanted = _run(case, case.function())
    torch.compiler.reset()
    backend = Simulated(case.size, compile_, deferred=True)
    found = _run(case, torch.compile(case.function(annotate), backend=backend, dynamic=False))
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        problem = difference(found[name], want)
        assert not problem, f"{name}: {problem}\n{case!r}"
    seen["programs"] += 1
