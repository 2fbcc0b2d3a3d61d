"""What the compiler would do on several numbers of ranks, side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from fxsp.inspection.report_text import format_count
from fxsp.inspection.wire import format_bytes
from fxsp.offline.explain import Explanation

__all__ = ["side_by_side"]


def side_by_side(found: Sequence[Explanation]) -> str:
    """A table with a column for each number of ranks, and below it what is loud about any of them::

    Model               2 ranks      4 ranks
    operations a rank   7.1 KFLOP    4.3 KFLOP
    """
    header = [found[0].model if found else "", *(f"{e.world_size} ranks" for e in found)]
    lines = [header, *([name, *map(cell, found)] for name, cell in _ROWS.items())]
    lines = [line for line in lines if any(line[1:])]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["   ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*text, *dict.fromkeys(line for e in found for line in e.warnings)])


def _whole(e: Explanation) -> str:
    whole = sum(m is None for m in e.measures)
    return f"{whole} of {len(e.measures)}" if whole else ""


def _operations(e: Explanation) -> str:
    return format_count(max(e.flops_per_rank)) if e.flops_per_rank else ""


def _even(e: Explanation) -> str:
    busiest = max(e.flops_per_rank, default=0)
    return f"{e.flops_total / (e.world_size * busiest):.0%}" if busiest else ""


def _activations(e: Explanation) -> str:
    measured = [m for m in e.measures if m is not None]
    return format_bytes(sum(m.memory_rank for m in measured)) if measured else ""


def _sent(communication: dict[str, tuple[int, int]]) -> str:
    number = sum(count for count, _ in communication.values())
    return f"{format_bytes(sum(size for _, size in communication.values()))} in {number}" if number else ""


def _attentions(e: Explanation) -> str:
    return ", ".join(f"{number} x {way}" for way, number in Counter(a.method for a in e.attentions).items())


def _pads(e: Explanation) -> str:
    pads = sum(row[2] for m in e.measures if m is not None for row in m.padding.values())
    return str(pads) if pads else ""


_ROWS: dict[str, Callable[[Explanation], str]] = {
    "graphs that run whole": _whole,
    "operations a rank": _operations,
    "of an even split": _even,
    "activations a rank": _activations,
    "attention": _attentions,
    "sent forward (in calls)": lambda e: _sent(e.communication_forward),
    "sent backward (in calls)": lambda e: _sent(e.communication_backward),
    "implicit gathers": lambda e: str(len(e.implicit_gathers) or ""),
    "pads": _pads,
}
