"""What was compiled of a model, graph by graph, and what its last forward pass ran and sent."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxsp.capture.resolve import unwrap
from fxsp.inspection.printer import count_text
from fxsp.inspection.report_text import format_report
from fxsp.inspection.wire import format_bytes
from fxsp.lengths import hint
from fxsp.parts import denoisers
from fxsp.report import GatherRecord, Report, totals
from fxsp.split_values.calls import last_forward
from fxsp.split_values.forward import Ran

__all__ = ["ModelReport", "compiled_for", "report_of"]

_lock = threading.Lock()
_compiled: weakref.WeakKeyDictionary[nn.Module, list[Report]] = weakref.WeakKeyDictionary()


def compiled_for(modules: Iterable[nn.Module], report: Report) -> None:
    """A graph of these modules was compiled; those that are parts of others before them do not count."""
    inside: set[int] = set()
    with _lock:
        for module in modules:
            if id(module) not in inside:
                inside.update(map(id, module.modules()))
                _compiled.setdefault(module, []).append(report)


@dataclass(frozen=True)
class ModelReport:
    """All graphs of a model, and its last forward pass."""

    #: The class of the model.
    root: str
    #: The graphs, as far as they are known, those of functions that ran by themselves on split values among them; how
    #: often each ran in the last forward pass, if that was recorded (else 1), and the lengths then.
    graphs: tuple[Ran, ...]
    #: What that pass made whole outside of the graphs.
    gathers: tuple[GatherRecord, ...] = ()
    #: Whether the pass was recorded: some parts of the model are compiled by themselves.
    recorded: bool = False

    @property
    def communication(self) -> dict[str, tuple[int, int]]:
        """Kind of collective -> how many a forward pass runs, and the bytes that a rank sends in them."""
        return totals([*self._sent(), *(("gather", gather.bytes) for gather in self.gathers)])

    def _sent(self) -> Iterator[tuple[str, int]]:
        for ran in self.graphs:
            for record in ran.report.collectives:
                for _ in range(ran.calls):
                    yield record.kind, hint(record.bytes, ran.sizes)

    @property
    def implicit_gathers(self) -> list[GatherRecord]:
        """All that is made whole and was not asked for, in graphs and between them."""
        found = [gather for ran in self.graphs for gather in ran.report.implicit_gathers]
        return [gather for gather in [*found, *self.gathers] if gather.kind == "implicit"]

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        eager = [f"{ran.calls} x {ran.report.root}" for ran in self.graphs if ran.eager]
        runs = sum(ran.calls for ran in self.graphs if not ran.eager)
        what = f", run {count_text(runs, 'time')} in the last forward pass" if self.recorded else ""
        yield f"{self.root}: {count_text(len(self.graphs) - len(eager), 'graph')}{what}"
        parts = [f"{count} x {kind} ({format_bytes(sent)})" for kind, (count, sent) in self.communication.items()]
        yield f"  collectives of a forward pass (sent per rank): {', '.join(parts) or 'none'}"
        for ran in self.graphs:
            if ran.eager and not ran.report.collectives:
                continue
            times = f", {count_text(ran.calls, 'time')}" if self.recorded else ""
            share = ran.report.share
            work = "" if share is None else f", {share:.0%} of its work on shards"
            yield f"  {ran.report.root}{' by itself' if ran.eager else ''}{times}{work}:"
            yield from (f"    {line}" for line in format_report(ran.report).splitlines())
        if eager:
            yield f"  between the graphs, on the rows of a rank: {', '.join(eager)}"
        if self.gathers:
            yield "  made whole outside of the graphs:"
            yield from (f"    {gather}" for gather in self.gathers)


def report_of(model: Any) -> ModelReport:
    """What was compiled of ``model``, and of all modules in it, by ``backend="sp"``, and what its last forward did.

    ``model`` is a module, as it is or as ``torch.compile`` returned it; compiled as a whole or block by block; or a
    pipeline, of which its denoisers are told together (``transformer``, ``transformer_2``, ``unet``).
    Bytes are those that a rank sends.  A model that was never compiled has a report without graphs.
    """
    if isinstance(model, nn.Module):
        return _report_of(unwrap(model))
    parts = [_report_of(unwrap(part)) for part in denoisers(model).values()]
    if not parts:
        raise TypeError(f"report_of takes a torch.nn.Module or a pipeline, not {type(model).__name__}")
    graphs = tuple(ran for part in parts for ran in part.graphs)
    gathers = tuple(gather for part in parts for gather in part.gathers)
    return ModelReport(type(model).__name__, graphs, gathers, any(part.recorded for part in parts))


def _report_of(module: nn.Module) -> ModelReport:
    with _lock:
        reports = [report for part in module.modules() for report in _compiled.get(part, ())]
    forward = last_forward(module)
    if forward is None:
        return ModelReport(type(module).__name__, tuple(Ran(report, calls=1) for report in reports))
    graphs = [*forward.graphs.values()]
    graphs += [Ran(report) for report in reports if id(report) not in forward.graphs]
    return ModelReport(type(module).__name__, tuple(graphs), tuple(forward.gathers), recorded=True)
