"""A random program, traced and partitioned, and the lengths that it serves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import fxsp.kernels.ops  # noqa: F401
from fuzzing_cases import Case, Refused
from fuzzing_values import execute
from fxsp.capture.module_calls import Captured
from fxsp.config import Options
from fxsp.errors import RunsWhole, UnsupportedError
from fxsp.lengths import equal_lengths, sizes_at_hand
from fxsp.passes.base import Program
from fxsp.passes.functionalize.functionalize import functionalize
from fxsp.passes.graph import facts
from fxsp.passes.infer.infer import Infer
from fxsp.passes.pipeline import Runner, partition_program
from fxsp.torch_internals import known_equalities, retrace
from fxsp.types import Ranks

__all__ = ["annotate", "other_lengths", "partition", "partitioned", "plan_of", "runs", "serves"]


def annotate(x: torch.Tensor, kind: str, dim: int, text_len: int, entry: str) -> torch.Tensor:
    # The plan's annotations stand for their argument in a region without grad too; an operator written there would not.
    with torch.enable_grad():
        return torch.ops.fxsp.annotate(x, kind, dim, text_len, entry)  # type: ignore[no-any-return]


def partition(case: Case) -> Program:
    """The program of one rank, traced to pre-dispatch ATen as the pipeline expects it."""
    # Numbers of tokens are symbols as Dynamo makes them: equal numbers share one, and 1 stays a number.
    mode = FakeTensorMode(shape_env=ShapeEnv())
    number = DimDynamic.DUCK if case.dynamic else DimDynamic.STATIC
    fakes = []
    for spec, value in zip(case.inputs, case.values(), strict=True):
        sizes = [number if isinstance(size, str) else DimDynamic.STATIC for size in spec.shape]
        fake = mode.from_tensor(value, symbolic_context=StatelessSymbolicContext(sizes))
        fakes.append(fake.requires_grad_(case.training and value.is_floating_point()))
    gm = retrace(case.function(plan_of(case)), fakes, mode, {})
    for node, fake in zip(gm.graph.find_nodes(op="placeholder"), fakes, strict=True):
        node.meta["val"] = fake  # it says whether gradients are recorded
    try:
        gm = functionalize(gm)
    except UnsupportedError as error:
        raise Refused(str(error)) from error
    # A local length of 1 is specialized when the graph runs on fakes, so symbolic shapes cannot be compared with types.
    return partitioned(case, gm, Runner(check=not case.dynamic and case.seed % 2 == 0))


def plan_of(case: Case) -> Callable[..., torch.Tensor]:
    return (lambda x, *_: x) if case.infer else annotate


def partitioned(case: Case, gm: torch.fx.GraphModule, runner: Runner | None = None) -> Program:
    program = _program(case, gm)
    if case.infer:
        program.inferring, program.captured = True, Captured(None, None)
        with equal_lengths(known_equalities(gm)), sizes_at_hand(program.sizes), contextlib.suppress(RunsWhole):
            Infer(at_any_price=True).apply(program)
    return partition_program(program, runner)


def _program(case: Case, gm: torch.fx.GraphModule) -> Program:
    ulysses, ring = case.degrees or (None, None)
    ranks = Ranks(0, case.size, "simulated")
    return Program(gm, ranks, training=case.training, options=Options(ulysses_degree=ulysses, ring_degree=ring))


# --- other lengths ---------------------------------------------------------------------------------------------------


def other_lengths(case: Case) -> list[Case]:
    """The case with other numbers of tokens; sequences that were equally long still are."""
    if not case.dynamic:
        return []
    more = 1 + case.seed % 4
    changes: list[Callable[[int], int]] = [lambda n: n + more, lambda n: 2 * n + 1, lambda n: max(2, n - 1)]
    return [replace(case, lengths={name: change(n) for name, n in case.lengths.items()}) for change in changes]


def runs(case: Case) -> bool:
    """Whether the program can be run at all: a number in its source may be a length."""
    try:
        execute(case, case.function())
    except (RuntimeError, IndexError, ValueError):
        return False
    return True


def serves(program: Program, case: Case) -> bool:
    """Whether the graph promises to serve these lengths: no guard speaks against it."""
    values: dict[Any, int] = {}
    env = None
    for spec, node in zip(case.inputs, program.graph.find_nodes(op="placeholder"), strict=True):
        fake = facts(node).whole
        env = fake.fake_mode.shape_env
        for size, n in zip(fake.shape, case.shape(spec), strict=True):
            if not isinstance(size, torch.SymInt):
                if size != n:
                    return False
            elif values.setdefault(size.node.expr, n) != n:
                return False
    if not values or env is None or env.replacements:
        return False
    return all(guard.expr.subs(values) == True for guard in env.guards)  # noqa: E712
