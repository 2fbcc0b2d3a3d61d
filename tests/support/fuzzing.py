"""A random program whole and partitioned must compute the same: ``simulate(partition(program)) == program``.

A :class:`Case` is a program as Python source, with its inputs, lengths and ranks; :func:`check` runs it both ways and
compares values, written inputs and gradients.  ``programs`` draws cases; :func:`script` prints one as a file.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch._dynamo.exc import BackendCompilerFailed, TorchRuntimeError
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

import fxsp.kernels.ops  # noqa: F401
from fxsp.capture.module_calls import Captured
from fxsp.config import Options
from fxsp.errors import RunsWhole, UnsupportedError, VerificationError
from fxsp.inspection.printer import format_graph
from fxsp.lengths import equal_lengths, sizes_at_hand
from fxsp.passes.base import Program
from fxsp.passes.functionalize.functionalize import functionalize
from fxsp.passes.graph import facts
from fxsp.passes.infer.infer import Infer
from fxsp.passes.normalize.normalize import normalize
from fxsp.passes.pipeline import Runner, partition_program
from fxsp.torch_internals import known_equalities, retrace
from fxsp.types import Ranks
from lockstep import gradients
from poisoning import run
from replicated import check_replicated
from simulated import Simulated
from subclasses import Dispatching
from with_grads import simulate_with_grads

__all__ = ["Case", "Input", "NotAProgram", "Refused", "Result", "check", "script"]

#: Largest relative error (of the largest element) by dtype.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}

#: A dimension: a number, or an expression of the lengths of the sequences, ``"S0 + S1"``.
Size = int | str


class Own(torch.autograd.Function):
    """The cumulative sum over tokens, with a gradient that is not its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.cumsum(1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 3 * grad * torch.tanh(x)


@torch._dynamo.disable
def _eagerly(function: Callable[..., Any], *args: Any) -> Any:
    """A call that no graph has."""
    return function(*args)


class NotAProgram(Exception):  # noqa: N818
    """The program itself fails: a write that autograd forbids, say."""


class Refused(Exception):  # noqa: N818
    """The program cannot be normalized: it would run whole, with a warning."""


@dataclass(frozen=True)
class Input:
    """One input: its shape, and how its values are drawn."""

    name: str
    shape: tuple[Size, ...]
    #: ``normal``; ``ids`` (below ``bound``); ``targets`` (the same, some of them -100, never the last two of the
    #: last dimension); ``mask`` (bool, true in the first place of the last dimension); ``blocked`` (bool, false in
    #: whole rows, and in the first places of others); ``index`` (as ``ids``); ``order`` (a permutation).
    kind: str = "normal"
    bound: Size = 7

    def __str__(self) -> str:
        return f"{self.name}[{', '.join(map(str, self.shape))}]{'' if self.kind == 'normal' else ' ' + self.kind}"


@dataclass(frozen=True)
class Case:
    """A program, its inputs, and the ranks to split it over."""

    source: str
    inputs: tuple[Input, ...]
    #: Length of each sequence that inputs bring.
    lengths: dict[str, int]
    #: Number of ranks.
    size: int
    double: bool = True
    #: Compare gradients too (of all floating inputs).
    training: bool = False
    #: Whether lengths are symbols in the traced graph; then other lengths are tried as well.
    dynamic: bool = False
    #: Trace with Dynamo, which sees checkpoints and grad modes, and not with ``make_fx``.
    dynamo: bool = False
    #: Degrees ``(ulysses, ring)`` that the user fixes.
    degrees: tuple[int, int] | None = None
    seed: int = 0
    #: Without the annotations in the program: what is split is found, whether it pays or not.
    infer: bool = False
    #: The instructions that wrote the program, for statistics.
    instructions: tuple[str, ...] = ()

    def function(self, annotate: Callable[..., torch.Tensor] | None = None) -> Callable[..., Any]:
        """The program; without ``annotate`` its annotations and checkpoints do nothing."""
        namespace: dict[str, Any] = {
            "torch": torch,
            "F": F,
            "math": math,
            "annotate": annotate or (lambda x, *_: x),
            "Own": Own,
            "eager": _eagerly if annotate else (lambda f, *args: f(*args)),
            "QUANTIZED": {n: self._quantized(n) for n in map(int, re.findall(r"QUANTIZED\[(\d+)\]", self.source))},
            "checkpoint": checkpoint if annotate else (lambda f, *args, **_: f(*args)),
        }
        exec(compile(self.source, "<program>", "exec"), namespace)
        return namespace["program"]  # type: ignore[no-any-return]

    def _quantized(self, width: int) -> torch.Tensor:
        """A weight that is a tensor subclass."""
        dtype = torch.float64 if self.double else torch.float32
        generator = torch.Generator().manual_seed(width)
        return Dispatching.of(torch.randn(width, width, generator=generator, dtype=torch.float64).to(dtype))

    def values(self) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        return [self._value(spec, generator) for spec in self.inputs]

    def _number(self, size: Size) -> int:
        return size if isinstance(size, int) else int(eval(size, {}, self.lengths))

    def shape(self, spec: Input) -> tuple[int, ...]:
        return tuple(map(self._number, spec.shape))

    def _value(self, spec: Input, generator: torch.Generator) -> torch.Tensor:
        shape = self.shape(spec)
        if spec.kind in ("ids", "index", "targets"):
            ids = torch.randint(0, max(self._number(spec.bound), 1), shape, generator=generator)
            if spec.kind == "targets":
                ignored = torch.rand(shape, generator=generator) < 0.4
                ignored[..., -2:] = False
                ids[ignored] = -100
            return ids
        if spec.kind == "order":
            return torch.randperm(math.prod(shape), generator=generator).view(shape)
        if spec.kind == "mask":
            mask = torch.rand(shape, generator=generator) < 0.7
            mask[..., :1] = True
            return mask
        if spec.kind == "blocked":
            first = torch.randint(0, shape[-1] + 1, (*shape[:-1], 1), generator=generator)
            rows = torch.rand((*shape[:-1], 1), generator=generator) < 0.7
            return (torch.arange(shape[-1]) >= first) & rows & (torch.rand(shape, generator=generator) < 0.9)
        dtype = torch.float64 if self.double else torch.float32
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def __repr__(self) -> str:
        facts = [f"{self.size} ranks", "float64" if self.double else "float32"]
        facts += [name for name in ("training", "dynamic", "dynamo") if getattr(self, name)]
        facts += [f"degrees {self.degrees}"] if self.degrees else []
        facts += [f"{name} = {n}" for name, n in self.lengths.items()]
        return f"\n# {', '.join(facts)}; {', '.join(map(str, self.inputs))}\n{self.source}"


def script(case: Case) -> str:
    """A file that runs the case, wherever it lies, in the environment that fxsp is installed in."""
    inputs = "".join(f"            {spec!r},\n" for spec in case.inputs)
    return f'''"""A program that computes something else once it is split over {case.size} ranks."""

import sys
from pathlib import Path

import fxsp

sys.path.insert(0, str(Path(fxsp.__file__).parents[1] / "tests" / "support"))

from fuzzing import Case, Input, check

PROGRAM = """
{case.source}"""

check(
    Case(
        PROGRAM,
        inputs=(
{inputs}        ),
        lengths={case.lengths!r},
        size={case.size},
        double={case.double},
        training={case.training},
        dynamic={case.dynamic},
        dynamo={case.dynamo},
        degrees={case.degrees},
        infer={case.infer},
        seed={case.seed},
    )
)
print("the partitioned program computes the same")
'''


# --- comparing -------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What a check saw, for statistics."""

    #: The partitioned graphs.
    programs: list[Program] = field(default_factory=list)
    #: How many times the program was run and compared, each with other lengths.
    runs: int = 0
    #: Comparisons in which rounding was all the difference, and larger than usual.
    rounding: int = 0


@dataclass
class _Values:
    """What a run gives: outputs, inputs afterwards, gradients of inputs; by name."""

    outputs: list[torch.Tensor]
    written: list[torch.Tensor] = field(default_factory=list)
    gradients: list[torch.Tensor] = field(default_factory=list)

    def named(self) -> dict[str, torch.Tensor]:
        return {f"{what[:-1]} {i}": x for what, values in vars(self).items() for i, x in enumerate(values)}


def check(case: Case, *, poison_pads: bool = True) -> Result:
    """Compare the program with its partitioned form; ``AssertionError`` shows both where they differ."""
    if case.training and not case.double:
        # A gradient that is zero by cancellation is nothing but rounding.
        case = replace(case, double=True)
    result = Result()
    try:
        _execute(case, case.function())
    except (RuntimeError, IndexError, ValueError) as error:
        raise NotAProgram from error
    (_check_compiled if case.dynamo else _check_traced)(case, poison_pads, result)
    return result


def _check_traced(case: Case, poison_pads: bool, result: Result) -> None:
    program = partition(case)
    result.programs.append(program)
    for other in [case, *(x for x in other_lengths(case) if _serves(program, x))]:
        if other is not case and not _runs(other):
            continue
        values = other.values()
        with _shown(other, program):
            if other.training:
                given, _ = _wanted_gradients(other)
                leaves = [x.requires_grad_(x.is_floating_point()) for x in values]
                # Now and then by the registered derivatives: as the lock-step ones, but they take long to trace.
                if other.seed == 0 and other is case:
                    outputs, grads = simulate_with_grads(program.gm, case.size, leaves, given)
                else:
                    outputs, grads = gradients(program.gm, case.size, leaves, given, poison_pads=poison_pads)
                found = _Values(check_replicated(outputs), gradients=check_replicated(grads))
            else:
                simulated = run(program.gm, case.size, values, poison_pads=poison_pads)
                found = _Values(check_replicated(simulated.outputs), check_replicated(simulated.inputs))
        _compare(other, found, program, poison_pads, result)


def _check_compiled(case: Case, poison_pads: bool, result: Result) -> None:
    def compile_(gm: torch.fx.GraphModule, inputs: Sequence[Any], ranks: Ranks) -> Program:
        try:
            normal = functionalize(normalize(gm, inputs))
        except UnsupportedError as error:
            raise Refused(str(error)) from error
        program = _partitioned(case, normal)
        result.programs.append(program)
        return program

    torch.compiler.reset()
    function = torch.compile(
        case.function(_plan_of(case)), backend=Simulated(case.size, compile_, poison_pads=poison_pads), fullgraph=True
    )
    for other in _calls(case):
        with _shown(other, None):
            try:
                found = _execute(other, function, mark=case.dynamic)
            except BackendCompilerFailed as error:
                if isinstance(error.inner_exception, Refused):
                    raise error.inner_exception from error
                raise
            except TorchRuntimeError as error:
                if _traceable(case):
                    raise
                raise NotAProgram from error
        _compare(other, found, result.programs[-1], poison_pads, result)


def _calls(case: Case) -> list[Case]:
    """What a compiled program is called with: the case, and two other lengths that the program can take."""
    return [case, *(other for other in other_lengths(case)[:2] if _runs(other))]


def _traceable(case: Case) -> bool:
    """Whether Dynamo can trace the program at all (not forward-mode derivatives of views at symbolic offsets, say)."""
    torch.compiler.reset()
    function = torch.compile(case.function(), backend="eager", fullgraph=True)
    try:
        for other in _calls(case):
            _execute(other, function, mark=case.dynamic)
    except TorchRuntimeError:
        return False
    return True


def _annotate(x: torch.Tensor, kind: str, dim: int, text_len: int, entry: str) -> torch.Tensor:
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
    gm = retrace(case.function(_plan_of(case)), fakes, mode, {})
    for node, fake in zip(gm.graph.find_nodes(op="placeholder"), fakes, strict=True):
        node.meta["val"] = fake  # it says whether gradients are recorded
    try:
        gm = functionalize(gm)
    except UnsupportedError as error:
        raise Refused(str(error)) from error
    # A local length of 1 is specialized when the graph runs on fakes, so symbolic shapes cannot be compared with types.
    return _partitioned(case, gm, Runner(check=not case.dynamic and case.seed % 2 == 0))


def _plan_of(case: Case) -> Callable[..., torch.Tensor]:
    return (lambda x, *_: x) if case.infer else _annotate


def _partitioned(case: Case, gm: torch.fx.GraphModule, runner: Runner | None = None) -> Program:
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


def _execute(case: Case, function: Callable[..., Any], *, mark: bool = False) -> _Values:
    """The function on the case's inputs: outputs, inputs afterwards, gradients."""
    leaves = case.values()
    if not case.training:
        _mark(case, leaves, mark)
        with torch.no_grad():
            out = function(*leaves)
        return _Values(list(out) if isinstance(out, tuple) else [out], leaves)
    for x in leaves:
        x.requires_grad_(x.is_floating_point())
    # A program may write to its inputs, which leaves must not see.
    values = [x.clone() for x in leaves]
    _mark(case, values, mark)
    out = function(*values)
    outputs = list(out) if isinstance(out, tuple) else [out]
    given = _gradients_of_outputs(case, outputs)
    if not any(o.requires_grad for o in outputs):
        return _Values(outputs, [v.detach() for v in values], [torch.zeros_like(x) for x in leaves if x.requires_grad])
    pairs = [(o, g) for o, g in zip(outputs, given, strict=True) if o.requires_grad]
    wanted = [x for x in leaves if x.requires_grad]
    grads = torch.autograd.grad(
        [o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True, materialize_grads=True
    )
    return _Values([o.detach() for o in outputs], [v.detach() for v in values], list(grads))


def _gradients_of_outputs(case: Case, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(case.seed)
    return [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]


def _wanted_gradients(case: Case) -> tuple[list[torch.Tensor], _Values]:
    expected = _execute(case, case.function())
    return _gradients_of_outputs(case, expected.outputs), expected


def _mark(case: Case, values: Sequence[torch.Tensor], mark: bool) -> None:
    for spec, value in zip(case.inputs, values, strict=True):
        for i, size in enumerate(spec.shape):
            if mark and isinstance(size, str):
                torch._dynamo.maybe_mark_dynamic(value, i)


class _shown:  # noqa: N801  (a context manager)
    """A disagreement of ranks is a failure that shows the program."""

    def __init__(self, case: Case, program: Program | None) -> None:
        self.case, self.program = case, program

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, VerificationError):
            raise AssertionError(f"{error}\n{_show(self.case, self.program)}") from error


def _compare(case: Case, found: _Values, program: Program, poison_pads: bool, result: Result) -> None:
    expected = _execute(case, case.function())
    result.runs += 1
    if not found.written:
        expected.written = []  # the lock-step run does not say
    got, wanted = found.named(), expected.named()
    assert got.keys() == wanted.keys(), f"{list(got)} instead of {list(wanted)}\n{_show(case, program)}"
    for name, want in wanted.items():
        problem = difference(got[name], want)
        if not problem:
            continue
        if not case.double and _is_rounding(case, name, got[name], want):
            # A long random program may amplify rounding: then float64 tells who is how far from the truth.
            result.rounding += 1
            check(replace(case, double=True), poison_pads=poison_pads)
            return
        if case.double and _is_ill_conditioned(case, name, got[name], want):
            result.rounding += 1
            continue
        raise AssertionError(f"{name}: {problem}\n{_show(case, program)}")


def difference(got: torch.Tensor, want: torch.Tensor) -> str:
    """How two results differ by more than rounding, or ``""``."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"{got.dtype} {list(got.shape)} instead of {want.dtype} {list(want.shape)}"
    if not want.dtype.is_floating_point:
        return "" if torch.equal(got, want) else "other values"
    if not torch.equal(got.isnan(), want.isnan()):
        return f"NaN in {int(got.isnan().sum())} elements instead of {int(want.isnan().sum())} (a pad was used?)"
    if not torch.equal(got.isinf(), want.isinf()):
        return f"infinite in {int(got.isinf().sum())} elements instead of {int(want.isinf().sum())}"
    error, scale = _largest(got - want), _largest(want)
    # What is zero by cancellation has the rounding of what was cancelled.
    return "" if error <= TOLERANCE[want.dtype] * max(scale, 1e-2) else f"error {error:.3g} of {scale:.3g}"


def _largest(x: torch.Tensor) -> float:
    x = torch.where(x.isfinite(), x, 0.0)
    return float(x.abs().max()) if x.numel() else 0.0


def _is_rounding(case: Case, name: str, got: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether the partitioned program is about as near to the exact result as the program itself is."""
    double = replace(case, double=True)
    exact = _execute(double, double.function()).named()[name]
    if want.dtype != torch.float32 or got.shape != exact.shape or not torch.equal(got.isnan(), exact.isnan()):
        return False
    return _largest(got.double() - exact) <= 8 * _largest(want.double() - exact)


class _Noise(TorchDispatchMode):
    """Every operator, forward and backward, rounds a little differently (Monte Carlo arithmetic)."""

    def __init__(self, seed: int, relative: float) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)
        self.relative = relative

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(r.alias_info is not None for r in func._schema.returns):
            return result  # a view, or written in place
        return tree_map_only(torch.Tensor, self._nudged, result)

    def _nudged(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_floating_point():
            return x
        noise = torch.randn(x.shape, generator=self.generator, dtype=torch.float64)
        return x * (1 + self.relative * noise).to(x.dtype)


def _is_ill_conditioned(case: Case, name: str, got: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether the program itself answers so differently if its operators round differently (a tie, say)."""
    if got.shape != want.shape:
        return False
    error, own = _largest(got - want), 0.0
    for seed in range(4):
        with _Noise(seed, 1e-15):
            other = _execute(case, case.function()).named()[name]
        if not torch.equal(other.isnan(), want.isnan()) or not torch.equal(other.isinf(), want.isinf()):
            return True
        own = max(own, _largest(other - want))
    return torch.equal(got.isnan(), want.isnan()) and error <= 16 * own


def _show(case: Case, program: Program | None) -> str:
    graph = format_graph(program.gm, program.ranks) if program is not None else ""
    return f"{case!r}\n{graph}"


# --- other lengths ---------------------------------------------------------------------------------------------------


def other_lengths(case: Case) -> list[Case]:
    """The case with other numbers of tokens; sequences that were equally long still are."""
    if not case.dynamic:
        return []
    more = 1 + case.seed % 4
    changes: list[Callable[[int], int]] = [lambda n: n + more, lambda n: 2 * n + 1, lambda n: max(2, n - 1)]
    return [replace(case, lengths={name: change(n) for name, n in case.lengths.items()}) for change in changes]


def _runs(case: Case) -> bool:
    """Whether the program can be run at all: a number in its source may be a length."""
    try:
        _execute(case, case.function())
    except (RuntimeError, IndexError, ValueError):
        return False
    return True


def _serves(program: Program, case: Case) -> bool:
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
