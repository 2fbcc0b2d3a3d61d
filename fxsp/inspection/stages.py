"""Where the stages of a compilation go: the terminal, the report, files, ``TORCH_LOGS`` and ``TORCH_TRACE``.

=================== ==================================================================================================
``options["print"]`` the named stages, on standard output and in ``report.stages``
``FXSP_DUMP=dir``   every stage as a file ``dir/rank0/graph0_partitioned.txt``
``TORCH_LOGS=+fxsp`` every stage, by the logger ``fxsp.inspection.stages``
``TORCH_TRACE=dir`` every stage as an artifact ``fxsp_partitioned`` of the compilation, for tlparse
=================== ==================================================================================================

Nothing is printed, or computed, that nobody asked for.  ``fxsp`` is the name of a logger, as any package is to
``TORCH_LOGS``; ``TORCH_LOGS=help``, printed while torch itself is imported, lists the names of torch only.
"""

from __future__ import annotations

import logging
import os
import sys
from itertools import count
from pathlib import Path

from torch.fx import GraphModule

from fxsp import torch_internals
from fxsp.inspection.printer import Row, format_rows, rows
from fxsp.passes.base import Program
from fxsp.passes.pipeline import STAGES
from fxsp.passes.verify import infer_local
from fxsp.report import Report
from fxsp.types import Ranks

__all__ = ["StageWriter"]

log = logging.getLogger(__name__)
_numbers = count()


class StageWriter:
    """Prints the stages of one compilation to all who asked; ``keep`` holds all of them, as lines, for ``explain``."""

    def __init__(self, watch: tuple[str, ...], ranks: Ranks, *, keep: bool = False) -> None:
        self.shown = frozenset(watch)
        self.ranks = ranks
        self.keep = keep
        self.kept: dict[str, list[Row]] = {}
        self.folder = os.environ.get("FXSP_DUMP", "")
        self.traced = torch_internals.tracing_artifacts()
        self.everywhere = bool(self.folder or self.traced or log.isEnabledFor(logging.DEBUG))
        self.watch = frozenset(STAGES) if keep or self.everywhere else self.shown
        self.number = next(_numbers) if self.folder else 0

    def text(self, stage: str, gm: GraphModule, report: Report) -> None:
        """The graph after ``stage``."""
        if stage not in self.watch:
            return
        lines = rows(gm, self.ranks)
        if self.keep:
            self.kept[stage] = lines
        if self.everywhere or stage in self.shown:
            self._write(stage, format_rows(lines, self.ranks), report)

    def _write(self, stage: str, text: str, report: Report) -> None:
        if stage in self.shown:
            report.stages[stage] = text
            sys.stdout.write(f"# fxsp: {stage}\n{text}\n")
        if self.folder:
            place = Path(self.folder) / f"rank{self.ranks.rank}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"graph{self.number}_{stage}.txt").write_text(text + "\n")
        if self.traced:
            torch_internals.trace_artifact(f"fxsp_{stage}", text)
        log.debug("%s\n%s", stage, text)

    def program(self, stage: str, program: Program) -> None:
        """The graph after a pass of the pipeline; local graphs get their local values first."""
        if stage in ("local", "exchanged", "partitioned"):
            infer_local(program)
        self.text(stage, program.gm, program.report)
