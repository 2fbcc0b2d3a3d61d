"""Run a function under ``torch.compile`` and see what capture and annotate make of each graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxsp.capture.capture import Captured, capture, install
from fxsp.passes.annotate.annotate import annotate
from fxsp.report import PlanRecord
from fxsp.types import Ranks

ANNOTATE = torch.ops.fxsp.annotate.default


@dataclass
class Traced:
    """One graph that Dynamo handed to the backend."""

    gm: fx.GraphModule
    capture: Captured
    records: list[PlanRecord] = field(default_factory=list)

    def annotations(self) -> list[tuple[str, fx.Node, str, int, Any]]:
        """``(where, value, kind, dim, text_len)`` of each annotation, bodies of higher-order operators included."""
        graphs = [m.graph for m in self.gm.modules() if isinstance(m, fx.GraphModule)]
        nodes = [node for graph in graphs for node in graph.nodes if node.target is ANNOTATE]
        return [(node.args[4].split(":")[0], *node.args[:4]) for node in nodes]

    def call(self, path: str) -> Any:
        """The only call of the module at a path."""
        (found,) = [call for call in self.capture.calls if path in call.paths]
        return found


def names(value: Any) -> Any:
    """Nested nodes as their names; other values as they are."""
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, (list, tuple)):
        return type(value)(names(item) for item in value)
    if isinstance(value, dict):
        return {key: names(item) for key, item in value.items()}
    return value


def _is_ours(layer: object) -> bool:
    return getattr(layer, "_captures", False) is True


def compiled(function: Any, plan: Any = None, size: int = 2, **options: Any) -> tuple[Callable[..., Any], list[Traced]]:
    """``function`` compiled with a backend that captures, annotates for ``size`` ranks, and interprets; and its log."""
    torch._dynamo.reset()
    log: list[Traced] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        found = capture(gm, plan)
        records = annotate(gm, found, found.entries, Ranks(0, size, "")) if found.entries else []
        log.append(Traced(gm, found, records))
        return gm.forward

    backend._captures = True  # type: ignore[attr-defined]
    install(_is_ours)
    return torch.compile(function, backend=backend, **options), log


def trace(
    function: Any, *args: Any, plan: Any = None, size: int = 2, options: Any = None, **kwargs: Any
) -> list[Traced]:
    """Compile, call once, compare with eager, and return the log."""
    torch.manual_seed(0)
    expected = function(*args, **kwargs)
    fast, log = compiled(function, plan, size, **(options or {}))
    torch.manual_seed(0)
    torch.testing.assert_close(fast(*args, **kwargs), expected)
    return log
