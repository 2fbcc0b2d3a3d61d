"""A model on real ranks beside the same model on one process: what the tests of whole models compare and count.

:func:`run_case` is called on every rank (``ranks(2).run(run_case, Case(...))``); it builds the model, runs it eagerly
and compiled with ``backend="sp"``, and returns an :class:`Outcome` of plain numbers and text.  :func:`simulate_case`
does the same for all ranks in this process, with one compile instead of one on each rank.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import fxsp
import lockstep
import models
import zoo
from fxsp.report import Report
from simulated import Simulated, by_plan

__all__ = [
    "MOVES",
    "Case",
    "Compiler",
    "Outcome",
    "build",
    "collectives",
    "compiled",
    "error_of",
    "gradient_error",
    "moves",
    "on_this_rank",
    "recorded",
    "run_case",
    "simulate_case",
    "simulating",
]


@dataclass(frozen=True)
class Case:
    """One model on several ranks.  ``arguments`` are those of its builder in :mod:`models` or :mod:`zoo`."""

    model: str
    arguments: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    #: ``"float32"``, ``"bfloat16"`` (weights and inputs) or ``"autocast"`` (float32 weights under bf16 autocast).
    precision: str = "float32"
    #: Arguments of the builder for further calls of the same compiled model (other lengths, say).
    calls: tuple[dict[str, Any], ...] = ()
    dynamic: bool | None = None

    def __str__(self) -> str:
        parts = [*(f"{k}={v}" for k, v in self.arguments.items())]
        return f"{self.model}({', '.join(parts)}) {self.precision}"


@dataclass
class Outcome:
    """What one rank saw."""

    #: Relative error (2-norm) of each call against the fp32 model on one process.
    errors: list[float]
    #: The same for the uncompiled model at the same precision: what the precision itself costs.
    eager_errors: list[float]
    #: Graphs compiled at each call.
    compiles: list[int]
    #: Collectives that ran in the first call, by operator.
    ran: Counter[str]
    #: Collectives of the report, by kind.
    planned: Counter[str]
    #: Methods of the attentions, in order.
    attentions: list[str]
    #: Implicit gathers, as text.
    implicit: list[str]
    #: Gathers that the plan, or a graph output, asked for.
    other_gathers: list[str]
    #: The partitioned graph, printed.
    text: str
    #: Why the graph runs whole, if it does.
    unsharded: list[str]
    #: Warnings of fxsp.
    warnings: list[str]
    #: Plan entries that did not apply.
    not_applied: list[str]


#: Operators that move data, and the names that reports use.
MOVES = {
    "_c10d_functional::all_to_all_single": "all_to_all",
    "_c10d_functional::all_reduce": "all_reduce",
    "_c10d_functional::all_reduce_": "all_reduce",
    "_c10d_functional::all_gather_into_tensor": "all_gather",
    "_c10d_functional::reduce_scatter_tensor": "reduce_scatter",
}


@contextlib.contextmanager
def collectives() -> Iterator[Counter[str]]:
    """Counts the collectives that run inside, as the profiler sees them; filled at the end."""
    counts: Counter[str] = Counter()
    with moves() as seen:
        yield counts
    counts.update(kind for kind, _ in seen)


@contextlib.contextmanager
def moves() -> Iterator[list[tuple[str, list[int]]]]:
    """The collectives that run inside, as the profiler sees them, and the shape of what is sent; filled at the end.

    Its own ``events()`` make a tree of all operators first, which takes longer than the model.
    """
    seen: list[tuple[str, list[int]]] = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        yield seen
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    seen += [(MOVES[event.name()], event.shapes()[0]) for event in events if event.name() in MOVES]


@contextlib.contextmanager
def recorded() -> Iterator[list[str]]:
    """The warnings of fxsp raised inside, as text; filled at the end.  Others are dropped.

    So is what logits cost: small models send little else.  It has tests of its own (``test_output_gathers``).
    """
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    texts += [f"{w.category.__name__}: {w.message}" for w in caught if _is_meant(w.category)]


def _is_meant(category: type[Warning]) -> bool:
    return issubclass(category, fxsp.FxspWarning) and not issubclass(category, fxsp.OutputGatherWarning)


def error_of(found: Tensor, expected: Tensor) -> float:
    """``|found - expected| / |expected|`` in the 2-norm, in float64; infinite for another shape."""
    if found.shape != expected.shape:
        return float("inf")
    difference = (found.detach().double() - expected.detach().double()).norm().item()
    scale = expected.detach().double().norm().item()
    return difference / scale if scale else difference


def gradient_error(found: Tensor, expected: Tensor, usual: float) -> float:
    """:func:`error_of` a gradient; one that is zero but for rounding (a key's bias) counts by what is ``usual``."""
    norm = expected.norm().item()
    return error_of(found, expected) * norm / max(norm, 1e-2 * usual)


def build(name: str, arguments: dict[str, Any]) -> models.Built:
    """A model of :mod:`models` or :mod:`zoo`, and its inputs."""
    builder: Callable[..., models.Built] = getattr(models if hasattr(models, name) else zoo, name)
    return builder(**arguments)


def compiled(model: nn.Module, **options: Any) -> Any:
    """``torch.compile(model, backend="sp")``, with ``aot_eager`` inside unless told otherwise."""
    return torch.compile(model, backend="sp", options={"inner": "aot_eager", **options})


@dataclass(frozen=True)
class Compiler:
    """What compiles a case: on this rank, or for all ranks in this process."""

    #: Arguments of ``torch.compile``.
    arguments: dict[str, Any]
    #: Of all graphs that it compiled.
    reports: Callable[[], list[Report]]
    #: Counts the collectives that run inside.
    collectives: Callable[[], contextlib.AbstractContextManager[Counter[str]]]


def on_this_rank(options: dict[str, Any]) -> Compiler:
    before = len(fxsp.reports())
    arguments = {"backend": "sp", "options": {"inner": "aot_eager", **options}}
    return Compiler(arguments, lambda: fxsp.reports()[before:], collectives)


def simulating(size: int) -> Callable[[dict[str, Any]], Compiler]:
    def for_all_ranks(options: dict[str, Any]) -> Compiler:
        torch.compiler.reset()
        reports: list[Report] = []
        return Compiler({"backend": Simulated(size, by_plan(options, reports))}, lambda: reports, lockstep.collectives)

    return for_all_ranks


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    return tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, tree)


