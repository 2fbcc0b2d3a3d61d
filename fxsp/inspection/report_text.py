"""A report as sections of lines: what ``format_report`` prints, and ``explain`` of a graph that was measured."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from fxsp.cost.formula import Names, Sent, sum_text
from fxsp.cost.metrics import Measures
from fxsp.inspection.wire import format_bytes
from fxsp.report import AttentionRecord, CollectiveRecord, GatherRecord, PlanRecord, Report, tell_with
from fxsp.types import as_length

__all__ = [
    "Section",
    "attention_lines",
    "format_count",
    "format_report",
    "legend_text",
    "memory_texts",
    "report_lines",
    "sections",
]

#: Lines of one section; what is longer is cut, and says so.
_LIMIT = 12

_T = TypeVar("_T")
_K = TypeVar("_K", bound=Hashable)


@dataclass(frozen=True)
class Section:
    """A title and its lines; those past the limit are cut, and ``foot`` stands below."""

    title: str
    lines: Sequence[str]
    limit: int = _LIMIT
    foot: str = ""

    def text(self) -> list[str]:
        """The lines of the section; nothing if it has none."""
        rows = list(self.lines)
        if not rows:
            return []
        cut = rows[: self.limit] if len(rows) > self.limit + 1 else rows
        more = [f"… and {len(rows) - len(cut)} more"] if len(cut) < len(rows) else []
        return [f"{self.title}:", *(f"  {row}" for row in [*cut, *more, *filter(None, [self.foot])])]


def sections(report: Report, measures: Measures | None = None) -> list[Section]:
    """A report, part by part.  Equal records share a line.

    A graph that was measured tells bytes as numbers, with their formulas, and has lines about work and memory.
    """
    forward: Sequence[Sent] = [Sent(record, record.bytes) for record in report.collectives]
    backward: Sequence[Sent] = [Sent(record, record.bytes) for record in report.backward]
    names, limit, legend = None, _LIMIT, ""
    if measures is not None:
        forward, backward, names, limit = measures.forward, measures.backward, measures.names, 25
        legend = legend_text(measures)
    last = "backward" if backward else "forward"
    found = [
        Section("plan" if report.inferred is None else "plan (inferred)", [*plan_lines(report.plan)]),
        Section("attention", [*attention_lines(report.attentions, () if measures is None else memory_texts(measures))]),
        *(
            Section(
                f"collectives (sent per rank, {way})",
                [*_collectives(sent, names)],
                limit,
                legend if way == last else "",
            )
            for way, sent in (("forward", forward), ("backward", backward))
        ),
        Section(
            "implicit gathers (an operator needs all tokens)",
            [*gather_lines(gather for gather in report.implicit_gathers if gather.kind == "implicit")],
        ),
        Section("gathers for graph outputs", [*output_lines(report.implicit_gathers)]),
        Section("work and memory", () if measures is None else [*_work(measures)]),
        Section("notes", report.notes),
    ]
    return [section for section in found if section.lines]


def report_lines(report: Report, measures: Measures | None = None) -> list[str]:
    """The text of all :func:`sections`, below a line that says why, if the graph runs whole."""
    first = [f"runs whole on every rank: {report.unsharded}"] if report.unsharded else []
    return first + [line for section in sections(report, measures) for line in section.text()]


def format_report(report: Report) -> str:
    """One screen: plan entries, attentions, collectives, implicit gathers, notes.  Equal records share a line."""
    lines = report_lines(report)
    if report.timings:
        spent = sorted(report.timings.items(), key=lambda item: -item[1])
        text = ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in spent[:4])
        lines.append(f"compile time: {sum(report.timings.values()):.2f} s ({text})")
    return "\n".join(lines) if lines else "nothing to report: no plan entry applied"


tell_with(format_report)


def places_text(records: Iterable[CollectiveRecord | AttentionRecord]) -> str:
    """Where records come from, alike ones once: ``blocks.*.attn (model.py:12), head (model.py:30) and 2 more``."""
    found = list(dict.fromkeys((_pattern(r.module), r.source) for r in records))
    shown = ", ".join(f"{module} ({source})" if source else module for module, source in found[:2])
    return shown + (f" and {len(found) - 2} more" if len(found) > 2 else "")


def _groups(records: Iterable[tuple[_K, _T]]) -> Iterator[tuple[_K, list[_T]]]:
    """Records with equal keys together, in order of first appearance."""
    found: dict[_K, list[_T]] = {}
    for key, record in records:
        found.setdefault(key, []).append(record)
    return iter(found.items())


def plan_lines(records: list[PlanRecord]) -> Iterator[str]:
    """Entries of a plan, alike ones on one line."""
    keyed = [((not r.applied, _pattern(r.entry), r.detail), r) for r in records]
    for (missed, entry, detail), group in _groups(sorted(keyed, key=lambda row: row[0][0])):
        times = f" ({len(group)} times)" if len(group) > 1 else ""
        if missed:
            yield f"not applied  {entry}{times}: {detail or 'no reason recorded'}"
        else:
            yield f"applied      {entry}{times}" + (f"  {detail}" if detail else "")


def attention_lines(records: list[AttentionRecord], formulas: Sequence[str] = ()) -> Iterator[str]:
    """Attentions, alike ones on one line, and what each moves through memory; ``formulas`` of the latter, if known."""
    texts = formulas or [""] * len(records)
    keyed = (
        ((_pattern(r.module), r.method, str(r.bytes), r.rejected, r.detail, r.producers, text), (r, text))
        for r, text in zip(records, texts, strict=True)
    )
    for (module, method, _, rejected, detail, _, _), group in _groups(keyed):
        record, text = group[0]
        where = " ".join([*([module] if module else []), *([f"({record.source})"] if record.source else [])])
        line = f"{len(group)} x {method}" + (f" in {where}" if where else "") + f": {format_bytes(record.bytes)} each"
        if detail:
            line += f"; {detail}"
        if rejected:
            line += "; rejected: " + ", ".join(f"{name} ({reason})" for name, reason in rejected)
        yield line
        if record.memory is not None and record.memory.moves:
            yield f"    {memory_text(record, text)}"


def memory_text(record: AttentionRecord, formula: str = "") -> str:
    """``"16 passes over q, k, v, o in memory, 6.0 KiB each = 1024·⌈S/P⌉ B; fused by Inductor: q, k: rms_norm"``."""
    assert record.memory is not None
    line = f"{record.memory.passes} passes over q, k, v, o in memory, {format_bytes(record.memory.bytes)} each"
    line += f" = {formula}" if formula else ""
    return line + (f"; fused by Inductor: {'; '.join(record.producers)}" if record.producers else "")


def _collectives(sent: Sequence[Sent], names: Names | None) -> Iterator[str]:
    """Collectives, alike ones together; with ``names``, those of the lengths, each with its formula below."""
    for (kind, reason), group in _groups(((s.record.kind, s.record.reason), s) for s in sent):
        line, place = f"{len(group):4d} x {kind:<14} {_total(group)}", places_text(s.record for s in group)
        if names is None:
            about = ", ".join(text for text in (reason, f"in {place}" if place else "") if text)
            yield f"{line}  {about}".rstrip()
        else:
            yield f"{line:<31}  {reason}".rstrip()
            yield f"       = {sum_text(((s.bytes, s.formula) for s in group), names) or 'nothing'}, in {place}"
    if sent:
        yield f"{len(sent):4d}   {'in all':<14} {_total(sent)}"


def gather_lines(records: Iterable[GatherRecord]) -> Iterator[str]:
    """Gathers, alike ones on one line."""
    keyed = (((r.op, _pattern(r.module), r.source, r.reason, str(r.bytes)), r) for r in records)
    for (op, module, source, reason, _), group in _groups(keyed):
        times = f"{len(group)} x " if len(group) > 1 else ""
        where = f" in {module}" if module else ""
        at = f" ({source})" if source else ""
        yield f"{times}{op}{where}{at}: {reason}; {format_bytes(group[0].bytes)}" + (" each" if times else "")


def output_lines(records: Iterable[GatherRecord]) -> Iterator[str]:
    """Gathers for outputs, by name: ``2 x output cache.layers[*].keys, of model.layers.*.self_attn: 6.0 KiB each``."""
    outputs = [record for record in records if record.kind != "implicit"]
    keyed = (((re.sub(r"\d+", "*", r.name), _pattern(r.module), str(r.bytes)), r) for r in outputs if r.name)
    for (name, module, _), group in _groups(keyed):
        where = f", of {module}" if module else ""
        if len(group) > 1:
            yield f"{len(group)} x output {name}{where}: {format_bytes(group[0].bytes)} each"
        else:
            yield f"output {group[0].name}{where}: {format_bytes(group[0].bytes)}"
    yield from gather_lines(record for record in outputs if not record.name)


def _pattern(path: str) -> str:
    """``blocks.3.attn`` as ``blocks.*.attn``: layers of one kind share a line."""
    head, bracket, rest = path.partition("[")
    if ":" in head:  # a plan entry without an argument: `blocks.3: SequenceParallelOutput(...)`
        head, bracket, rest = path.partition(":")
    return ".".join("*" if part.isdigit() else part for part in head.split(".")) + bracket + rest


def _total(sent: Iterable[Sent]) -> str:
    return format_bytes(as_length(sum((s.bytes for s in sent), start=0)))


# --- figures ----------------------------------------------------------------------------------------------------------


def format_count(n: float) -> str:
    """``"1.5 TFLOP"``."""
    for unit in ("", "K", "M", "G", "T"):
        if n < 1000:
            return f"{n:.3g} {unit}FLOP"
        n /= 1000
    return f"{n:.3g} PFLOP"


def memory_texts(m: Measures) -> list[str]:
    """The formula of what each attention moves through memory, where there is one."""
    texts = []
    for known in m.memory:
        formulas, rest = known or ([], 0)
        texts.append(sum_text([*((0, formula) for formula in formulas), (rest, None)], m.names) if formulas else "")
    return texts


def legend_text(m: Measures) -> str:
    """``P = 8; S = 4096 tokens of <root>[x]``: what the letters of formulas are."""
    among = sorted({f.members for s in (*m.forward, *m.backward) if (f := s.formula) is not None and f.members})
    lengths = [f"{short} = {n} tokens of {what}" for short, what, n in m.names.legend()]
    return "; ".join([f"P = {len(m.flops_per_rank)}", *[f"U = {n}" for n in among], *lengths])


def _work(m: Measures) -> Iterator[str]:
    size, busiest = len(m.flops_per_rank), max(m.flops_per_rank, default=0)
    if m.flops_total:
        even = m.flops_total / (size * busiest) if busiest else 1.0
        idlest = min(m.flops_per_rank)
        spread = "each" if idlest == busiest else f"at most, {format_count(idlest)} at least"
        yield (
            f"operations   {format_count(m.flops_total)} on one device, {format_count(busiest)} a rank {spread}: "
            f"{even:.0%} of an even split"
        )
    share = m.memory_rank / m.memory_one if m.memory_one else 1.0
    yield (
        f"activations  {format_bytes(m.memory_one)} on one device, {format_bytes(m.memory_rank)} a rank: "
        f"{share:.0%} (an even split is {1 / size:.0%})"
    )
    for name, (tokens, rows, pads) in m.padding.items():
        waste = f"{pads} pads, {pads / (tokens + pads):.1%} of the rows" if pads else "no pads"
        yield f"tokens       {name}: {tokens} {'in' if pads else '='} {size} x {rows}, {waste}"
