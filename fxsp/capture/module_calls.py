"""What capture finds out, as data: the module calls of one graph, with their values as nodes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from fxsp.capture.graph_breaks import Splits
from fxsp.plan import PlanEntry
from fxsp.torch_internals import Opaque

__all__ = ["Captured", "ModuleCall", "function_name", "own_nodes", "result_name"]


@dataclass(eq=False)
class ModuleCall:
    """One call of a module.

    ``arguments`` (by name; those not passed are missing) and ``outputs`` are nested tuples, lists and dicts of nodes
    of ``graph`` and constants; :class:`~fxsp.torch_internals.Opaque` says why a value is neither.  The region is all
    nodes after ``before`` up to and including ``last`` (``None``: no node yet), graph inputs excepted.
    """

    module: nn.Module
    arguments: dict[str, Any]
    outputs: Any
    graph: fx.Graph
    before: fx.Node | None
    last: fx.Node | None
    #: Calls that ended earlier have a smaller number.
    ended: float = math.inf
    #: Paths of the module in the root; several if it is shared, none if it is no part of it.
    paths: tuple[str, ...] = ()

    def contains(self, node: fx.Node) -> bool:
        """Whether a node was created during the call (nodes inserted there later belong to it too)."""
        if node.graph is not self.graph or node.op in ("placeholder", "output") or self.last is None:
            return False
        return (self.before is None or self.before < node) and not self.last < node

    def region(self) -> list[fx.Node]:
        """The nodes created during the call, in order."""
        return [node for node in self.graph.nodes if self.contains(node)]


def function_name(node: fx.Node) -> str:
    """What a node of Dynamo's graph calls: ``"cat"`` of ``torch.cat`` and of a method ``cat``."""
    return str(getattr(node.target, "__name__", node.target))


def own_nodes(call: ModuleCall, calls: list[ModuleCall]) -> list[fx.Node]:
    """The nodes of a call that belong to no module that it calls."""
    region = call.region()
    inner = [
        other for other in calls if other.ended < call.ended and other.last is not None and call.contains(other.last)
    ]
    inside = {node for other in inner for node in other.region()}
    return [node for node in region if node not in inside]


def _results(function: str, call: ModuleCall, calls: list[ModuleCall]) -> list[fx.Node]:
    """What the module itself gets from a function, call by call."""
    return [node for node in own_nodes(call, calls) if function_name(node) == function]


def result_name(node: fx.Node, call: ModuleCall, calls: list[ModuleCall]) -> str:
    """``"cat#1"``: the second result of ``cat`` among the functions that the module calls itself."""
    name = function_name(node)
    return f"{name}#{_results(name, call, calls).index(node)}"


@dataclass(eq=False)
class Captured:
    """What is known about one graph of Dynamo."""

    #: The module that owns the plan (or that the plan was given for), without wrappers; None: not found.
    root: nn.Module | None
    #: The plan, from the options or the root; None: there is no plan.
    entries: tuple[PlanEntry, ...] | None
    #: The part of the root that is compiled by itself: much of the plan is none of its business.  None: it is the root.
    part: nn.Module | None = None
    #: Calls in the order in which they began; the traced frame itself comes first if it is a module's forward.
    calls: list[ModuleCall] = field(default_factory=list)
    #: Modules whose forward is under way outside of this graph (after a graph break), with their real arguments.
    around: list[tuple[nn.Module, dict[str, Any]]] = field(default_factory=list)
    #: What earlier graphs of the same compilation had split.
    splits: Splits = field(default_factory=Splits)
    #: What could not be found out, and why, for the report.
    notes: list[str] = field(default_factory=list)

    def result(self, call: ModuleCall, name: str) -> Any:
        """The node that ``"cat#1"`` means in a call; :class:`~fxsp.torch_internals.Opaque` where there is none."""
        function, _, index = name.partition("#")
        same = _results(function, call, self.calls)
        if int(index) < len(same):
            return same[int(index)]
        return Opaque(f"the module calls {function} {len(same)} times here")

    def calls_of(self, module: nn.Module) -> list[ModuleCall]:
        """All calls of a module in this graph."""
        return [call for call in self.calls if call.module is module]