def run_case(rank: int, size: int, case: Case) -> Outcome:
    """Run ``case`` on this rank, without gradients."""
    return _run(case, on_this_rank)


def simulate_case(size: int, case: Case) -> Outcome:
    """The same on ``size`` ranks in this process: what each of them sees, as their outputs are compared."""
    return _run(case, simulating(size))


def _run(case: Case, compiler_of: Callable[[dict[str, Any]], Compiler]) -> Outcome:
    model, inputs = build(case.model, case.arguments)
    calls = [inputs, *(build(case.model, {**case.arguments, **other})[1] for other in case.calls)]
    with torch.no_grad():
        expected = [models.first_tensor(model(**call)) for call in calls]
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=case.precision == "autocast")
    if case.precision == "bfloat16":
        model = model.to(torch.bfloat16)
        calls = _cast(calls, torch.bfloat16)
    compiles, found, eager = [], [], []
    with torch.no_grad(), autocast, recorded() as texts, contextlib.redirect_stdout(io.StringIO()):
        if case.precision != "float32":
            eager = [models.first_tensor(model(**call)) for call in calls]
        compiler = compiler_of({"print": "partitioned", **case.options})
        fast = torch.compile(model, **compiler.arguments, dynamic=case.dynamic)
        for call in calls:
            had = len(compiler.reports())
            found.append(models.first_tensor(fast(**call)))
            compiles.append(len(compiler.reports()) - had)
        with compiler.collectives() as ran:
            models.first_tensor(fast(**calls[0]))
    reports = compiler.reports()
    first = reports[0]
    return Outcome(
        errors=[error_of(a, b) for a, b in zip(found, expected, strict=True)],
        eager_errors=[error_of(a, b) for a, b in zip(eager, expected, strict=False)],
        compiles=compiles,
        ran=ran,
        planned=Counter(record.kind for record in first.collectives),
        attentions=[record.method for record in first.attentions],
        implicit=[str(g) for report in reports for g in report.implicit_gathers if g.kind == "implicit"],
        other_gathers=[str(g) for g in first.implicit_gathers if g.kind != "implicit"],
        text=first.stages.get("partitioned", ""),
        unsharded=[report.unsharded for report in reports if report.unsharded],
        warnings=texts,
        not_applied=[f"{r.entry}: {r.detail}" for r in first.plan if not r.applied],
    )
