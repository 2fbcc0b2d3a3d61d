"""``options={"verify": True}``: the first call of a graph, tried out on the real ranks before it counts.

Copies of the inputs go through the graph as it is compiled, and through the whole graph on each rank alone; outputs,
inputs that were written to and, in training, the gradients of all inputs for random gradients of the outputs are
compared.  The worst rank decides, for all: either every rank goes on, or every rank raises the same error.  Where it
fails, simulated ranks tell a wrong partitioning (its first value that differs) from a wrong collective or compiler.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from fxsp.errors import VerificationError
from fxsp.kernels.op import same_memory
from fxsp.passes.base import Program
from fxsp.ranks.checks import TOLERANCE, relative_error, same_random_numbers
from fxsp.simulation.divergence import first_difference, place
from fxsp.torch_internals import version

__all__ = ["Trial", "random_seeds"]


def random_seeds(outputs: Sequence[Any]) -> list[Tensor | None]:
    """Gradients for outputs, the same each time and everywhere; None for one that has none, or is no tensor.

    Not ones: the sum of what a LayerNorm returns, say, has no gradient that could be wrong.
    """
    seeds: list[Tensor | None] = []
    for i, x in enumerate(outputs):
        if not isinstance(x, Tensor) or not x.requires_grad:
            seeds.append(None)
            continue
        generator = torch.Generator().manual_seed(i)
        dtype = torch.float32 if x.dtype.itemsize < 4 else x.dtype
        seeds.append(torch.randn(x.shape, dtype=dtype, generator=generator).to(x))
    return seeds


@dataclass
class _Ran:
    """What one program gave for copies of the inputs."""

    outputs: list[Tensor]
    #: The inputs as it left them, and which of them it wrote to.
    inputs: list[Any]
    written: list[bool]
    #: For each input that requires grad.
    gradients: list[Tensor | None]


class Trial:
    """The check of one compiled graph; ``wrap(run)`` is the function to call instead of ``run``."""

    def __init__(self, program: Program, whole: Callable[..., Any], names: Sequence[str], group: Any) -> None:
        # What compiles the graph may edit it.
        self.local = GraphModule(program.gm, copy.deepcopy(program.gm.graph))
        self.typed: GraphModule = program.whole
        self.whole, self.names, self.group = whole, names, group
        self.ranks, self.training, self.defer = program.ranks, program.training, program.options.deferred

    def wrap(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """``run``, but its first call is tried out before; raises :class:`VerificationError` where that fails."""
        done = False

        def verified(*args: Any) -> Any:
            nonlocal done
            if not done:
                done = True
                self._try(run, args)
            return run(*args)

        return verified

    def _try(self, run: Callable[..., Any], args: Sequence[Any]) -> None:
        with same_random_numbers():
            wanted = self._run(self.whole, args)
        with same_random_numbers():
            found = self._run(run, args)
        if self.defer:
            found.gradients = [
                self._reduced(g) if isinstance(x, torch.nn.Parameter) else g
                for g, x in zip(found.gradients, _requiring(args), strict=True)
            ]
        errors = self._errors(found, wanted, args)
        worst = torch.tensor([error for _, error, _ in errors], dtype=torch.float64)
        device = next((a.device for a in args if isinstance(a, Tensor)), torch.device("cpu"))
        worst = worst.float().to(device) if device.type == "mps" else worst.to(device)
        if dist.is_initialized() and len(errors):
            dist.all_reduce(worst, dist.ReduceOp.MAX, group=self.group)
        lines = [
            f"{what} differs from the graph on one device by {error:.1e} (relative, the worst rank); "
            f"at most {accepted:.0e} is accepted"
            for (what, _, accepted), error in zip(errors, worst.tolist(), strict=True)
            if not error <= accepted
        ]
        if lines:
            shown = "\n  ".join(lines[:6]) + (f"\n  and {len(lines) - 6} more" if len(lines) > 6 else "")
            raise VerificationError(f"verify: {shown}\n  {self._diagnosis(args)}")

    def _run(self, function: Callable[..., Any], args: Sequence[Any]) -> _Ran:
        training = self.training and torch.is_grad_enabled()
        leaves = [_leaf(x, training) for x in args]
        # A graph may write to its inputs, and autograd lets no one write to a leaf.
        values = [_through(x) if isinstance(x, Tensor) and x.requires_grad else x for x in leaves]
        before = [version(x) if isinstance(x, Tensor) else 0 for x in values]
        flat = tree_leaves(function(*values))
        written = [isinstance(x, Tensor) and version(x) > n for x, n in zip(values, before, strict=True)]
        gradients: list[Tensor | None] = []
        if training:
            pairs = [(x, s) for x, s in zip(flat, random_seeds(flat), strict=True) if s is not None]
            wanted = _requiring(leaves)
            gradients = [None] * len(wanted)
            if pairs:
                grads = torch.autograd.grad([x for x, _ in pairs], wanted, [s for _, s in pairs], allow_unused=True)
                gradients = list(grads)
        outputs = [x.detach() for x in flat if isinstance(x, Tensor)]
        return _Ran(outputs, values, written, gradients)

    def _reduced(self, gradient: Tensor | None) -> Tensor | None:
        """A gradient as an outer reducer makes it: of the copies, which have no hooks, it is the mean."""
        if gradient is not None:
            gradient = gradient.contiguous().clone()
            dist.all_reduce(gradient, group=self.group)
            gradient /= self.ranks.size
        return gradient

    def _errors(self, found: _Ran, wanted: _Ran, args: Sequence[Any]) -> list[tuple[str, float, float]]:
        """What was compared, its error on this rank, and what is accepted; the same things on every rank."""
        errors: list[tuple[str, float, float]] = []
        made = [x for x in tree_leaves(self.typed.graph.output_node().args[0]) if isinstance(x, Node)]
        made = [n for n in made if isinstance(n.meta.get("val"), Tensor)]
        for i, (a, b) in enumerate(zip(found.outputs, wanted.outputs, strict=True)):
            where = f" ({place(made[i])})" if len(made) == len(wanted.outputs) else ""
            text = f"output {i}{where}, {b.dtype} {list(b.shape)},"
            errors.append((text, relative_error(a, b), TOLERANCE.get(b.dtype, 0.0)))
        for name, got, want, w in zip(self.names, found.inputs, wanted.inputs, wanted.written, strict=True):
            if w:
                accepted = TOLERANCE.get(want.dtype, 0.0)
                errors.append((f"input {name} after the call", relative_error(got, want), accepted))
        usual = max((g.norm().item() for g in wanted.gradients if g is not None), default=0.0)
        required = [name for name, x in zip(self.names, args, strict=True) if isinstance(x, Tensor) and x.requires_grad]
        for name, mine, theirs in zip(required, found.gradients, wanted.gradients, strict=False):
            some = mine if mine is not None else theirs
            if some is None:
                continue
            got, want = (torch.zeros_like(some) if x is None else x for x in (mine, theirs))
            accepted = TOLERANCE.get(want.dtype, 0.0)
            errors.append((f"the gradient of {name}", relative_error(got, want, usual), accepted))
        return errors

    def _diagnosis(self, args: Sequence[Any]) -> str:
        inputs = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in args]
        seeds = None
        if self.training and torch.is_grad_enabled():
            with same_random_numbers():
                leaves = [_leaf(x, True) for x in args]
                values = [_through(x) if isinstance(x, Tensor) and x.requires_grad else x for x in leaves]
                seeds = random_seeds(tree_leaves(self.whole(*values)))
        tolerance = max((TOLERANCE.get(x.dtype, 0.0) for x in args if isinstance(x, Tensor)), default=0.0)
        found = first_difference(self.local, self.typed, self.ranks.size, inputs, seeds, tolerance, self.defer)
        if found:
            return f"the first that differs, on simulated ranks: {found}"
        return (
            "on simulated ranks all values are right, so the plan and the partitioning are: compare the inputs of the "
            "ranks with options={'check_inputs': True}, and inner='aot_eager' with inner='inductor'"
        )


def _leaf(x: Any, training: bool) -> Any:
    """A copy of a tensor, without its history; what is no tensor stays itself."""
    return same_memory(x.detach()).requires_grad_(training and x.requires_grad) if isinstance(x, Tensor) else x


def _through(x: Tensor) -> Tensor:
    """A value of its own memory whose gradient is that of ``x``, in the layout of ``x``."""
    if any(s == 0 and n > 1 for n, s in zip(x.shape, x.stride(), strict=True)):
        return x.view_as(x)  # expanded: nobody may write to it
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def _requiring(values: Sequence[Any]) -> list[Tensor]:
    return [x for x in values if isinstance(x, Tensor) and x.requires_grad]
