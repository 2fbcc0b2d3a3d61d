"""An explanation on one screen: the sections of each graph's report, with figures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fxsp.cost.formula import sum_text
from fxsp.cost.metrics import Measures
from fxsp.inspection.report_text import Figures, report_lines
from fxsp.inspection.wire import format_bytes

__all__ = ["figures", "format_count", "legend_text", "memory_texts", "one_screen"]


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
        lines += report_lines(result.report, None if m is None else figures(m))
    return "\n".join(lines)


def figures(m: Measures) -> Figures:
    """What the text of a report says of a measured graph."""
    return Figures(m.forward, m.backward, m.names, memory_texts(m), legend_text(m), [*_work(m)])


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
