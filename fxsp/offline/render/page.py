"""An explanation as a page that stands alone: no network, no other file, any browser, light and dark.

The page holds the data as JSON and builds what is visible from it: a graph of ten thousand values has a few hundred
elements until its modules are unfolded.  Its three parts lie in ``static``.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from fxsp.cost.formula import Formula, format_formulas
from fxsp.cost.metrics import Measures
from fxsp.cost.timeline import H100, timeline
from fxsp.inspection.wire import format_bytes
from fxsp.offline.partition import OfflineResult
from fxsp.offline.render.text import format_count, legend_text, one_screen
from fxsp.passes.pipeline import STAGES
from fxsp.report import CollectiveRecord
from fxsp.source import node_source

__all__ = ["page"]


def page(e: Any) -> str:
    """The text of the page for ``e``, a :class:`fxsp.Explanation`."""
    data = {
        "model": e.model,
        "ranks": e.world_size,
        "device": H100.name,
        "screen": one_screen(e),
        "graphs": [_graph(r, m) for r, m in zip(e.results, e.measures, strict=True)],
    }
    parts = resources.files("fxsp.offline.render") / "static"
    text = (parts / "page.html").read_text("utf-8")
    # In a script element only "</" could end the data early.
    values = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    for name, part in (
        ("{{title}}", f"{e.model} on {e.world_size} ranks".replace("&", "&amp;").replace("<", "&lt;")),
        ("{{style}}", (parts / "page.css").read_text("utf-8")),
        ("{{script}}", (parts / "page.js").read_text("utf-8")),
        ("{{data}}", values),
    ):
        text = text.replace(name, part)
    return text


def _graph(result: OfflineResult, m: Measures | None) -> dict[str, Any]:
    report = result.report
    data: dict[str, Any] = {
        "whole": report.unsharded,
        "plan": [[record.entry, record.applied, record.detail] for record in report.plan],
        "attention": [
            [a.module, a.method, a.source, [f"{name}: {why}" for name, why in a.rejected], a.detail]
            for a in report.attentions
        ],
        "implicit": [[g.op, g.module, g.source, g.reason] for g in report.implicit_gathers if g.kind == "implicit"],
        "notes": report.notes,
        "cards": [],
    }
    program = result.program
    if m is None or program is None:
        return data
    sent: dict[str, int] = {}
    for record, size in zip(report.collectives, m.sent, strict=True):  # a ring's rotations are one node
        sent[record.value] = sent.get(record.value, 0) + size
    data["collectives"] = _collectives(report.collectives, m.sent, m.formulas, m)
    data["backward"] = _collectives(report.backward, m.sent_backward, m.formulas_backward, m)
    data["letters"] = legend_text(m)
    nodes = {node.name: node for node in program.graph.nodes}
    data["rows"] = [
        [row.name, row.type, row.value, row.op, row.module, node_source(nodes[row.name]) if row.name in nodes else ""]
        + ([format_bytes(row.sent)] if row.sent is not None else [])
        for row in result.stages.get(STAGES[-1], [])
        if row.op != "input"
    ]
    spans = timeline(program.gm, sent, m.number)
    data["time"] = [[s.node.name, round(s.start * 1e6, 2), round(s.end * 1e6, 2), int(s.communicates)] for s in spans]
    data["cards"] = _cards(m, len(report.collectives))
    return data


def _collectives(
    records: list[CollectiveRecord], sent: list[int], formulas: list[Formula | None], m: Measures
) -> list[list[Any]]:
    """Value, kind, module, line, bytes as text, formula, reason, bytes."""
    return [
        [
            record.value,
            record.kind,
            record.module,
            record.source,
            format_bytes(size),
            f"{format_formulas([formula], m.names)} B" if formula is not None else "",
            record.reason,
            size,
        ]
        for record, size, formula in zip(records, sent, formulas, strict=True)
    ]


def _cards(m: Measures, collectives: int) -> list[list[str]]:
    """Title, number, and a line about it."""
    size, busiest = len(m.flops_per_rank), max(m.flops_per_rank, default=0)
    even = m.flops_total / (size * busiest) if busiest else 1.0
    pads = sum(p for _, _, p in m.padding.values())
    rows = sum(t + p for t, _, p in m.padding.values())
    backward = f"; {format_bytes(sum(m.sent_backward))} backward" if m.sent_backward else ""
    return [
        ["sent per rank", format_bytes(sum(m.sent)), f"{collectives} collectives, forward{backward}"],
        ["work per rank", format_count(busiest), f"{even:.0%} of an even split of {format_count(m.flops_total)}"],
        ["activations per rank", format_bytes(m.memory_rank), f"{format_bytes(m.memory_one)} on one device"],
        ["padding", f"{pads / rows:.1%}" if rows else "0.0%", f"{pads} of {rows} rows are pads"],
    ]
