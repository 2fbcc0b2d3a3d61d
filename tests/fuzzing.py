"""Run a random program whole and partitioned, and compare: ``simulate(partition(program)) == program``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from programs import Case
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import fxsp.kernels.ops  # noqa: F401
from fxsp.errors import VerificationError
from fxsp.inspection import format_graph
from fxsp.passes.base import Program
from fxsp.passes.functionalize import functionalize
from fxsp.passes.pipeline import Runner, partition_program
from fxsp.simulation import check_replicated, run, simulate_with_grads
from fxsp.torch_internals import retrace
from fxsp.types import Ranks

#: Largest relative error (of the largest element) by dtype.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def trace(case: Case) -> torch.fx.GraphModule:
    """The program with its annotations as the pipeline expects it: pre-dispatch ATen, no mutation."""

    def annotate(x: torch.Tensor, kind: str, dim: int, text_len: int, entry: str) -> torch.Tensor:
        return torch.ops.fxsp.annotate(x, kind, dim, text_len, entry)

    # Numbers of tokens are symbols as Dynamo makes them: equal numbers share one, and 1 stays a number.
    mode = FakeTensorMode(shape_env=ShapeEnv())
    number = DimDynamic.DUCK if case.dynamic else DimDynamic.STATIC
    fakes = []
    for spec, value in zip(case.inputs, case.values(), strict=True):
        sizes = [number if i in spec.tokens else DimDynamic.STATIC for i in range(value.dim())]
        fakes.append(mode.from_tensor(value, symbolic_context=StatelessSymbolicContext(sizes)))
    return functionalize(retrace(case.function(annotate), fakes, mode, {}))


def partition(case: Case, *, training: bool = False) -> Program:
    """The program of one rank."""
    program = Program(trace(case), Ranks(0, case.size, "simulated"), training=training)
    # A local length of 1 is specialized when the graph runs on fakes, so symbolic shapes cannot be compared with types.
    return partition_program(program, Runner(check=not case.dynamic))


def expect(case: Case) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs of the program as it stands, and its inputs afterwards."""
    values = case.values()
    with torch.no_grad():
        out = case.function()(*values)
    return list(out) if isinstance(out, tuple) else [out], values


def check(case: Case, *, poison_pads: bool = True) -> Program:
    """Compare outputs and inputs of the two; ``AssertionError`` shows the program and the partitioned graph."""
    program = partition(case)
    _compare(case, program, poison_pads)
    if case.dynamic:
        longer = _longer(case, program)
        if longer is not None:
            _compare(longer, program, poison_pads)
    return program


def _compare(case: Case, program: Program, poison_pads: bool) -> None:
    wanted_outputs, wanted_inputs = expect(case)
    exact: list[torch.Tensor] = []
    try:
        result = run(program.gm, case.size, case.values(), poison_pads=poison_pads)
        outputs, inputs = check_replicated(result.outputs), check_replicated(result.inputs)
    except VerificationError as error:
        raise AssertionError(f"{error}\n{_show(case, program)}") from error
    for what, got, want in (("output", outputs, wanted_outputs), ("input", inputs, wanted_inputs)):
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            problem = difference(a, b)
            if problem and what == "output" and not case.double and b.dtype == torch.float32:
                # A long random program may amplify rounding: then float64 tells who is how far from the truth.
                exact = exact or expect(replace(case, double=True))[0]
                problem = "" if _is_rounding(a, b, exact[i]) else problem
            assert not problem, f"{what} {i}: {problem}\n{_show(case, program)}"
    if exact:
        check(replace(case, double=True), poison_pads=poison_pads)


def _is_rounding(got: torch.Tensor, want: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether the partitioned program is about as near to the exact result as the program itself is."""
    if got.shape != exact.shape or not torch.equal(got.isnan(), exact.isnan()):
        return False
    error, own = ((x.double() - exact).nan_to_num().norm() for x in (got, want))
    return bool(error <= 8 * own)


def _longer(case: Case, program: Program) -> Case | None:
    """The case with more tokens, if the graph promises to serve it: no guard speaks against it."""
    more = 1 + case.seed % 4
    inputs, values = [], {}
    env = None
    for spec, node in zip(case.inputs, program.graph.find_nodes(op="placeholder"), strict=True):
        fake = node.meta["global_val"]
        env = fake.fake_mode.shape_env
        shape = list(spec.shape)
        for i in spec.tokens:
            if isinstance(fake.shape[i], torch.SymInt):
                shape[i] += more
                values[fake.shape[i].node.expr] = shape[i]
        inputs.append(replace(spec, shape=tuple(shape)))
    if not values or env is None or env.replacements or not all(g.expr.subs(values) == True for g in env.guards):  # noqa: E712
        return None
    longer = replace(case, inputs=tuple(inputs))
    try:
        expect(longer)
    except (RuntimeError, IndexError):
        return None  # a number in the source is a length
    return longer


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
    """Outputs and gradients of all floating inputs, against autograd on one process.

    In float64: a gradient that is zero by cancellation is nothing but rounding.
    """
    case = replace(case, double=True)
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
