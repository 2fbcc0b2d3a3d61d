"""``fxsp.verify``: is the partitioned model the model?  Checked on one process, for any number of ranks.

The model is traced, partitioned, and run in the lock-step simulator beside the untouched graph, values and gradients.
Where they differ the values inside are compared one by one, and the first that differs is named with its source line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fxsp.cost.share import LEAST
from fxsp.errors import OptionError
from fxsp.offline.partition import OfflineResult, partition_offline
from fxsp.offline.progress import check_size, told
from fxsp.passes.base import Program
from fxsp.report import Report
from fxsp.simulation.compare import Ran, accepted, differences, run_once, same_random_numbers
from fxsp.simulation.divergence import first_difference
from fxsp.simulation.joint import joint_graph
from fxsp.simulation.machine import run, simulate

__all__ = ["Evidence", "GraphEvidence", "verify"]


@dataclass
class GraphEvidence:
    """One graph on one number of ranks: relative errors (2-norm, the worst rank) of its outputs and gradients."""

    world_size: int
    outputs: list[float] = field(default_factory=list)
    #: Of each input that requires grad, parameters among them; empty without gradients.
    gradients: list[float] = field(default_factory=list)
    #: Of each input that the model writes to, after the call.
    written: list[float] = field(default_factory=list)
    #: What these lists are about, in words: ``output 0``, ``the gradient of blocks.0.qkv.weight``, ...
    names: list[str] = field(default_factory=list)
    #: Why the graph was not split, or nothing.
    unsharded: str = ""
    #: The first value that differs: where it comes from, its type and its error.
    first_difference: str = ""
    tolerance: float = 0.0
    #: What the compiler did with this graph.
    report: Report = field(default_factory=Report)

    @property
    def errors(self) -> dict[str, float]:
        """All errors by name."""
        return dict(zip(self.names, (*self.outputs, *self.gradients, *self.written), strict=True))

    @property
    def ok(self) -> bool:
        return all(error <= self.tolerance for error in (*self.outputs, *self.gradients, *self.written))

    def __str__(self) -> str:
        if self.unsharded:
            return f"{self.world_size} ranks: not split ({self.unsharded})"
        text = f"{self.world_size} ranks: {'equal' if self.ok else 'DIFFERENT'}"
        for what, errors in (
            ("outputs", self.outputs),
            ("gradients", self.gradients),
            ("written inputs", self.written),
        ):
            text += f", {what} {max(errors):.1e}" if errors else ""
        wrong = [f"{name}: error {error:.1e}" for name, error in self.errors.items() if not error <= self.tolerance]
        lines = [text, *wrong[:6], *([f"and {len(wrong) - 6} more"] if len(wrong) > 6 else [])]
        share = self.report.share
        if share is not None and share < LEAST and self.world_size > 1:
            lines.append(f"WARNING: the plan is of no use: {share:.0%} of the work runs on shards; explain shows why")
        if self.first_difference:
            lines.append(f"first difference: {self.first_difference}")
        return "\n  ".join(lines)


@dataclass
class Evidence:
    """What :func:`verify` found; true if everything is equal."""

    graphs: list[GraphEvidence]

    @property
    def ok(self) -> bool:
        return all(graph.ok for graph in self.graphs)

    @property
    def first_difference(self) -> str:
        """That of the first graph that differs; nothing if all are equal."""
        return next((graph.first_difference for graph in self.graphs if not graph.ok), "")

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        return "\n".join(map(str, self.graphs)) or "nothing was traced"


def verify(
    model: Callable[..., Any],
    *args: Any,
    world_size: int | Sequence[int] = (2, 3),
    config: Any = None,
    plan: Any = None,
    options: Mapping[str, Any] | None = None,
    gradients: bool | None = None,
    progress: bool = False,
    **kwargs: Any,
) -> Evidence:
    """Compare ``model(*args, **kwargs)`` with its partitioned form on ``world_size`` simulated ranks.

    ``config``, ``plan``, ``options`` and ``progress`` are as for :func:`fxsp.explain`.  ``gradients=None`` compares
    gradients where grad mode is on and something requires grad.  No process group is needed.  Tolerances: 1e-4 relative
    in float32, 1e-9 in float64.  Raises what the backend raises (``PlanError``, ...), and ``OptionError`` for a number
    of ranks that is none or values that are on the meta device; a difference is not raised but returned.
    """
    sizes = [world_size] if isinstance(world_size, int) else list(world_size)
    for size in sizes:
        check_size(size)
    given = dict(options or {})
    given |= {name: value for name, value in (("config", config), ("plan", plan)) if value is not None}
    _check_values(model, args, kwargs)
    found: list[GraphEvidence] = []
    with told(progress) as say:
        for size in sizes:
            torch.compiler.reset()
            say(f"{size} ranks: tracing and partitioning")
            results = partition_offline(model, args, kwargs, world_size=size, options=given)
            say(f"{size} ranks: simulating")
            found.extend(_compare(result, size, gradients) for result in results)
    return Evidence(found)


def _check_values(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """What can be seen before tracing."""
    given = [(f"argument {number}", x) for number, x in enumerate(args)] + list(kwargs.items())
    for name, value in given:
        for x in tree_leaves(value):
            _refuse_meta(name, x)
    if isinstance(model, torch.nn.Module):
        for name, x in (*model.named_parameters(), *model.named_buffers()):
            _refuse_meta(name, x)


def _refuse_meta(name: str, x: Any) -> None:
    if isinstance(x, Tensor) and x.is_meta:
        raise OptionError(
            f"verify compares values, and {name} {list(x.shape)} is on the meta device: give the model weights and "
            "inputs, or make it smaller; explain needs neither"
        )


def _compare(result: OfflineResult, size: int, gradients: bool | None) -> GraphEvidence:
    if result.program is None:
        return GraphEvidence(size, unsharded=result.report.unsharded, report=result.report)
    program, inputs = result.program, result.inputs
    for name, x in zip(result.names, inputs, strict=True):
        _refuse_meta(name, x)
    gradients = program.training if gradients is None else gradients and program.training
    wanted = run_once(result.whole, inputs, gradients=gradients)
    errors = differences(_simulated(program, size, inputs, wanted, gradients), wanted, result.names)
    evidence = GraphEvidence(size, tolerance=accepted(*wanted.outputs), report=result.report)
    kinds = {"output": evidence.outputs, "gradient": evidence.gradients, "written": evidence.written}
    for difference in sorted(errors, key=lambda e: list(kinds).index(e.kind)):
        kinds[difference.kind].append(difference.error)
        evidence.names.append(difference.what)
    if not evidence.ok:
        seeds, deferred = (wanted.seeds if gradients else None), program.options.deferred
        first = first_difference(program.gm, program.whole, size, inputs, seeds, evidence.tolerance, deferred)
        evidence.first_difference = first or "no value inside differs, and no gradient of one"
    return evidence


def _simulated(program: Program, size: int, inputs: Sequence[Any], wanted: Ran, gradients: bool) -> list[Ran]:
    """What each rank gives for copies of the inputs: of what ``wanted`` has, all."""
    graph = joint_graph(program.gm, inputs, wanted.seeds) if gradients else program.gm
    with same_random_numbers():
        ranks = simulate(graph, size, [*inputs, *wanted.seeds])
    count = len(wanted.seeds) if gradients else len(ranks[0])
    found = [dict(zip(wanted.gradients, rank[count:], strict=True)) for rank in ranks]
    if program.options.deferred:  # those of parameters are left as summands
        for i in [i for i in wanted.gradients if isinstance(inputs[i], torch.nn.Parameter)]:
            total = torch.stack([rank[i] for rank in found]).sum(0)
            for rank in found:
                rank[i] = total
    left: Sequence[Sequence[Any]] = [()] * size
    if any(wanted.written):
        with same_random_numbers():
            left = run(program.gm, size, inputs).inputs
    return [
        Ran([x for x in rank[:count] if isinstance(x, Tensor)], after, gradients=grads)
        for rank, after, grads in zip(ranks, left, found, strict=True)
    ]
