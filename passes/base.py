"""The contract of all passes, stated once.

A pass takes a :class:`Program` whose graph is valid FX and returns one whose graph is valid FX and which means the
same.  It is a frozen dataclass with a ``name``; its fields are its options.  It transforms and appends to the report;
it never times, verifies, prints or logs: the runner does.  A pass that finds the program outside what it can carry
raises :class:`~fxsp.errors.FxspError`; it never returns a program with another meaning.

Metadata that passes agree on, per node:

``val``
    the global fake value (from *normalize* on; *partition* keeps the global one under ``global_val``)
``sp``
    the :data:`~fxsp.types.Type` of the node (from *propagate* on)
``nn_module_stack``, ``stack_trace``
    as Dynamo writes them
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from fxsp.report import Report
from fxsp.types import Ranks

__all__ = ["Pass", "Program"]


@dataclass
class Program:
    """A graph on its way through the pipeline."""

    gm: torch.fx.GraphModule
    ranks: Ranks
    report: Report = field(default_factory=Report)
    #: Whether gradients may be asked for: grad mode is on and an input (or parameter) requires grad.
    training: bool = False
    #: Refuse implicit gathers.
    strict: bool = False
    #: ``"all_reduce"``, or ``"defer"``: leave parameter gradients partial (see :mod:`fxsp.passes.partition.defer`).
    grad_reduce: str = "all_reduce"
    #: ``"global"``, or ``"per_rank"``: dropout draws by position, each rank for itself.
    rng: str = "global"
    #: Degrees that the user fixed, or None.
    ulysses_degree: int | None = None
    ring_degree: int | None = None
    gather_degree: int | None = None
    #: Seconds per message, and bytes per second that a rank sends; None: the defaults of the device.
    latency: float | None = None
    bandwidth: float | None = None
    #: Bytes of gathered keys and values that a rank may hold for one attention where there is another way.
    gather_limit: int | None = None
    #: Free for passes to hand facts on (documented by the pass that writes them).
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def graph(self) -> torch.fx.Graph:
        return self.gm.graph


@runtime_checkable
class Pass(Protocol):
    """``apply(program) -> program``; see the module's docstring for the contract."""

    @property
    def name(self) -> str: ...

    def apply(self, program: Program) -> Program: ...
