"""Partitioning without a process group, without devices and without weights: what would ``backend="sp"`` do?

:func:`partition_offline` traces a model as ``torch.compile`` does (meta tensors will do) and partitions every graph for
a given number of ranks.  ``fxsp.explain`` and the compile-cost benchmark stand on it.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule

from fxsp.capture.capture import install, splits_of_compilation
from fxsp.capture.graph_breaks import remembering
from fxsp.config import Options
from fxsp.errors import FxspError, FxspWarning
from fxsp.inspection.printer import Row
from fxsp.inspection.stages import StageWriter
from fxsp.partitioning import compile_graph
from fxsp.passes.base import Program
from fxsp.passes.normalize.regions import open_regions
from fxsp.report import Report
from fxsp.source import input_names
from fxsp.torch_internals import through_dynamo
from fxsp.types import Ranks

__all__ = ["OfflineResult", "partition_offline"]


@dataclass
class OfflineResult:
    """One graph: its report, and its partitioned program (None if it stays whole)."""

    report: Report
    program: Program | None
    #: Seconds from the handing over of Dynamo's graph to the partitioned one.
    seconds: float
    #: Dynamo's graph as a function, and what it was called with.
    whole: Callable[..., Any]
    #: Every stage of the compilation, as lines, where ``stages=True`` asked for them.
    stages: dict[str, list[Row]]
    inputs: tuple[Any, ...] = ()
    #: What the inputs are called: arguments, parameters and buffers by their paths.
    names: tuple[str, ...] = ()


@dataclass
class _Offline:
    """A backend that partitions, keeps the result, and runs the graph as it was."""

    options: Options
    ranks: Ranks
    stages: bool = False
    results: list[OfflineResult] = field(default_factory=list)
    error: FxspError | None = None

    __name__ = "fxsp_offline"

    def __call__(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        start = time.perf_counter()
        with through_dynamo(FxspError):
            try:
                writer = StageWriter(self.options.print, self.ranks, keep=self.stages)
                report, program = compile_graph(gm, inputs, self.options, self.ranks, writer)
            except FxspError as error:
                self.error = error
                raise
        seconds = time.perf_counter() - start
        whole = open_regions(gm).forward
        result = OfflineResult(report, program, seconds, whole, writer.kept, names=tuple(input_names(gm)))
        self.results.append(result)

        def run(*args: Any) -> Any:
            result.inputs = args
            return whole(*args)

        return remembering(run, report.split_outputs, splits_of_compilation())


install(lambda backend: isinstance(backend, _Offline))


def partition_offline(
    model: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    world_size: int,
    options: Mapping[str, Any] | None = None,
    stages: bool = False,
) -> list[OfflineResult]:
    """Trace ``model(*args, **kwargs)`` and partition its graphs for rank 0 of ``world_size``.

    ``options`` are those of the backend (``plan``, ``ulysses_degree``, ``strict``, ...), ``stages``
    keeps every stage.  Raises what the backend raises.
    """
    backend = _Offline(Options.parse(options), Ranks(0, world_size, "offline"), stages)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FxspWarning)
        try:
            torch.compile(model, backend=backend)(*args, **(kwargs or {}))
        except FxspError as error:
            # As it was raised: Dynamo appends advice about its own stack traces.
            raise backend.error or error from None
    return backend.results
