"""The ranks that one model's hooks split over, and what they did: the only state that hooks of a model share."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from fxsp.backend import keep_report
from fxsp.config import Options, resolve_degrees, resolve_ranks
from fxsp.errors import FxspWarning, OptionError, UnshardedWarning
from fxsp.plan import SequenceParallelConfig
from fxsp.process_groups import check_group, missing_group
from fxsp.report import Report
from fxsp.source import warn
from fxsp.torch_internals import group_named

__all__ = ["Call", "Region"]


class Call:
    """What hooks know of one call of the model."""

    def __init__(self) -> None:
        #: Tokens of the model's arguments that the plan asks for.
        self.lengths: dict[str, int] = {}
        #: Local length of a split value -> its global lengths.
        self.split: dict[int, list[int]] = {}
        #: By the id of a hook, from its ``pre_forward`` to its ``post_forward``: as ``lengths``, of its own module.
        self.of_hook: dict[int, dict[str, int]] = {}
        #: Of each ``shard_group`` the global length, as its last split has it.
        self.of_group: dict[str, int] = {}

    def saw(self, length: int, local: int) -> None:
        """A value of ``length`` tokens is split into ``local`` rows."""
        known = self.split.setdefault(local, [])
        if length not in known:
            known.append(length)

    def looks_local(self, size: int) -> bool:
        """Whether a size is the local length of some split value, and the whole length of none."""
        return size in self.split and not any(size in lengths for lengths in self.split.values())


class Region:
    """Shared by the hooks of one ``apply_sequence_parallel``; a copied or unpickled model gets one of its own.

    ``config=None`` exchanges heads over all ranks of the group.  Raises :class:`~fxsp.errors.OptionError` if the
    degrees do not match the group.  Where no process group is initialized yet, :meth:`resolve` looks again at the
    model's first call.
    """

    #: Whether the ranks are known.
    resolved: bool

    def __init__(
        self, config: SequenceParallelConfig | None, group: dist.ProcessGroup | None = None, *, alone: bool = False
    ) -> None:
        #: It belongs to one hook that was registered by itself, and not to a model.
        self.alone = alone
        self.group_name = group.group_name if group is not None else None
        self._asked = Options.parse({"config": config}).config
        self._fresh()
        if _initialized():
            self.resolve()

    @property
    def config(self) -> SequenceParallelConfig | None:
        """The configuration that was given; else, once the ranks are known, the one that stands for it."""
        if self._asked is not None or not self.resolved:
            return self._asked
        return SequenceParallelConfig(ulysses_degree=self.size)

    def resolve(self) -> None:
        """Look up the ranks; without a process group this process is the only one, until there is one."""
        if self.resolved:
            return
        if self._asked is None and not _initialized():
            if (missing := missing_group()) and missing not in self.warned:
                self.warned.add(missing)
                warn(UnshardedWarning(missing))
            return
        group = None
        if self.group_name is not None and _initialized():
            group = group_named(self.group_name)
            if group is None:
                raise OptionError(f"the hooks are for the process group {self.group_name!r}, which does not exist here")
        options = Options.parse({"group": group, "config": self._asked})
        ranks = resolve_ranks(options)
        degrees = resolve_degrees(options, ranks.size)
        self.rank, self.size, self.group = ranks.rank, ranks.size, ranks.group
        self.ulysses, self.ring = degrees.ulysses or ranks.size, degrees.ring or 1
        self.allgather = degrees.allgather or 1
        self.resolved = _initialized()

    def _fresh(self) -> None:
        self.resolved = False
        self.rank, self.size, self.group = 0, 1, ""
        self.ulysses = self.ring = self.allgather = 1
        self.report = Report()
        #: Functions whose implicit gather was warned about, and what else is said once.
        self.warned: set[str] = set()
        self._threads = threading.local()
        self._traced = Call()
        self._last = Call()

    # --- the model's call in progress in this thread, under its hooks

    @property
    def running(self) -> bool:
        """Whether the model runs eagerly, called through its hooks, in this thread."""
        return bool(getattr(self._threads, "calls", None))

    @contextmanager
    def calling(self, given_up: bool) -> Iterator[None]:
        """One eager call of the model; ``given_up``: it was to be compiled, and is not."""
        calls = self._threads.__dict__.setdefault("calls", [])
        if not calls:
            if self.resolved and self.size > 1:  # gone: an error before anything waits for it
                check_group(self.rank, self.size, self.group)
            self.report = Report()
        calls.append(Call())
        try:
            if given_up:
                self._took_over()
            yield
        finally:
            self._last = calls.pop()

    def _took_over(self) -> None:
        note = "hooks run this call eagerly: it was not compiled as one graph (a graph break, or the recompile limit)"
        self.note(note)
        if note not in self.warned:
            self.warned.add(note)
            keep_report(self.report)
            warn(FxspWarning(note), first=self.rank == 0)

    def note(self, note: str) -> None:
        """Write a note into the report, once; where Dynamo traces there is none."""
        if not torch.compiler.is_compiling() and note not in self.report.notes:
            self.report.notes.append(note)

    def trace(self) -> None:
        """A call of the model that Dynamo traces begins, or ends."""
        self._traced = Call()

    @property
    def call(self) -> Call:
        """The call in progress; in a backward pass, the last one; of a hook by itself, one for each thread."""
        if torch.compiler.is_compiling():
            return self._traced
        if self.alone:
            return self._threads.__dict__.setdefault("call", Call())  # type: ignore[no-any-return]
        return self._threads.calls[-1] if self.running else self._last

    # --- copies

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("alone", "group_name", "_asked")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._fresh()  # perhaps another process than the one that pickled: the first call looks up its ranks


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()
