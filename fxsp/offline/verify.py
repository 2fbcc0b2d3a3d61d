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

from fxsp.errors import OptionError
from fxsp.offline.partition import OfflineResult, partition_offline
from fxsp.offline.progress import check_size, told
from fxsp.ranks.checks import TOLERANCE, relative_error, same_random_numbers
from fxsp.report import Report
from fxsp.simulation.divergence import first_difference
from fxsp.simulation.first_call import random_seeds
from fxsp.simulation.machine import joint_graph, run, simulate
from fxsp.torch_internals import is_wrapper_subclass, storage_key, version

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
    found: list[GraphEvidence] = []
    with told(progress) as say:
        for size in sizes:
            torch.compiler.reset()
            say(f"{size} ranks: tracing and partitioning")
            results = partition_offline(model, args, kwargs, world_size=size, options=given)
            say(f"{size} ranks: simulating")
            found.extend(_compare(result, size, gradients) for result in results)
    return Evidence(found)


def _leaf(x: Tensor) -> Tensor:
    """A copy; of a tensor made of others, which nothing writes to, another name."""
    copy = x.detach() if is_wrapper_subclass(x) else x.detach().clone()
    return copy.requires_grad_(x.requires_grad)


def _state(x: Any) -> tuple[int, int]:
    """What changes when a tensor is written to, or gets other memory."""
    return (version(x), storage_key(x)) if isinstance(x, Tensor) else (0, 0)


def _compare(result: OfflineResult, size: int, gradients: bool | None) -> GraphEvidence:
    if result.program is None:
        return GraphEvidence(size, unsharded=result.report.unsharded, report=result.report)
    program, inputs = result.program, result.inputs
    for name, x in zip(result.names, inputs, strict=True):
        if isinstance(x, Tensor) and x.is_meta:
            raise OptionError(
                f"verify compares values, and {name} {list(x.shape)} is on the meta device: give the model weights and "
                "inputs, or make it smaller; explain needs neither"
            )
    gradients = program.training if gradients is None else gradients and program.training
    leaves = [_leaf(x) if isinstance(x, Tensor) else x for x in inputs]
    with torch.set_grad_enabled(gradients), same_random_numbers():
        values = [x.clone() if isinstance(x, Tensor) and not is_wrapper_subclass(x) else x for x in leaves]
        before = [_state(x) for x in values]
        alive = [x.detach() for x in values if isinstance(x, Tensor)]  # so that no other memory gets a key of theirs
        flat = tree_leaves(result.whole(*values))
    expected = [x for x in flat if isinstance(x, Tensor)]
    written = [i for i, x in enumerate(values) if _state(x) != before[i]]
    del alive
    tolerance = max((TOLERANCE.get(x.dtype, 0.0) for x in expected), default=0.0)
    evidence = GraphEvidence(
        size, tolerance=tolerance, report=result.report, names=[f"output {i}" for i in range(len(expected))]
    )
    seeds: list[Tensor | None] | None = None
    if gradients:
        seeds = random_seeds(flat)
        pairs = [(x, s) for x, s in zip(flat, seeds, strict=True) if s is not None]
        wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        grads = torch.autograd.grad(
            [x for x, _ in pairs], wanted, [s for _, s in pairs], allow_unused=True, materialize_grads=True
        )
        joint = joint_graph(program.gm, leaves, seeds)
        with same_random_numbers():
            both = simulate(joint, size, [*leaves, *seeds])
        outputs, found = [rank[: len(flat)] for rank in both], [rank[len(flat) :] for rank in both]
        if program.options.deferred:  # those of parameters are left as summands
            for i, x in enumerate(x for x in inputs if isinstance(x, Tensor) and x.requires_grad):
                if isinstance(x, torch.nn.Parameter):
                    total = torch.stack([rank[i] for rank in found]).sum(0)
                    for rank in found:
                        rank[i] = total
        usual = max((g.norm().item() for g in grads), default=0.0)
        evidence.gradients = [max(relative_error(rank[i], g, usual) for rank in found) for i, g in enumerate(grads)]
        required = [n for n, x in zip(result.names, leaves, strict=True) if isinstance(x, Tensor) and x.requires_grad]
        evidence.names += [f"the gradient of {name}" for name in required]
    else:
        with same_random_numbers():
            outputs = simulate(program.gm, size, leaves)
    tensors = [[x for x in rank if isinstance(x, Tensor)] for rank in outputs]
    evidence.outputs = [max(relative_error(rank[i], x) for rank in tensors) for i, x in enumerate(expected)]
    if written:
        with same_random_numbers():
            left = run(program.gm, size, leaves).inputs
        evidence.written = [max(relative_error(rank[i], values[i]) for rank in left) for i in written]
        evidence.names += [f"{result.names[i]} after the call" for i in written]
    if not evidence.ok:
        deferred = program.options.deferred
        difference = first_difference(program.gm, program.whole, size, leaves, seeds, tolerance, deferred)
        evidence.first_difference = difference or "no value inside differs, and no gradient of one"
    return evidence
