"""What a plan calls a value: an argument of a module, an output, or the result of a function that a module calls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from fxsp.capture.module_calls import Captured, result_name
from fxsp.passes.graph import facts
from fxsp.passes.infer.demand import Birth
from fxsp.plan import PlanEntry, SequenceParallelInput, SequenceParallelOutput, Spec
from fxsp.source import describe

__all__ = ["Named", "Namer"]


@dataclass(frozen=True)
class Named:
    """A value in words; ``entry`` is the line of a plan that says the same, None where no plan can."""

    place: str
    spec: Spec
    entry: PlanEntry | None

    def __str__(self) -> str:
        return self.entry.text() if self.entry is not None else f"{self.place}: {self.spec!r} (no plan can name it)"


class Namer:
    """Names values of one graph by the module calls that Dynamo recorded."""

    def __init__(self, captured: Captured, graph: Graph) -> None:
        self._calls = [call for call in captured.calls if call.paths] if captured.root is not None else []
        self._captured = captured
        self._inputs: dict[str, Node] = {}
        for call in captured.calls[:1]:
            self._inputs = {node.name: node for node in call.graph.find_nodes(op="placeholder")}
        #: What was asked for, in that order.
        self.names: dict[tuple[Birth, bool], Named] = {}

    def name(self, birth: Birth, *, gather: bool = False) -> Named:
        """The name of a value: the outermost module that has it as argument or output, else the function."""
        if (birth, gather) not in self.names:
            self.names[birth, gather] = self._name(birth, gather)
        return self.names[birth, gather]

    def place(self, birth: Birth) -> str:
        """``blocks.0[x]``, for what is told of a candidate that is not taken."""
        return self.names[birth, False].place if (birth, False) in self.names else self._name(birth, False).place

    def _name(self, birth: Birth, gather: bool) -> Named:
        rank = birth.node.meta["val"].ndim

        def spec(output: bool) -> Spec:
            if gather:
                return SequenceParallelOutput(birth.dim, expected_dims=rank)
            return SequenceParallelInput(birth.dim, expected_dims=rank, split_output=output, unit=birth.unit)

        for path, name, part, output in self._targets(birth.node):
            if output or not gather:
                entry = PlanEntry(path, name, spec(output and not isinstance(name, str)), part)
                return Named(entry.text().partition(":")[0], entry.spec, entry)
        return Named(describe(birth.node), spec(False), None)

    def _targets(self, node: Node) -> Iterator[tuple[str, str | int | None, tuple[int, int] | None, bool]]:
        spelled = facts(node).spelled
        if node.op == "placeholder":
            spelled = tuple(filter(None, (self._inputs.get(node.name),)))
            for call in self._calls:
                for name, value in call.arguments.items():
                    yield from ((call.paths[0], name, part, False) for part in _places(value, spelled))
            return
        for call in self._calls if spelled else ():
            outputs = list(call.outputs.values()) if isinstance(call.outputs, dict) else call.outputs
            if isinstance(outputs, (list, tuple)):
                at = next((i for i, v in enumerate(outputs) if isinstance(v, Node) and v in spelled), None)
                if at is not None:
                    yield call.paths[0], None if sum(v is not None for v in outputs) == 1 else at, None, True
            elif isinstance(outputs, Node) and outputs in spelled:
                yield call.paths[0], None, None, True
        inner = [call for call in self._calls if spelled and call.contains(spelled[0])]
        if inner:
            call = inner[-1]  # calls are in the order in which they began: the last one is the innermost
            yield call.paths[0], result_name(spelled[0], call, self._captured.calls), None, True


def _places(value: Any, spelled: tuple[Node, ...]) -> Iterator[tuple[int, int] | None]:
    if isinstance(value, Node) and value in spelled:
        yield None
    elif isinstance(value, (list, tuple)):
        yield from ((i, len(value)) for i, item in enumerate(value) if isinstance(item, Node) and item in spelled)
