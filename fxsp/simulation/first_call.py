"""``options={"verify": True}``: the first call of a graph, tried out on the real ranks before it counts.

Copies of the inputs go through the graph as it is compiled, and through the whole graph on each rank alone; outputs,
inputs that were written to and, in training, the gradients of all inputs for random gradients of the outputs are
compared.  The worst rank decides, for all: either every rank goes on, or every rank raises the same error.  Where it
fails, simulated ranks tell a wrong partitioning (its first value that differs) from a wrong collective or compiler.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from fxsp.errors import VerificationError
from fxsp.passes.base import Program
from fxsp.simulation.compare import Difference, Ran, accepted, differences, run_once
from fxsp.simulation.divergence import first_difference, place

__all__ = ["Trial"]


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
        gradients = self.training and torch.is_grad_enabled()
        wanted = run_once(self.whole, args, gradients=gradients)
        found = run_once(run, args, gradients=gradients)
        if self.defer:
            for i in [i for i in found.gradients if isinstance(args[i], torch.nn.Parameter)]:
                found.gradients[i] = self._reduced(found.gradients[i])
        errors = differences([found], wanted, self.names)
        places = self._places(errors, wanted.outputs)
        worst = torch.tensor([difference.error for difference in errors], dtype=torch.float64)
        device = next((a.device for a in args if isinstance(a, Tensor)), torch.device("cpu"))
        worst = worst.float().to(device) if device.type == "mps" else worst.to(device)
        if dist.is_initialized() and len(errors):
            dist.all_reduce(worst, dist.ReduceOp.MAX, group=self.group)
        lines = [
            f"{places[one.what]} differs from the graph on one device by {error:.1e} (relative, the worst rank); "
            f"at most {one.accepted:.0e} is accepted"
            for one, error in zip(errors, worst.tolist(), strict=True)
            if not error <= one.accepted
        ]
        if lines:
            shown = "\n  ".join(lines[:6]) + (f"\n  and {len(lines) - 6} more" if len(lines) > 6 else "")
            raise VerificationError(f"verify: {shown}\n  {self._diagnosis(args, wanted)}")

    def _reduced(self, gradient: Tensor | None) -> Tensor | None:
        """A gradient as an outer reducer makes it: of the copies, which have no hooks, it is the mean."""
        if gradient is not None:
            gradient = gradient.contiguous().clone()
            dist.all_reduce(gradient, group=self.group)
            gradient /= self.ranks.size
        return gradient

    def _places(self, errors: Sequence[Difference], outputs: Sequence[Tensor]) -> dict[str, str]:
        """What differs, with more about it: ``output 0 (blocks.0, model.py:12), torch.float32 [2, 5],``."""
        made = [x for x in tree_leaves(self.typed.graph.output_node().args[0]) if isinstance(x, Node)]
        made = [n for n in made if isinstance(n.meta.get("val"), Tensor)]
        known = [f" ({place(n)})" for n in made] if len(made) == len(outputs) else [""] * len(outputs)
        texts = {e.what: f"input {e.what}" if e.kind == "written" else e.what for e in errors}
        for i, (where, x) in enumerate(zip(known, outputs, strict=True)):
            texts[f"output {i}"] = f"output {i}{where}, {x.dtype} {list(x.shape)},"
        return texts

    def _diagnosis(self, args: Sequence[Any], wanted: Ran) -> str:
        size, seeds = self.ranks.size, wanted.seeds or None
        found = first_difference(self.local, self.typed, size, args, seeds, accepted(*args), self.defer)
        if found:
            return f"the first that differs, on simulated ranks: {found}"
        return (
            "on simulated ranks all values are right, so the plan and the partitioning are: compare the inputs of the "
            "ranks with options={'check_inputs': True}, and inner='aot_eager' with inner='inductor'"
        )
