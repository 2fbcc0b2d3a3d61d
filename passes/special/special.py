"""What stands for an operator that no rule describes, or whose local call is another than the global one."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol

from torch.fx import Node

from fxsp.passes.base import Program
from fxsp.passes.builder import Builder
from fxsp.passes.graph import Call, Decision
from fxsp.types import Type

__all__ = ["Local", "Special"]


class Local(Protocol):
    """Where the calls of one rank are written; see :class:`fxsp.passes.partition.reshard.Converter`."""

    program: Program
    build: Builder
    #: What is no tensor: a node of the global graph -> what stands for it here.
    copies: dict[Node, Any]

    def arguments(self, call: Call, decision: Decision) -> dict[str, Any]:
        """The arguments of ``call`` by name, operands local and of the types that ``decision`` asks for."""

    def same_call(self, call: Call, decision: Decision) -> Node:
        """The same call on these arguments; a summand is wide."""


class Special:
    """One object for a family of operators: how their calls are split (*propagate*), and written (*partition*)."""

    #: The operators that it is asked about.
    ops: Collection[Any]

    def decide(self, call: Call, types: list[Type], program: Program) -> Decision | None:
        """A decision, with ``special=self`` where ``write`` is to write it; None where the next one decides."""
        raise NotImplementedError

    def write(self, local: Local, call: Call, decision: Decision) -> Node | list[Any]:
        """The call of one rank; a list where there are several results (None: nobody uses it)."""
        return local.same_call(call, decision)
