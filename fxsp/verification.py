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
from torch.fx import Interpreter, Node
from torch.utils._pytree import tree_leaves

from fxsp.checks import TOLERANCE, relative_error
from fxsp.offline import OfflineResult, partition_offline
from fxsp.passes.base import Program
from fxsp.simulation import assemble, simulate, simulate_with_grads
from fxsp.source import module_path, node_source

__all__ = ["Evidence", "GraphEvidence", "verify"]


@dataclass
class GraphEvidence:
    """One graph on one number of ranks: relative errors (2-norm, the worst rank) of its outputs and gradients."""

    world_size: int
    outputs: list[float] = field(default_factory=list)
    #: Of each input that requires grad, parameters among them; empty without gradients.
    gradients: list[float] = field(default_factory=list)
    #: Why the graph was not split, or nothing.
    unsharded: str = ""
    #: The first value that differs: where it comes from, its type and its error.
    first_difference: str = ""
    tolerance: float = 0.0

    @property
    def ok(self) -> bool:
        return all(error <= self.tolerance for error in (*self.outputs, *self.gradients))

    def __str__(self) -> str:
        if self.unsharded:
            return f"{self.world_size} ranks: not split ({self.unsharded})"
        verdict = "equal" if self.ok else "DIFFERENT"
        text = f"{self.world_size} ranks: {verdict}, outputs {max(self.outputs, default=0):.1e}"
        if self.gradients:
            text += f", gradients {max(self.gradients):.1e}"
        return text + (f"\n  first difference: {self.first_difference}" if self.first_difference else "")


@dataclass
class Evidence:
    """What :func:`verify` found; true if everything is equal."""

    graphs: list[GraphEvidence]

    @property
    def ok(self) -> bool:
        return all(graph.ok for graph in self.graphs)

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        return "\n".join(map(str, self.graphs)) or "nothing was traced"


def verify(
    model: Callable[..., Any],
    *args: Any,
    world_size: int | Sequence[int] = (2, 3),
    options: Mapping[str, Any] | None = None,
    gradients: bool | None = None,
    **kwargs: Any,
) -> Evidence:
    """Compare ``model(*args, **kwargs)`` with its partitioned form on ``world_size`` simulated ranks.

    ``options`` are those of the backend.  ``gradients=None`` compares them where grad mode is on and something requires
    grad.  No process group is needed.  Tolerances: 1e-4 relative in float32, 1e-9 in float64.  Raises what the backend
    raises (``PlanError``, ...); a difference is not raised but returned.
    """
    sizes = [world_size] if isinstance(world_size, int) else list(world_size)
    found: list[GraphEvidence] = []
    for size in sizes:
        torch.compiler.reset()
        results = partition_offline(model, args, kwargs, world_size=size, options=options)
        found.extend(_compare(result, size, gradients) for result in results)
    return Evidence(found)


def _compare(result: OfflineResult, size: int, gradients: bool | None) -> GraphEvidence:
    if result.program is None:
        return GraphEvidence(size, unsharded=result.report.unsharded)
    program, inputs = result.program, result.inputs
    if gradients is None:
        gradients = program.training
    leaves = [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs]
    with torch.set_grad_enabled(gradients):
        values = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
        expected = [x for x in tree_leaves(result.whole(*values)) if isinstance(x, Tensor)]
    tolerance = max((TOLERANCE.get(x.dtype, 0.0) for x in expected), default=0.0)
    evidence = GraphEvidence(size, tolerance=tolerance)
    if gradients:
        seeds = [_seed(x, i) if x.requires_grad else None for i, x in enumerate(expected)]
        pairs = [(x, s) for x, s in zip(expected, seeds, strict=True) if s is not None]
        wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        grads = torch.autograd.grad(
            [x for x, _ in pairs], wanted, [s for _, s in pairs], allow_unused=True, materialize_grads=True
        )
        outputs, found = simulate_with_grads(program.gm, size, leaves, seeds)
        usual = max((g.norm().item() for g in grads), default=0.0)
        evidence.gradients = [max(relative_error(rank[i], g, usual) for rank in found) for i, g in enumerate(grads)]
    else:
        outputs = simulate(program.gm, size, leaves)
    tensors = [[x for x in rank if isinstance(x, Tensor)] for rank in outputs]
    evidence.outputs = [max(relative_error(rank[i], x) for rank in tensors) for i, x in enumerate(expected)]
    if not evidence.ok:
        evidence.first_difference = _first_difference(program, size, leaves, tolerance)
    return evidence


def _seed(output: Tensor, index: int) -> Tensor:
    """Random, the same each time: the sum of what a LayerNorm returns, say, has no gradient that could be wrong."""
    generator = torch.Generator(output.device).manual_seed(index)
    return torch.randn(output.shape, dtype=output.dtype, device=output.device, generator=generator)


class _Keeper(Interpreter):
    """Runs the global graph and keeps every tensor."""

    def __init__(self, gm: torch.fx.GraphModule) -> None:
        super().__init__(gm)
        self.kept: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.kept[n.name] = value
        return value


def _first_difference(program: Program, size: int, inputs: Sequence[Any], tolerance: float) -> str:
    keeper = _Keeper(program.facts["global"])
    with torch.no_grad():
        keeper.run(*[x.detach().clone() if isinstance(x, Tensor) else x for x in inputs])
    found: list[str] = []

    def look(node: Node, lanes: Sequence[Any]) -> None:
        expected = keeper.kept.get(node.meta.get("global_name", ""))
        if found or expected is None or "sp" not in node.meta or not all(isinstance(x, Tensor) for x in lanes):
            return
        error = relative_error(assemble(node.meta["sp"], lanes), expected)
        if not error <= tolerance:
            where = f"{module_path(node) or 'the root module'}, {node_source(node) or 'no source line'}"
            found.append(f"{node.name}: {node.meta['sp']} of {node.meta['global_name']} ({where}), error {error:.1e}")

    simulate(program.gm, size, inputs, observe=look)
    return found[0] if found else "only gradients differ"
