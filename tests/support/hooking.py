"""A model with eager hooks beside the same model compiled, and on one process; used by the tests of hooks.

:func:`run_hooked` is called on every rank and returns a :class:`Hooked` of plain numbers and text;
:func:`simulate_compiled` compiles the hooked model for all ranks in this process.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

import fxsp
import models
import zoo
from fxsp.hooks import tracing
from fxsp.hooks.sequence_parallel import apply_sequence_parallel, remove_sequence_parallel, report_of
from fxsp.plan import find_plan
from running import _cast, build, collectives, error_of, recorded, simulating
from training import _checkpointing, _gradients, _inputs, _loss, _worst

__all__ = ["HookCase", "Hooked", "run_hooked", "simulate_compiled"]


@dataclass(frozen=True)
class HookCase:
    """One model.  ``modes``: ``"eager"`` hooks, ``"sp"`` (the hooked model, compiled by backend ``"sp"``), ``"plain"``
    and ``"plain dynamic"`` (the hooked model as one graph of another backend)."""

    model: str
    arguments: dict[str, Any] = field(default_factory=dict)
    #: Arguments of the builder for further calls of the same model.
    calls: tuple[dict[str, Any], ...] = ()
    #: Arguments of ``SequenceParallelConfig``; None: no configuration.
    degrees: tuple[int, int] | None = None
    plan: Any = None
    modes: tuple[str, ...] = ("eager", "sp")
    #: Compare gradients too; ``checkpoint`` is ``""``, ``"plain"`` or ``"reentrant"``.
    gradients: bool = False
    checkpoint: str = ""
    #: Weights and inputs in float64, where rounding cannot hide (or look like) a mistake.
    double: bool = False

    def __str__(self) -> str:
        shown = [*self.arguments.items()]
        shown += [(key, getattr(self, key)) for key in ("degrees", "checkpoint") if getattr(self, key)]
        return f"{self.model}({', '.join(f'{k}={v}' for k, v in shown)})"


@dataclass
class Hooked:
    """What one rank saw: errors against one process by mode, and what the eager hooks report."""

    errors: dict[str, float] = field(default_factory=dict)
    gradient_errors: dict[str, tuple[float, str]] = field(default_factory=dict)
    #: Names of gradients that are there and should not, or the other way round.
    mismatched: list[str] = field(default_factory=list)
    attentions: list[str] = field(default_factory=list)
    implicit: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    #: Collectives of one eager call.
    ran: Counter[str] = field(default_factory=Counter)
    #: Of the compiled model: attentions, and notes of the report.
    compiled_attentions: list[str] = field(default_factory=list)
    compiled_notes: list[str] = field(default_factory=list)


def _checkpointed(model: torch.nn.Module, how: str) -> None:
    if how == "reentrant":
        model.gradient_checkpointing_enable({"use_reentrant": True})  # type: ignore[operator]
        model.train()
    elif how:
        _checkpointing(model)


def _compiled(model: torch.nn.Module, mode: str, plan: Any) -> Any:
    torch.compiler.reset()
    if mode == "sp":
        return torch.compile(model, backend="sp", options={"inner": "eager", "plan": plan}, dynamic=False)
    dynamic = mode == "plain dynamic"
    return torch.compile(model, backend="eager" if dynamic else "aot_eager", fullgraph=True, dynamic=dynamic)


def _hooked(case: HookCase) -> tuple[torch.nn.Module, torch.nn.Module, list[dict[str, Any]], Any]:
    """The model with hooks, the same without, the inputs of each call, and the plan."""
    model, first = build(case.model, case.arguments)
    calls = [first, *(build(case.model, {**case.arguments, **other})[1] for other in case.calls)]
    if case.double:
        model, calls = model.double(), _cast(calls, torch.float64)
    plan = case.plan or zoo.PLANS.get(case.model) or find_plan(model)
    _checkpointed(model, case.checkpoint)
    whole = copy.deepcopy(model)
    config = None if case.degrees is None else fxsp.SequenceParallelConfig(*case.degrees)
    apply_sequence_parallel(model, config, plan)
    return model, whole, calls, plan


def simulate_compiled(size: int, case: HookCase) -> Hooked:
    """Mode ``"sp"`` of ``case`` on ``size`` ranks in this process: what each of them sees, as outputs are compared."""
    model, whole, calls, plan = _hooked(case)
    compiler, result = simulating(size)({"plan": plan}), Hooked()
    run = torch.compile(model, **compiler.arguments, dynamic=False)
    backend = mock.patch.object(tracing, "sp", compiler.arguments["backend"])  # that the hooks stand aside for
    with recorded() as result.warnings, backend:
        for inputs in calls:
            _compare(result, "sp", run, model, whole, inputs, case.gradients)
    report = compiler.reports()[-1]
    result.compiled_attentions = [record.method for record in report.attentions]
    result.compiled_notes = list(report.notes)
    result.implicit = [str(record) for record in report.implicit_gathers if record.kind == "implicit"]
    return result


def run_hooked(rank: int, size: int, case: HookCase) -> Hooked:
    """Run ``case`` on this rank."""
    model, whole, calls, plan = _hooked(case)
    result = Hooked()
    with recorded() as result.warnings:
        for mode in case.modes:
            run = model if mode == "eager" else _compiled(model, mode, plan)
            for inputs in calls:
                _compare(result, mode, run, model, whole, inputs, case.gradients)
            if mode != "eager":
                report = fxsp.reports()[-1]
                result.compiled_attentions = [record.method for record in report.attentions]
                result.compiled_notes = list(report.notes)
        with torch.no_grad(), collectives() as result.ran:
            model(**calls[0])
        report = report_of(model)
        result.attentions = [record.method for record in report.attentions]
        result.implicit = [str(record) for record in report.implicit_gathers]
        result.notes = list(report.notes)
    remove_sequence_parallel(model, plan)
    assert not any("_hook_registry" in vars(module) or "forward" in vars(module) for module in model.modules())
    return result


def _compare(
    result: Hooked,
    mode: str,
    run: Any,
    model: torch.nn.Module,
    whole: torch.nn.Module,
    inputs: dict[str, Any],
    gradients: bool,
) -> None:
    if not gradients:
        with torch.no_grad():
            error = error_of(models.first_tensor(run(**inputs)), models.first_tensor(whole(**inputs)))
        result.errors[mode] = max(error, result.errors.get(mode, 0.0))
        return
    ours, same = _inputs(inputs, True), _inputs(inputs, True)
    for module in (model, whole):
        module.zero_grad()
    loss, expected_loss = _loss(run(**ours)), _loss(whole(**same))
    loss.backward()
    expected_loss.backward()
    found, expected = _gradients(model, ours), _gradients(whole, same)
    result.errors[mode] = max(error_of(loss, expected_loss), result.errors.get(mode, 0.0))
    result.gradient_errors[mode] = max(_worst(found, expected), result.gradient_errors.get(mode, (0.0, "")))
    result.mismatched += [name for name in expected if (found[name] is None) != (expected[name] is None)]
