"""``fxsp.explain``: what the compiler would do with a model on any number of ranks, without any of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxsp.cost.metrics import Measures, measure
from fxsp.cost.share import LEAST
from fxsp.errors import OptionError
from fxsp.inspection.diff import diff_stages
from fxsp.inspection.printer import Row, format_rows
from fxsp.inspection.report_text import report_lines
from fxsp.inspection.wire import format_bytes
from fxsp.offline.partition import OfflineResult, partition_offline
from fxsp.offline.progress import check_size, told
from fxsp.offline.provenance import UnknownNameError, reasons
from fxsp.offline.render import page as html
from fxsp.offline.render.data import graph_data
from fxsp.passes.pipeline import STAGES, stage_named
from fxsp.plan import did_you_mean, listing
from fxsp.report import AttentionRecord, CollectiveRecord, GatherRecord, PlanRecord, totals
from fxsp.types import Ranks

__all__ = ["Explanation", "explain"]


@dataclass
class Explanation:
    """What :func:`explain` found; ``str`` is one screen.  Lists run over all graphs, in the order of their tracing."""

    model: str
    world_size: int
    results: list[OfflineResult]
    #: One for each graph; None for a graph that stays whole.
    measures: list[Measures | None]
    seconds: float = 0.0

    @property
    def _measured(self) -> list[Measures]:
        return [m for m in self.measures if m is not None]

    @property
    def plan(self) -> list[PlanRecord]:
        """Entries of the plan, applied or not, and why."""
        return [record for result in self.results for record in result.report.plan]

    @property
    def attentions(self) -> list[AttentionRecord]:
        return [record for result in self.results for record in result.report.attentions]

    @property
    def collectives(self) -> list[CollectiveRecord]:
        return [record for result in self.results for record in result.report.collectives]

    @property
    def implicit_gathers(self) -> list[GatherRecord]:
        """Gathers that an operator needs; those that graph outputs need are in :attr:`collectives` only."""
        return [g for result in self.results for g in result.report.implicit_gathers if g.kind == "implicit"]

    @property
    def flops_total(self) -> int:
        """Operations of one forward pass on one device (the graphs that are split)."""
        return sum(m.flops_total for m in self._measured)

    @property
    def flops_per_rank(self) -> list[int]:
        """Operations of each rank, pads and repeated work included."""
        return [sum(ranks) for ranks in zip(*(m.flops_per_rank for m in self._measured), strict=True)]

    @property
    def backward_collectives(self) -> list[CollectiveRecord]:
        """What the gradients need, where gradients may be asked for."""
        return [record for result in self.results for record in result.report.backward]

    @property
    def communication_forward(self) -> dict[str, tuple[int, int]]:
        """Kind of collective -> how many, and the bytes that each rank sends in all of them, in a forward pass."""
        return totals((sent.record.kind, sent.bytes) for m in self._measured for sent in m.forward)

    @property
    def communication_backward(self) -> dict[str, tuple[int, int]]:
        """The same for the backward pass; nothing if nothing requires grad (or grad mode is off).

        Gradients of parameters are counted one by one; they travel in buckets, in fewer messages.
        """
        return totals((sent.record.kind, sent.bytes) for m in self._measured for sent in m.backward)

    @property
    def communication(self) -> dict[str, tuple[int, int]]:
        """Forward and, in training, backward: all that a call, and a step, sends."""
        ways = [m.forward for m in self._measured] + [m.backward for m in self._measured]
        return totals((sent.record.kind, sent.bytes) for way in ways for sent in way)

    @property
    def warnings(self) -> list[str]:
        """What is told before all else: a plan that splits next to nothing, as what it splits is gathered again."""
        shares = [r.report.share for r in self.results if r.report.share is not None]
        if self.world_size == 1 or not shares or max(shares) >= LEAST:
            return []
        gathered = self.implicit_gathers
        again = ""
        if gathered:
            more = f" and {len(gathered) - 1} more" if len(gathered) > 1 else ""
            where = f" in {gathered[0].module}" if gathered[0].module else ""
            at = f" ({gathered[0].source})" if gathered[0].source else ""
            again = f"; what it splits is gathered again by {gathered[0].op}{where}{at}{more}"
        text = f"WARNING: the plan is of no use: {max(shares):.0%} of the work runs on shards{again}. "
        return [text + "Split the dimension of the tokens, where they come from: fxsp.infer_plan finds it"]

    @property
    def stages(self) -> list[str]:
        """Names of the stages that :meth:`graph` prints."""
        return list(dict.fromkeys(stage for result in self.results for stage in result.stages))

    def graph(self, stage: str = STAGES[-1], index: int = 0) -> str:
        """The graph after a stage, as text; ``index`` counts graphs.  Raises :class:`OptionError` for unknown names."""
        return format_rows(self._stage(stage, index), Ranks(0, self.world_size, ""))

    def diff(self, before: str = "normalize", after: str = STAGES[-1], index: int = 0) -> str:
        """What changed between two stages; coloured on a terminal, unless ``NO_COLOR`` is set."""
        return diff_stages(self._stage(before, index), self._stage(after, index))

    def _stage(self, stage: str, index: int) -> list[Row]:
        if not 0 <= index < len(self.results):
            raise OptionError(f"there is no graph {index}; {self.model} was traced as {len(self.results)}")
        stages, stage = self.results[index].stages, stage_named(stage)
        if stage not in stages:
            why = self.results[index].report.unsharded
            raise OptionError(
                f"graph {index} has no stage {stage!r}.{did_you_mean(stage, stages)}\n  It has: {listing(stages)}"
                + (f"; it runs whole: {why}" if why else "")
            )
        return stages[stage]

    def explain(self, name: str) -> str:
        """Why a module, a value or a collective is as it is: the chain of reasons, back to the plan."""
        errors: list[UnknownNameError] = []
        for result, m in zip(self.results, self.measures, strict=True):
            if result.program is not None and m is not None:
                try:
                    return "\n".join(reasons(name, result.program, m))
                except UnknownNameError as error:
                    errors.append(error)
        raise errors[0] if errors else UnknownNameError(f"nothing is split, so there is nothing to say of {name!r}")

    def to_dict(self) -> dict[str, Any]:
        """All of it as dictionaries, lists, numbers and text."""
        return {
            "model": self.model,
            "world_size": self.world_size,
            "seconds": self.seconds,
            "flops_total": self.flops_total,
            "flops_per_rank": self.flops_per_rank,
            "communication": _counts(self.communication),
            "communication_forward": _counts(self.communication_forward),
            "communication_backward": _counts(self.communication_backward),
            "graphs": [graph_data(r, m) for r, m in zip(self.results, self.measures, strict=True)],
        }

    def to_json(self, *, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False)

    def to_html(self, path: str | Path) -> Path:
        """Write a page that stands alone; returns its path."""
        target = Path(path)
        target.write_text(html.page(self), encoding="utf-8")
        return target

    def __str__(self) -> str:
        ranks = f"{self.world_size} rank{'s' if self.world_size > 1 else ''}"
        graphs = f", {len(self.results)} graphs" if len(self.results) != 1 else ""
        lines = [f"{self.model} on {ranks}{graphs}", *self.warnings]
        if not self.results:
            return lines[0] + ": Dynamo traced nothing"
        for i, (result, m) in enumerate(zip(self.results, self.measures, strict=True)):
            if len(self.results) > 1:
                lines.append(f"graph {i}:")
            lines += report_lines(result.report, m)
        return "\n".join(lines)


def explain(
    model: Callable[..., Any],
    *args: Any,
    world_size: int,
    config: Any = None,
    plan: Any = None,
    options: Mapping[str, Any] | None = None,
    progress: bool = False,
    **kwargs: Any,
) -> Explanation:
    """What ``torch.compile(model, backend="sp")`` would do for ``model(*args, **kwargs)`` on ``world_size`` ranks.

    Resets Dynamo: what was compiled before is compiled again.
    No process group, no device and no weights: parameters and inputs may be on the meta device.  ``config`` are
    degrees (a :class:`~fxsp.SequenceParallelConfig`), ``plan`` replaces the model's own; ``options`` are further
    options of the backend.  Keyword arguments of the model with those names go into ``args``.  ``progress`` tells, on
    standard error, what is going on if it takes more than two seconds.  Where the model's own plan is
    used, and one that is inferred would do less work or send fewer bytes by more than 5 %, a note says so.

    Raises what the backend raises (``PlanError``, ``OptionError``, ``UnsupportedError``, ``StrictError``).
    """
    check_size(world_size)
    given = dict(options or {})
    given |= {name: value for name, value in (("config", config), ("plan", plan)) if value is not None}
    start = time.perf_counter()
    with told(progress) as say:
        say("tracing and partitioning")
        torch.compiler.reset()
        results = partition_offline(model, args, kwargs, world_size=world_size, options=given, stages=True)
        say("counting operations, bytes and memory")
        found = Explanation(_name(model), world_size, results, _measures(results))
        own = given.get("plan") is None and not any(r.report.inferred is not None for r in results)
        if own and None not in found.measures:
            say("looking for a plan beside the model's own")
            torch.compiler.reset()
            given |= {"plan": "infer", "strict": False}
            others = partition_offline(model, args, kwargs, world_size=world_size, options=given)
            other = Explanation(found.model, world_size, others, _measures(others))
            if others and None not in other.measures and (better := _better(other, found)):
                results[0].report.notes.append(better)
    found.seconds = time.perf_counter() - start
    return found


def _measures(results: Iterable[OfflineResult]) -> list[Measures | None]:
    return [measure(r.program) if r.program is not None else None for r in results]


def _better(other: Explanation, own: Explanation) -> str:
    """A sentence, if an inferred plan has less work or sends fewer bytes than the model's own by more than 5 %."""
    work = [max(e.flops_per_rank, default=0) for e in (other, own)]
    sent = [sum(size for _, size in e.communication.values()) for e in (other, own)]
    if not any(mine < 0.95 * yours for mine, yours in (work, sent)):
        return ""
    return (
        f"the model's own plan is used: {work[1]} operations a rank, {format_bytes(sent[1])} sent; "
        f"with an inferred one it would be {work[0]} and {format_bytes(sent[0])}"
    )


def _name(model: Any) -> str:
    inner = getattr(model, "_orig_mod", model)
    return getattr(inner, "__qualname__", None) or type(inner).__name__


def _counts(communication: dict[str, tuple[int, int]]) -> dict[str, dict[str, int]]:
    return {kind: {"count": number, "bytes": size} for kind, (number, size) in communication.items()}
