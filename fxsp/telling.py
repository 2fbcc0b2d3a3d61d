"""What a person reads while a model is compiled: what takes long, and in one line what has come out of it.

Both are messages of the logger ``fxsp``, at the level ``INFO``, on rank 0 of all processes.  An application that has
set up logging decides what becomes of them (``logging.getLogger("fxsp").setLevel("WARNING")``, handlers); where there
is none they go to standard error.  ``FXSP_QUIET=1`` leaves them out.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import weakref

import torch.distributed as dist
from torch import nn

from fxsp.inspection.printer import count_text
from fxsp.inspection.wire import format_bytes
from fxsp.report import Report, totals
from fxsp.types import Ranks, as_length

__all__ = ["Steps", "begin", "end", "heard", "summary", "tell_summary"]

#: Seconds that a step may take in silence.
PATIENCE = 2.0
log = logging.getLogger("fxsp")


def heard() -> bool:
    """Whether messages of this process have a reader."""
    if os.environ.get("FXSP_QUIET", "0") not in ("", "0") or _rank() != 0:
        return False
    return _alone() or log.isEnabledFor(logging.INFO)


def _rank() -> int:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdecimal() else 0


def _alone() -> bool:
    """Whether nobody has set up logging."""
    return log.level == logging.NOTSET and not log.disabled and not log.hasHandlers()


def _tell(text: str) -> None:
    if log.hasHandlers():
        log.info(text)
    else:
        sys.stderr.write(f"fxsp: {text}\n")
        sys.stderr.flush()


class Steps:
    """The steps of one compilation, one after the other; what takes longer than :data:`PATIENCE` is told, once."""

    def __init__(self) -> None:
        #: Name of a step -> seconds.
        self.seconds: dict[str, float] = {}
        self._name = ""
        self._start = 0.0
        self._timer: threading.Timer | None = None

    def step(self, name: str, text: str) -> None:
        """From now on it is this one, ``text`` in words."""
        self.stop()
        self._name, self._start = name, time.perf_counter()
        if heard():
            self._timer = threading.Timer(PATIENCE, _tell, (f"{text} ...",))
            self._timer.daemon = True
            self._timer.start()

    def stop(self) -> None:
        """The step has ended."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._name:
            spent = time.perf_counter() - self._start
            self.seconds[self._name] = self.seconds.get(self._name, 0.0) + spent
            self._name = ""


class _Thread(threading.local):
    steps: Steps | None = None


_thread = _Thread()


def begin(name: str, text: str) -> Steps:
    """A step of the compilation that is under way in this thread; of a new one, if there is none."""
    if _thread.steps is None:
        _thread.steps = Steps()
    _thread.steps.step(name, text)
    return _thread.steps


def end() -> None:
    """Nothing is compiled in this thread any more."""
    if _thread.steps is not None:
        _thread.steps.stop()
        _thread.steps = None


#: Of a model, what was told: alike parts of it are told once.
_told: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


def tell_summary(report: Report, ranks: Ranks, around: nn.Module | None, seconds: dict[str, float]) -> None:
    """Tell what has become of a graph; ``around`` is the outermost module that it is known to be a part of."""
    if ranks.size == 1 or not heard():
        return
    text = summary(report, ranks)
    told = set() if around is None else _told.setdefault(around, set())
    if text in told:
        return
    told.add(text)
    spent = ", ".join(f"{name} {time_:.1f}" for name, time_ in seconds.items() if time_ >= 0.05)
    _tell(f"{text}; compiled in {sum(seconds.values()):.1f} s" + (f" ({spent})" if spent else ""))


def summary(report: Report, ranks: Ranks) -> str:
    """``"Llama on 2 ranks: split by <root>[x] (found); 1 x ulysses; 3 collectives, 2.8 KiB sent per rank and forward
    pass"``; or why the graph runs whole.
    """
    head = f"{report.root} on {count_text(ranks.size, 'rank')}: "
    if report.unsharded:
        return f"{head}runs whole on every rank ({report.unsharded.splitlines()[0]})"
    applied = list(dict.fromkeys(record.entry.partition(": ")[0] for record in report.plan if record.applied))
    more = f" and {len(applied) - 2} more" if len(applied) > 2 else ""
    found = " (found)" if report.inferred is not None else ""
    what = f"split by {', '.join(applied[:2])}{more}{found}" if applied else "takes split values"
    share = "" if report.share is None else f", {report.share:.0%} of its work on shards"
    ways: dict[str, int] = {}
    for record in report.attentions:
        ways[record.method] = ways.get(record.method, 0) + 1
    how = "".join(f"; {number} x {method}" for method, number in ways.items())
    sent = totals(("", record.bytes) for record in report.collectives).get("", (0, 0))
    size = f", {format_bytes(as_length(sent[1]))} sent per rank and forward pass" if sent[0] else ""
    return f"{head}{what}{share}{how}; {count_text(sent[0], 'collective')}{size}"
