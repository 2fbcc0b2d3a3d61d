"""Many ranks in this process as a backend of ``torch.compile``: Dynamo, our passes, then a run in lock-step.

::

    backend = Simulated(3, by_plan({"plan": plan}))
    out = torch.compile(model, backend=backend)(x)      # of all ranks, checked to be the same on each
    out.sum().backward()                                # gradients too

What real code contains can so be tried on any number of ranks, without processes: only AOTAutograd, *emit* and the
network are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxsp.capture.capture import install
from fxsp.config import Options
from fxsp.errors import FxspError
from fxsp.partitioning import compile_graph
from fxsp.passes.base import Program
from fxsp.passes.functionalize.inplace import written_arguments
from fxsp.passes.normalize.regions import open_regions
from fxsp.passes.partition.defer import scale_summands
from fxsp.report import Report
from fxsp.torch_internals import any_autocast, through_dynamo, without_autocast
from fxsp.types import Ranks
from lockstep import lanes_of
from replicated import check_replicated

__all__ = ["Simulated", "by_plan"]

#: Dynamo's graph, its inputs, the ranks: the program of one rank, or None where the graph stays whole.
Compile = Callable[[GraphModule, Sequence[Any], Ranks], Program | None]


class _Spread(torch.autograd.Function):
    """A whole value for each rank; its gradient must be whole on each rank too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> tuple[Tensor, ...]:
        return tuple(x.clone() for _ in range(size))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _same(grads), None


class _SpreadMean(torch.autograd.Function):
    """A parameter for each rank; its gradient is what an outer reducer makes of theirs, their mean."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> tuple[Tensor, ...]:
        return tuple(x.clone() for _ in range(size))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.stack(grads).mean(0), None


class _Merge(torch.autograd.Function):
    """The one value that all ranks have."""

    @staticmethod
    def forward(ctx: Any, *lanes: Tensor) -> Tensor:
        ctx.size = len(lanes)
        return _same(lanes).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return (grad,) * ctx.size


def _same(lanes: Sequence[Any]) -> Any:
    (value,) = check_replicated([[lane] for lane in lanes])
    return value


def _spread(x: Any, size: int, deferred: bool) -> list[Any]:
    if not isinstance(x, Tensor):
        return [x] * size
    if torch.is_grad_enabled() and x.requires_grad:
        mean = deferred and isinstance(x, torch.nn.Parameter)
        return list((_SpreadMean if mean else _Spread).apply(x, size))
    return [x.clone() for _ in range(size)]


def _merge(lanes: Sequence[Any]) -> Any:
    if torch.is_grad_enabled() and getattr(lanes[0], "requires_grad", False):
        return _Merge.apply(*lanes)
    return _same(lanes)


class Simulated:
    """A backend that runs each graph for ``size`` ranks; ``programs`` are those of its graphs.

    ``deferred``: gradients of parameters are left to an outer reducer, which takes the mean (``grad_reduce``).
    """

    __name__ = "simulated"

    def __init__(self, size: int, compile_: Compile, *, poison_pads: bool = False, deferred: bool = False) -> None:
        self.size = size
        self.deferred = deferred
        self.compile = compile_
        self.poison_pads = poison_pads
        self.programs: list[Program | None] = []

    def __call__(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        with through_dynamo(FxspError):
            program = self.compile(gm, inputs, Ranks(0, self.size, "simulated"))
        self.programs.append(program)
        if program is None:
            return open_regions(gm).forward
        placeholders = program.graph.find_nodes(op="placeholder")
        written = {target for node in program.graph.nodes for target in written_arguments(node)}
        positions = [i for i, node in enumerate(placeholders) if node in written]

        def run(*args: Any) -> Any:
            if not any_autocast():
                return self._run(program, args, positions)
            with without_autocast():  # the casts are nodes of the graph
                return self._run(program, args, positions)

        return run

    def _run(self, program: Program, args: Sequence[Any], written: Sequence[int]) -> Any:
        lanes = [_spread(x, self.size, self.deferred) for x in args]
        outputs = lanes_of(program.gm, self.size, lanes, poison_pads=self.poison_pads)
        results = tuple(_merge([out[i] for out in outputs]) for i in range(len(outputs[0])))
        for i in written:
            args[i].copy_(_merge(lanes[i]))
        return results


install(lambda backend: isinstance(backend, Simulated))


def by_plan(options: dict[str, Any], reports: list[Report] | None = None) -> Compile:
    """As ``backend="sp"`` compiles, with these options; the reports are added to ``reports``."""
    parsed = Options.parse(options)

    def compile_(gm: GraphModule, inputs: Sequence[Any], ranks: Ranks) -> Program | None:
        report, program = compile_graph(gm, inputs, parsed, ranks)
        if reports is not None:
            reports.append(report)
        if program is not None and parsed.deferred:
            scale_summands(program.gm, ranks.size)
        return program

    return compile_
