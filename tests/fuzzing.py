"""Run a random program whole and partitioned, and compare: ``simulate(partition(program)) == program``."""

from __future__ import annotations

from typing import Any

import torch
from programs import Case
from torch.fx.experimental.proxy_tensor import make_fx

import fxsp.kernels.ops  # noqa: F401
from fxsp.errors import VerificationError
from fxsp.inspection import format_graph
from fxsp.passes.base import Program
from fxsp.passes.functionalize import functionalize
from fxsp.passes.pipeline import Runner, partition_program
from fxsp.simulation import check_replicated, run, simulate_with_grads
from fxsp.types import Ranks

#: Largest relative error (of the largest element) by dtype.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def trace(case: Case) -> torch.fx.GraphModule:
    """The program with its annotations as the pipeline expects it: pre-dispatch ATen, no mutation."""

    def annotate(x: torch.Tensor, kind: str, dim: int, text_len: int, entry: str) -> torch.Tensor:
        return torch.ops.fxsp.annotate(x, kind, dim, text_len, entry)

    with torch.no_grad():
        gm = make_fx(case.function(annotate), pre_dispatch=True, tracing_mode="fake")(*case.values())
    return functionalize(gm)


def partition(case: Case, *, training: bool = False) -> Program:
    """The program of one rank."""
    program = Program(trace(case), Ranks(0, case.size, "simulated"), training=training)
    return partition_program(program, Runner(check=True))


def expect(case: Case) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs of the program as it stands, and its inputs afterwards."""
    values = case.values()
    with torch.no_grad():
        out = case.function()(*values)
    return list(out) if isinstance(out, tuple) else [out], values


def check(case: Case, *, poison_pads: bool = True) -> Program:
    """Compare outputs and inputs of the two; ``AssertionError`` shows the program and the partitioned graph."""
    program = partition(case)
    try:
        result = run(program.gm, case.size, case.values(), poison_pads=poison_pads)
        outputs, inputs = check_replicated(result.outputs), check_replicated(result.inputs)
    except VerificationError as error:
        raise AssertionError(f"{error}\n{_show(case, program)}") from error
    wanted_outputs, wanted_inputs = expect(case)
    for what, got, want in (("output", outputs, wanted_outputs), ("input", inputs, wanted_inputs)):
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            problem = difference(a, b)
            assert not problem, f"{what} {i}: {problem}\n{_show(case, program)}"
    return program


def difference(got: Any, want: torch.Tensor) -> str:
    """How two results differ by more than rounding, or ``""``."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"{got.dtype} {list(got.shape)} instead of {want.dtype} {list(want.shape)}"
    if not want.dtype.is_floating_point:
        return "" if torch.equal(got, want) else "other values"
    if not torch.equal(got.isnan(), want.isnan()):
        return f"NaN in {int(got.isnan().sum())} elements instead of {int(want.isnan().sum())} (a pad was used?)"
    error = float((got - want).nan_to_num().abs().max()) if got.numel() else 0.0
    scale = float(want.nan_to_num().abs().max()) if got.numel() else 0.0
    return "" if error <= TOLERANCE[want.dtype] * max(scale, 1e-3) else f"error {error:.3g} of {scale:.3g}"


def _show(case: Case, program: Program) -> str:
    return f"{case!r}\n{format_graph(program.gm, program.ranks)}"


def check_gradients(case: Case) -> None:
    """Outputs and gradients of all floating inputs, against autograd on one process."""
    program = partition(case, training=True)
    values = [x.requires_grad_() if x.dtype.is_floating_point else x for x in case.values()]
    wanted = [x for x in values if x.requires_grad]
    # A program may write to its inputs, which leaves must not see.
    out = case.function()(*(x.clone() for x in values))
    outputs = list(out) if isinstance(out, tuple) else [out]
    generator = torch.Generator().manual_seed(case.seed)
    grads = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
    expected = torch.autograd.grad([p[0] for p in pairs], wanted, [p[1] for p in pairs], allow_unused=True)
    got_outputs, got_grads = simulate_with_grads(program.gm, case.size, values, grads)
    try:
        found = [*check_replicated(got_outputs), *check_replicated(got_grads)]
    except VerificationError as error:
        raise AssertionError(f"{error}\n{_show(case, program)}") from error
    names = [f"output {i}" for i in range(len(outputs))]
    names += [f"gradient of {spec.name}" for spec, x in zip(case.inputs, values, strict=True) if x.requires_grad]
    filled = [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, expected, strict=True)]
    for name, a, b in zip(names, found, [*outputs, *filled], strict=True):
        problem = difference(a, b.detach())
        assert not problem, f"{name}: {problem}\n{_show(case, program)}"
