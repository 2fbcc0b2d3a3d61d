"""A random program whole and partitioned must compute the same: ``simulate(partition(program)) == program``.

A :class:`Case` is a program as Python source, with its inputs, lengths and ranks; :func:`check` runs it both ways and
compares values, written inputs and gradients.  ``programs`` draws cases; :func:`script` prints one as a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch._dynamo.exc import BackendCompilerFailed, TorchRuntimeError

from fuzzing_cases import Case, Input, NotAProgram, Refused, script
from fuzzing_programs import other_lengths, partition, partitioned, plan_of, runs, serves
from fuzzing_values import Values, difference, execute, is_ill_conditioned, is_rounding, wanted_gradients
from fxsp.errors import UnsupportedError, VerificationError
from fxsp.inspection.printer import format_graph
from fxsp.passes.base import Program
from fxsp.passes.functionalize.functionalize import functionalize
from fxsp.passes.normalize.normalize import normalize
from fxsp.types import Ranks
from lockstep import gradients
from poisoning import run
from replicated import check_replicated
from simulated import Simulated
from with_grads import simulate_with_grads

__all__ = ["Case", "Input", "NotAProgram", "Refused", "Result", "check", "script"]


@dataclass
class Result:
    """What a check saw, for statistics."""

    #: The partitioned graphs.
    programs: list[Program] = field(default_factory=list)
    #: How many times the program was run and compared, each with other lengths.
    runs: int = 0
    #: Comparisons in which rounding was all the difference, and larger than usual.
    rounding: int = 0


def check(case: Case, *, poison_pads: bool = True) -> Result:
    """Compare the program with its partitioned form; ``AssertionError`` shows both where they differ."""
    if case.training and not case.double:
        # A gradient that is zero by cancellation is nothing but rounding.
        case = replace(case, double=True)
    result = Result()
    try:
        execute(case, case.function())
    except (RuntimeError, IndexError, ValueError) as error:
        raise NotAProgram from error
    (_check_compiled if case.dynamo else _check_traced)(case, poison_pads, result)
    return result


def _check_traced(case: Case, poison_pads: bool, result: Result) -> None:
    program = partition(case)
    result.programs.append(program)
    for other in [case, *(x for x in other_lengths(case) if serves(program, x))]:
        if other is not case and not runs(other):
            continue
        values = other.values()
        with _shown(other, program):
            if other.training:
                given, _ = wanted_gradients(other)
                leaves = [x.requires_grad_(x.is_floating_point()) for x in values]
                # Now and then by the registered derivatives: as the lock-step ones, but they take long to trace.
                if other.seed == 0 and other is case:
                    outputs, grads = simulate_with_grads(program.gm, case.size, leaves, given)
                else:
                    outputs, grads = gradients(program.gm, case.size, leaves, given, poison_pads=poison_pads)
                found = Values(check_replicated(outputs), gradients=check_replicated(grads))
            else:
                simulated = run(program.gm, case.size, values, poison_pads=poison_pads)
                found = Values(check_replicated(simulated.outputs), check_replicated(simulated.inputs))
        _compare(other, found, program, poison_pads, result)


def _check_compiled(case: Case, poison_pads: bool, result: Result) -> None:
    def compile_(gm: torch.fx.GraphModule, inputs: Sequence[Any], ranks: Ranks) -> Program:
        try:
            normal = functionalize(normalize(gm, inputs))
        except UnsupportedError as error:
            raise Refused(str(error)) from error
        program = partitioned(case, normal)
        result.programs.append(program)
        return program

    torch.compiler.reset()
    function = torch.compile(
        case.function(plan_of(case)), backend=Simulated(case.size, compile_, poison_pads=poison_pads), fullgraph=True
    )
    for other in _calls(case):
        with _shown(other, None):
            try:
                found = execute(other, function, mark=case.dynamic)
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
    return [case, *(other for other in other_lengths(case)[:2] if runs(other))]


def _traceable(case: Case) -> bool:
    """Whether Dynamo can trace the program at all (not forward-mode derivatives of views at symbolic offsets, say)."""
    torch.compiler.reset()
    function = torch.compile(case.function(), backend="eager", fullgraph=True)
    try:
        for other in _calls(case):
            execute(other, function, mark=case.dynamic)
    except TorchRuntimeError:
        return False
    return True


class _shown:  # noqa: N801  (a context manager)
    """A disagreement of ranks is a failure that shows the program."""

    def __init__(self, case: Case, program: Program | None) -> None:
        self.case, self.program = case, program

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, VerificationError):
            raise AssertionError(f"{error}\n{_show(self.case, self.program)}") from error


def _compare(case: Case, found: Values, program: Program, poison_pads: bool, result: Result) -> None:
    expected = execute(case, case.function())
    result.runs += 1
    if not found.written:
        expected.written = []  # the lock-step run does not say
    got, wanted = found.named(), expected.named()
    assert got.keys() == wanted.keys(), f"{list(got)} instead of {list(wanted)}\n{_show(case, program)}"
    for name, want in wanted.items():
        problem = difference(got[name], want)
        if not problem:
            continue
        if not case.double and is_rounding(case, name, got[name], want):
            # A long random program may amplify rounding: then float64 tells who is how far from the truth.
            result.rounding += 1
            check(replace(case, double=True), poison_pads=poison_pads)
            return
        if case.double and is_ill_conditioned(case, name, got[name], want):
            result.rounding += 1
            continue
        raise AssertionError(f"{name}: {problem}\n{_show(case, program)}")


def _show(case: Case, program: Program | None) -> str:
    graph = format_graph(program.gm, program.ranks) if program is not None else ""
    return f"{case!r}\n{graph}"
