"""An explanation on one screen, and as plain data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fxsp.cost.formula import Formula, format_formulas
from fxsp.cost.metrics import Measures
from fxsp.inspection.report_text import attention_lines, gather_lines, output_lines, places_text, plan_lines, section
from fxsp.inspection.wire import format_bytes
from fxsp.offline.partition import OfflineResult
from fxsp.report import CollectiveRecord, Memory, Report

__all__ = ["as_data", "format_count", "legend_text", "memory_texts", "one_screen"]


def format_count(n: float) -> str:
    """``"1.5 TFLOP"``."""
    for unit in ("", "K", "M", "G", "T"):
        if n < 1000:
            return f"{n:.3g} {unit}FLOP"
        n /= 1000
    return f"{n:.3g} PFLOP"


def one_screen(e: Any) -> str:
    """The text of ``str(e)``; ``e`` is a :class:`fxsp.Explanation`."""
    ranks = f"{e.world_size} rank{'s' if e.world_size > 1 else ''}"
    graphs = f", {len(e.results)} graphs" if len(e.results) != 1 else ""
    lines = [f"{e.model} on {ranks}{graphs}"]
    if not e.results:
        return lines[0] + ": Dynamo traced nothing"
    for i, (result, m) in enumerate(zip(e.results, e.measures, strict=True)):
        if len(e.results) > 1:
            lines.append(f"graph {i}:")
        lines += _graph(result, m)
    return "\n".join(lines)


def _graph(result: OfflineResult, m: Measures | None) -> list[str]:
    report = result.report
    lines = [f"runs whole on every rank: {report.unsharded}"] if report.unsharded else []
    lines += section("plan", plan_lines(report.plan))
    lines += section("attention", attention_lines(report.attentions, [] if m is None else memory_texts(m)))
    if m is not None:
        forward = _collectives(report.collectives, m.sent, m.formulas, m)
        lines += section("collectives (sent per rank, forward)", forward, 25)
        backward = _collectives(report.backward, m.sent_backward, m.formulas_backward, m)
        lines += section("collectives (sent per rank, backward)", backward, 25)
        if report.collectives or report.backward:
            lines.append(f"  {legend_text(m)}")
    implicit = [g for g in report.implicit_gathers if g.kind == "implicit"]
    lines += section("implicit gathers (an operator needs all tokens)", gather_lines(implicit))
    lines += section("gathers for graph outputs", output_lines(report.implicit_gathers))
    if m is not None:
        lines += section("work and memory", _work(m))
    lines += section("notes", report.notes)
    return lines


def memory_texts(m: Measures) -> list[str]:
    """The formula of what each attention moves through memory, where there is one."""
    texts = []
    for known in m.memory:
        formulas, rest = known or ([], 0)
        parts = [format_formulas(formulas, m.names)] if formulas else []
        texts.append(" + ".join([*parts, *([f"{rest} (at these sizes)"] if rest else [])]) + " B" if parts else "")
    return texts


def _collectives(
    records: list[CollectiveRecord], sent: list[int], formulas: list[Formula | None], m: Measures
) -> Iterator[str]:
    groups: dict[tuple[str, str], list[int]] = {}
    for i, record in enumerate(records):
        groups.setdefault((record.kind, record.reason), []).append(i)
    for (kind, reason), members in groups.items():
        yield f"{len(members):4d} x {kind:<14} {format_bytes(sum(sent[i] for i in members)):<9}  {reason}".rstrip()
        place = places_text(records[i] for i in members)
        yield f"       = {_formula([(sent[i], formulas[i]) for i in members], m)}, in {place}"
    if records:
        yield f"{len(records):4d}   {'in all':<14} {format_bytes(sum(sent))}"


def legend_text(m: Measures) -> str:
    """``P = 8; S = 4096 tokens of <root>[x]``: what the letters of formulas are."""
    among = sorted({f.members for f in (*m.formulas, *m.formulas_backward) if f is not None and f.members})
    lengths = [f"{short} = {n} tokens of {what}" for short, what, n in m.names.legend()]
    return "; ".join([f"P = {len(m.flops_per_rank)}", *[f"U = {n}" for n in among], *lengths])


def _formula(members: list[tuple[int, Formula | None]], m: Measures) -> str:
    known = [formula for _, formula in members if formula is not None]
    rest = sum(sent for sent, formula in members if formula is None)
    parts = [format_formulas(known, m.names)] if known else []
    return " + ".join([*parts, *([f"{rest} (at these sizes)"] if rest else [])]) + " B" if parts or rest else "nothing"


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
        yield (
            f"tokens       {name}: {tokens} = {size} x {rows}, {waste}"
            if not pads
            else (f"tokens       {name}: {tokens} in {size} x {rows}, {waste}")
        )


def as_data(e: Any) -> dict[str, Any]:
    """The explanation as dictionaries, lists, numbers and text."""
    return {
        "model": e.model,
        "world_size": e.world_size,
        "seconds": e.seconds,
        "flops_total": e.flops_total,
        "flops_per_rank": e.flops_per_rank,
        "communication": _totals(e.communication),
        "communication_forward": _totals(e.communication_forward),
        "communication_backward": _totals(e.communication_backward),
        "graphs": [_graph_data(r, m) for r, m in zip(e.results, e.measures, strict=True)],
    }


def _totals(communication: dict[str, tuple[int, int]]) -> dict[str, dict[str, int]]:
    return {kind: {"count": number, "bytes": size} for kind, (number, size) in communication.items()}


def _texts(report: Report, m: Measures | None) -> list[str]:
    return [""] * len(report.attentions) if m is None else memory_texts(m)


def _memory_data(memory: Memory | None, formula: str) -> dict[str, Any] | None:
    if memory is None:
        return None
    moves = [
        {key: value for key, value in vars(move).items() if key not in ("tokens", "rows")} for move in memory.moves
    ]
    return {"passes": memory.passes, "bytes": memory.bytes, "formula": formula or None, "moves": moves}


def _graph_data(result: OfflineResult, m: Measures | None) -> dict[str, Any]:
    report = result.report
    data: dict[str, Any] = {
        "unsharded": report.unsharded,
        "plan": [vars(record) for record in report.plan],
        "attentions": [
            {
                **vars(record),
                "bytes": str(record.bytes),
                "rejected": dict(record.rejected),
                "memory": _memory_data(record.memory, text),
            }
            for record, text in zip(report.attentions, _texts(report, m), strict=True)
        ],
        "implicit_gathers": [{**vars(g), "bytes": str(g.bytes)} for g in report.implicit_gathers],
        "notes": report.notes,
        "stages": list(result.stages),
    }
    if m is None:
        return data
    data["collectives"] = _collective_data(report.collectives, m.sent, m.formulas, m)
    data["backward"] = _collective_data(report.backward, m.sent_backward, m.formulas_backward, m)
    data["lengths"] = [{"name": short, "of": what, "tokens": n} for short, what, n in m.names.legend()]
    data |= {"flops_total": m.flops_total, "flops_per_rank": m.flops_per_rank}
    data |= {"activation_bytes_one_device": m.memory_one, "activation_bytes_per_rank": m.memory_rank}
    data["padding"] = [
        {"of": name, "tokens": tokens, "rows_per_rank": rows, "pads": pads}
        for name, (tokens, rows, pads) in m.padding.items()
    ]
    return data


def _collective_data(
    records: list[CollectiveRecord], sent: list[int], formulas: list[Formula | None], m: Measures
) -> list[dict[str, Any]]:
    return [
        {
            "kind": record.kind,
            "value": record.value,
            "module": record.module,
            "source": record.source,
            "reason": record.reason,
            "bytes": size,
            "formula": formula.text(m.names) if formula is not None else None,
        }
        for record, size, formula in zip(records, sent, formulas, strict=True)
    ]
