"""An explanation as plain data: what JSON is, and what the page is made of."""

from __future__ import annotations

from typing import Any

from fxsp.cost.formula import Sent
from fxsp.cost.metrics import Measures
from fxsp.inspection.report_text import memory_texts
from fxsp.offline.partition import OfflineResult
from fxsp.report import Memory

__all__ = ["graph_data"]


def _memory_data(memory: Memory | None, formula: str) -> dict[str, Any] | None:
    if memory is None:
        return None
    moves = [
        {key: value for key, value in vars(move).items() if key not in ("tokens", "rows")} for move in memory.moves
    ]
    return {"passes": memory.passes, "bytes": memory.bytes, "formula": formula or None, "moves": moves}


def graph_data(result: OfflineResult, m: Measures | None) -> dict[str, Any]:
    """One graph: what its report says, record by record, and what was measured."""
    report = result.report
    texts = [""] * len(report.attentions) if m is None else memory_texts(m)
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
            for record, text in zip(report.attentions, texts, strict=True)
        ],
        "implicit_gathers": [{**vars(g), "bytes": str(g.bytes)} for g in report.implicit_gathers],
        "notes": report.notes,
        "stages": list(result.stages),
    }
    if m is None:
        return data
    data["collectives"] = [_collective(sent, m) for sent in m.forward]
    data["backward"] = [_collective(sent, m) for sent in m.backward]
    data["lengths"] = [{"name": short, "of": what, "tokens": n} for short, what, n in m.names.legend()]
    data |= {"flops_total": m.flops_total, "flops_per_rank": m.flops_per_rank}
    data |= {"activation_bytes_one_device": m.memory_one, "activation_bytes_per_rank": m.memory_rank}
    data["padding"] = [
        {"of": name, "tokens": tokens, "rows_per_rank": rows, "pads": pads}
        for name, (tokens, rows, pads) in m.padding.items()
    ]
    return data


def _collective(sent: Sent, m: Measures) -> dict[str, Any]:
    about = {key: getattr(sent.record, key) for key in ("kind", "value", "module", "source", "reason")}
    return {**about, "bytes": sent.bytes, "formula": sent.formula.text(m.names) if sent.formula is not None else None}
