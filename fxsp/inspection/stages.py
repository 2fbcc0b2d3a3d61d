"""Where the stages of a compilation go: the terminal, the report, files, ``TORCH_LOGS`` and ``TORCH_TRACE``.

=================== ==================================================================================================
``options["print"]`` the named stages, on standard output and in ``report.stages``
``FXSP_DUMP=dir``   every stage as a file ``dir/rank0/graph0_device_memory.txt``
``TORCH_LOGS=+fxsp`` every stage, by the logger ``fxsp.inspection.stages``
``TORCH_TRACE=dir`` every stage as an artifact ``fxsp_device_memory`` of the compilation, for tlparse
=================== ==================================================================================================

Stages are called like their passes; ``options["print"]`` knows former names, too, and what was asked for by such a name
is printed under it.

Nothing is printed, or computed, that nobody asked for.  ``fxsp`` is the name of a logger, as any package is to
``TORCH_LOGS``; ``TORCH_LOGS=help``, printed while torch itself is imported, lists the names of torch only.
"""

from __future__ import annotations

import logging
import os
import sys
from itertools import count
from pathlib import Path

from fxsp import torch_internals
from fxsp.errors import OptionError
from fxsp.inspection.printer import Row, format_rows, rows
from fxsp.passes.base import Program
from fxsp.passes.pipeline import STAGES, stage_named
from fxsp.passes.verify import infer_local
from fxsp.plan import did_you_mean, listing
from fxsp.report import Report
from fxsp.types import Ranks

__all__ = ["StageWriter"]

log = logging.getLogger(__name__)
_numbers = count()


class StageWriter:
    """Prints the stages of one compilation to all who asked; ``keep`` holds all of them, as lines, for ``explain``.

    Raises :class:`OptionError` if ``watch`` names a stage that does not exist.
    """

    def __init__(self, watch: tuple[str, ...], ranks: Ranks, *, keep: bool = False) -> None:
        for name in watch:
            if stage_named(name) not in STAGES:
                raise OptionError(
                    f"option 'print' names a stage {name!r} that does not exist.{did_you_mean(name, STAGES)}\n"
                    f"  Stages: {listing(STAGES)}"
                )
        #: Stage -> the names by which it was asked for.
        self.shown = {stage: [n for n in watch if stage_named(n) == stage] for stage in STAGES}
        self.ranks = ranks
        self.keep = keep
        self.kept: dict[str, list[Row]] = {}
        self.folder = os.environ.get("FXSP_DUMP", "")
        self.traced = torch_internals.tracing_artifacts()
        self.everywhere = bool(self.folder or self.traced or log.isEnabledFor(logging.DEBUG))
        self.number = next(_numbers) if self.folder else 0

    def stage(self, stage: str, program: Program) -> None:
        """The graph after a stage; a local graph gets its local values first."""
        written = self.everywhere or bool(self.shown[stage])
        if not (self.keep or written):
            return
        if program.is_local:
            infer_local(program)
        lines = rows(program.gm, self.ranks)
        if self.keep:
            self.kept[stage] = lines
        if written:
            self._write(stage, format_rows(lines, self.ranks), program.report)

    def _write(self, stage: str, text: str, report: Report) -> None:
        for name in self.shown[stage]:
            report.stages[name] = text
            sys.stdout.write(f"# fxsp: {name}\n{text}\n")
        if self.folder:
            place = Path(self.folder) / f"rank{self.ranks.rank}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"graph{self.number}_{stage}.txt").write_text(text + "\n")
        if self.traced:
            torch_internals.trace_artifact(f"fxsp_{stage}", text)
        log.debug("%s\n%s", stage, text)
