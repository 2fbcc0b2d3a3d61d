"""What a plan calls a value: an argument of a module, an output, or the result of a function that a module calls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from fxsp.capture.module_calls import Captured, result_name
from fxsp.passes.graph import facts
from fxsp.passes.infer.demand import Birth
from fxsp.plan import PlanEntry, SequenceParallelInput
from fxsp.source import describe

__all__ = ["Named", "Namer"]


@dataclass(frozen=True)
class Named:
    """A birth in words; ``entry`` is the line of a plan that says the same, None where no plan can."""

    place: str
    spec: SequenceParallelInput
    entry: PlanEntry | None

    def __str__(self) -> str:
        return self.entry.text() if self.entry is not None else f"{self.place}: {self.spec!r} (no plan can name it)"


class Namer:
    """Names values of one graph by the module calls that Dynamo recorded."""

    def __init__(self, captured: Captured, graph: Graph) -> None:
        self._calls = captured.calls if captured.root is not None else []
        self._inputs: dict[str, Node] = {}
        for call in self._calls[:1]:
            self._inputs = {node.name: node for node in call.graph.find_nodes(op="placeholder")}

    def name(self, birth: Birth) -> Named:
        """The name of a value: the outermost module that has it as argument or output, else the function."""
        rank = birth.node.meta["val"].ndim
        for target in self._targets(birth.node):
            path, name, part, output = target
            spec = SequenceParallelInput(birth.dim, expected_dims=rank, split_output=output)
            entry = PlanEntry(path, name, spec, part)
            return Named(entry.text().partition(":")[0], spec, entry)
        return Named(describe(birth.node), SequenceParallelInput(birth.dim, expected_dims=rank), None)

    def _targets(self, node: Node) -> Iterator[tuple[str, str | int | None, tuple[int, int] | None, bool]]:
        spelled = facts(node).spelled
        if node.op == "placeholder":
            spelled = (self._inputs[node.name],) if node.name in self._inputs else ()
        if not spelled:
            return
        calls = [call for call in self._calls if call.paths]
        if node.op == "placeholder":
            for call in calls:
                for name, value in call.arguments.items():
                    yield from ((call.paths[0], name, part, False) for part in _places(value, spelled))
            return
        for call in calls:
            outputs = call.outputs
            outputs = list(outputs.values()) if isinstance(outputs, dict) else outputs
            if isinstance(outputs, (list, tuple)):
                present = [i for i, value in enumerate(outputs) if value is not None]
                at = next((i for i, value in enumerate(outputs) if value in spelled), None)
                if at is not None:
                    yield call.paths[0], None if len(present) == 1 else at, None, True
            elif isinstance(outputs, Node) and outputs in spelled:
                yield call.paths[0], None, None, True
        inner = [call for call in calls if call.contains(spelled[0])]
        if inner:
            call = inner[-1]  # calls are in the order in which they began: the last is the innermost
            yield call.paths[0], result_name(spelled[0], call, self._calls), None, True


def _places(value: Any, spelled: tuple[Node, ...]) -> Iterator[tuple[int, int] | None]:
    if isinstance(value, Node) and value in spelled:
        yield None
    elif isinstance(value, (list, tuple)):
        yield from ((i, len(value)) for i, item in enumerate(value) if isinstance(item, Node) and item in spelled)
