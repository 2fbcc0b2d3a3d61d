"""The contract of all passes, stated once.

A pass takes a :class:`Program` whose graph is valid FX and returns one whose graph is valid FX and which means the
same.  It is a frozen dataclass.  It transforms and appends to the report; it never times, verifies,
prints or logs: the runner does.  A pass that finds the program outside what it can carry raises
:class:`~fxsp.errors.FxspError`, one that finds that the graph shall stay as Dynamo made it
:class:`~fxsp.errors.RunsWhole`; it never returns a program with another meaning.

What a user chose is ``program.options``, and no field of a pass: how an attention runs depends on five options, and is
asked by every pass that finds types (anew) or tells what was chosen, so that each of them would have to hold them.
What passes know about a node is in :mod:`fxsp.passes.graph`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch.fx import Graph, GraphModule
from torch.nn import Module

from fxsp.capture.module_calls import Captured
from fxsp.config import AttentionDegrees, Options, resolve_degrees
from fxsp.lengths import hint
from fxsp.passes.graph import global_value
from fxsp.report import PlanRecord, Report
from fxsp.torch_internals import fake_mode_of, size_hints
from fxsp.types import Length, Ranks, Shard

__all__ = ["Pass", "Program"]


@dataclass
class Program:
    """A graph on its way through the pipeline."""

    gm: GraphModule
    ranks: Ranks
    report: Report = field(default_factory=Report)
    #: Whether gradients may be asked for: grad mode is on and an input (or parameter) requires grad.
    training: bool = False
    options: Options = field(default_factory=Options)
    #: What Dynamo gave with its graph, real tensors and symbolic sizes, until it is traced (*normalize*).
    inputs: Sequence[Any] = ()
    #: The module that the plan is for, where that is known.
    root: Module | None = None
    #: The module calls of Dynamo's graph, and the plan (*capture* to *carry*).
    captured: Captured | None = None
    #: Inputs, by position, of which this process has the rows of its rank only: split values of earlier graphs.
    arrivals: Mapping[int, Shard] = field(default_factory=dict)
    #: Whether outputs stay as they are split: who called takes them so.
    split_outputs: bool = False
    #: The outputs that did, by position: their types and global shapes (*partition*).
    left_split: dict[int, tuple[Shard, tuple[Length, ...]]] = field(default_factory=dict)
    #: What is split only because the graphs before it were (*carry*).
    carried: list[PlanRecord] = field(default_factory=list)
    #: Whether there is no plan, and *infer* finds one.
    inferring: bool = False
    #: Lengths of the segments whose tokens are split into heads and tails (*zigzag*).
    head_tail: tuple[Length, ...] = ()
    #: What is known of attentions that are written out: a :class:`~fxsp.passes.attention.unfused.Unfused`, once one was
    #: asked for.
    unfused: Any = None
    #: A sentence for each attention that does not what the degrees ask for.
    ignored_degrees: list[str] = field(default_factory=list)
    #: The graph of all ranks, once ``gm`` is that of one (*partition*).
    global_gm: GraphModule | None = None

    @property
    def graph(self) -> Graph:
        return self.gm.graph

    @property
    def whole(self) -> GraphModule:
        """The graph of all ranks: ``gm``, or what it was partitioned from."""
        return self.global_gm or self.gm

    @property
    def is_local(self) -> bool:
        """Whether ``gm`` is the program of one rank."""
        return self.global_gm is not None

    @cached_property
    def degrees(self) -> AttentionDegrees:
        """The degrees that the user fixed."""
        return resolve_degrees(self.options, self.ranks.size)

    @cached_property
    def sizes(self) -> Mapping[Any, int]:
        """What symbolic sizes are for the inputs at hand."""
        modes = (fake_mode_of(global_value(node)) for node in self.whole.graph.nodes)
        return size_hints(next((mode for mode in modes if mode is not None), None))

    def number(self, size: Any) -> int:
        """A size as a number, for the inputs at hand."""
        return hint(size, self.sizes)


@dataclass(frozen=True)
class Pass(ABC):
    """``apply(program) -> program``; see the module's docstring for the contract."""

    @property
    def name(self) -> str:
        """That of its class, in small letters: of its stage, file and test, too."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(self).__name__).lower()

    @abstractmethod
    def apply(self, program: Program) -> Program: ...
