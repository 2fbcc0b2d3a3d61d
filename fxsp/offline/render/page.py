"""An explanation as a page that stands alone: no network, no other file, any browser, light and dark.

The page holds the data as JSON and builds what is visible from it: a graph of ten thousand values has a few hundred
elements until its modules are unfolded.  Its three parts lie in ``static``.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from fxsp.cost.metrics import Measures
from fxsp.cost.timeline import timeline
from fxsp.device import H100, Device
from fxsp.inspection.report_text import format_count, legend_text
from fxsp.inspection.wire import format_bytes
from fxsp.machine import Machine
from fxsp.offline.partition import OfflineResult
from fxsp.offline.render.data import graph_data
from fxsp.passes.pipeline import STAGES
from fxsp.source import node_source

__all__ = ["page"]


def page(e: Any) -> str:
    """The text of the page for ``e``, a :class:`fxsp.Explanation`."""
    data = {
        "model": e.model,
        "ranks": e.world_size,
        "device": next((_device(r).name for r in e.results), H100.name),
        "screen": str(e),
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
    """What :func:`graph_data` has, collectives as short rows, and what is drawn: the values, their times, and cards."""
    data, program = graph_data(result, m), result.program
    if m is None or program is None:
        return data | {"cards": []}
    sent: dict[str, int] = {}
    for each in m.forward:  # a ring's rotations are one node
        sent[each.record.value] = sent.get(each.record.value, 0) + each.bytes
    for way in ("collectives", "backward"):
        data[way] = [_collective(record) for record in data[way]]
    nodes = {node.name: node for node in program.graph.nodes}
    data["rows"] = [
        [row.name, row.type, row.value, row.op, row.module, node_source(nodes[row.name]) if row.name in nodes else ""]
        + ([format_bytes(row.sent)] if row.sent is not None else [])
        for row in result.stages.get(STAGES[-1], [])
        if row.op != "input"
    ]
    spans = timeline(program.gm, sent, m.number, _device(result))
    data["time"] = [[s.node.name, round(s.start * 1e6, 2), round(s.end * 1e6, 2), int(s.communicates)] for s in spans]
    return data | {"letters": legend_text(m), "cards": _cards(m)}


def _device(result: OfflineResult) -> Device:
    """What time is drawn for."""
    program = result.program
    if program is None:
        return H100
    if isinstance(program.options.machine, Machine):
        return program.options.machine.linked(program.options.latency, program.options.bandwidth).seen_by(
            program.ranks.size
        )
    return H100.linked(program.options.latency, program.options.bandwidth)


def _collective(record: dict[str, Any]) -> list[Any]:
    """Value, kind, module, line, bytes as text, formula, reason, bytes."""
    about = [record[key] for key in ("value", "kind", "module", "source")]
    formula = f"{record['formula']} B" if record["formula"] is not None else ""
    return [*about, format_bytes(record["bytes"]), formula, record["reason"], record["bytes"]]


def _cards(m: Measures) -> list[list[str]]:
    """Title, number, and a line about it."""
    size, busiest = len(m.flops_per_rank), max(m.flops_per_rank, default=0)
    even = m.flops_total / (size * busiest) if busiest else 1.0
    pads = sum(p for _, _, p in m.padding.values())
    rows = sum(t + p for t, _, p in m.padding.values())
    forward, back = (format_bytes(sum(sent.bytes for sent in way)) for way in (m.forward, m.backward))
    backward = f"; {back} backward" if m.backward else ""
    return [
        ["sent per rank", forward, f"{len(m.forward)} collectives, forward{backward}"],
        ["work per rank", format_count(busiest), f"{even:.0%} of an even split of {format_count(m.flops_total)}"],
        ["activations per rank", format_bytes(m.memory_rank), f"{format_bytes(m.memory_one)} on one device"],
        ["padding", f"{pads / rows:.1%}" if rows else "0.0%", f"{pads} of {rows} rows are pads"],
    ]
