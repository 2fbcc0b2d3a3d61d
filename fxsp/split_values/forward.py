"""What a forward pass of a model runs and sends, where its parts are compiled by themselves: for :func:`report_of`."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fxsp.errors import ImplicitGatherWarning
from fxsp.ranks.meetings import met
from fxsp.report import GatherRecord, Report
from fxsp.source import line_of, user_frame, warn
from fxsp.types import Ranks

__all__ = ["OUTPUT", "Forward", "Ran", "gathering", "record_to", "recording"]


#: Instead of an operator: a model has returned it.
OUTPUT = "output"


@dataclass(eq=False)
class Ran:
    """One compiled graph: how often it ran, and what the symbols of its lengths were the last time."""

    report: Report
    sizes: Mapping[Any, int] = field(default_factory=dict)
    calls: int = 0
    #: Whether it is one function that ran by itself on split values.
    eager: bool = False


@dataclass(eq=False)
class Forward:
    """One call of a model."""

    graphs: dict[int, Ran] = field(default_factory=dict)
    #: What was made whole between the graphs, and after them.
    gathers: list[GatherRecord] = field(default_factory=list)
    #: Whether what the model returns stays split: a graph of it was compiled so.
    keeps_split: bool = False
    #: How many times compiled graphs ran.
    runs: int = 0

    def ran(self, report: Report, sizes: Mapping[Any, int], *, eager: bool = False) -> None:
        """A graph has run."""
        row = self.graphs.setdefault(id(report), Ran(report, eager=eager))
        row.sizes = sizes
        row.calls += 1
        self.runs += not eager


class _Thread(threading.local):
    forward: Forward | None = None


_thread = _Thread()
#: Operators and places of which it was said that they gather.
_said: set[tuple[str, str]] = set()


def recording() -> Forward | None:
    """The forward pass that is under way in this thread."""
    return _thread.forward


def record_to(forward: Forward | None) -> None:
    """From now on, in this thread, it is this one."""
    _thread.forward = forward


@contextmanager
def gathering(ranks: Ranks, shape: Sequence[int], sent: int, op: str) -> Iterator[None]:
    """Around a gather at run time of a value of this shape, for which a rank sends so many bytes.

    ``op`` is the operator that no rule splits: that is said, once for each line; "" or :data:`OUTPUT`: it is asked for.
    """
    frame = user_frame()
    source = line_of(frame)
    asked = op in ("", OUTPUT)
    reason = "eager code that no rule splits sees the whole value"
    if asked:
        reason = "a model returns whole values" if op else "it is asked for"
    record = GatherRecord(op or "fxsp.whole", "", source, reason, sent, "output" if asked else "implicit")
    with met(ranks, f"gathers a split value of shape {list(shape)} for {record.op}{source and f' ({source})'}"):
        yield
    if _thread.forward is not None:
        _thread.forward.gathers.append(record)
    if asked or (op, source) in _said:
        return
    _said.add((op, source))
    text = f"a split value of shape {list(shape)} has to be gathered, in this call and in those like it:\n  {record}"
    warn(ImplicitGatherWarning(text), first=ranks.rank == 0)
