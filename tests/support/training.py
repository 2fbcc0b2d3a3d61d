"""One training step on real ranks beside the same step on one process; used by the tests of gradients.

:func:`run_step` is called on every rank and returns a :class:`Step` of plain numbers and text.  :func:`simulate_step`
does the same for all ranks in this process, with one compile instead of one on each rank.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import models
from running import Compiler, build, error_of, on_this_rank, recorded, simulating

__all__ = ["Step", "StepCase", "run_step", "simulate_step"]


@dataclass(frozen=True)
class StepCase:
    """One training step.  ``loss`` is where the loss is computed:

    ``"outside"``  of the compiled model, from all its float outputs;
    ``"labels"``   inside the model, from ``labels`` with ignored targets;
    ``"function"`` in a compiled function that calls the model.
    """

    model: str
    arguments: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    loss: str = "outside"
    #: Gradient checkpointing, as the model's library turns it on.
    checkpoint: bool = False
    #: Ask for gradients of float inputs too.
    inputs: bool = True
    #: Sum the gradients of the parameters over the ranks by hand, as an outer reducer would.
    reduce: bool = False
    dynamic: bool | None = None

    def __str__(self) -> str:
        options = {k: v for k, v in self.options.items() if k != "plan"}
        shown = [*self.arguments.items(), *options.items(), ("loss", self.loss), ("checkpoint", self.checkpoint)]
        return f"{self.model}({', '.join(f'{k}={v}' for k, v in shown)})"


@dataclass
class Step:
    """What one rank saw."""

    loss_error: float
    #: Worst relative error of a gradient, and which.
    gradient_error: float
    worst: str
    #: Parameters and inputs with a gradient here and none on one process, or the other way round.
    mismatched: list[str]
    gradients: int
    compiles: int
    attentions: list[str]
    implicit: list[str]
    unsharded: list[str]
    warnings: list[str]
    #: Collectives that ran, forward and backward.
    forward: Counter[str]
    backward: Counter[str]
    #: Worst relative error of a parameter's gradient before ``reduce``.
    before_reduce: float


def _inputs(inputs: dict[str, Any], grad: bool) -> dict[str, Any]:
    """Copies; those that are arguments themselves (not parts of one, as rotary tables may be) ask for gradients."""

    def leaf(x: Any) -> Any:
        return x.detach().clone() if isinstance(x, Tensor) else x

    copies = tree_map(leaf, inputs)
    for x in copies.values():
        if isinstance(x, Tensor) and x.is_floating_point():
            x.requires_grad_(grad)
    return copies


def _labels(ids: Tensor) -> Tensor:
    """Targets of which the first two tokens, and every fifth, are ignored: the ranks count differently many."""
    labels = ids.clone()
    labels[:, :2] = -100
    labels[:, ::5] = -100
    return labels


def _loss(output: Any, target: Tensor | None = None) -> Tensor:
    """A loss in which every element of the output has a weight of its own."""
    if getattr(output, "loss", None) is not None:
        return output.loss
    x = models.first_tensor(output)
    weights = torch.linspace(-1, 1, x.numel()).view(x.shape)
    return (x * weights).sum() / 8 + (x**2).mean()


def _gradients(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor | None]:
    found = {name: p.grad for name, p in model.named_parameters()}
    found |= {f"input {name}": x.grad for name, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad}
    return {name: None if g is None else g.detach().clone() for name, g in found.items()}


def _worst(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> tuple[float, str]:
    """The largest relative error; a gradient that is zero but for rounding (a key's bias) counts by what is usual."""
    usual = max(g.norm().item() for g in expected.values() if g is not None)
    errors = []
    for name, g in expected.items():
        other = found[name]
        if g is not None and other is not None:
            errors.append((error_of(other, g) * g.norm().item() / max(g.norm().item(), 1e-2 * usual, 1e-30), name))
    return max(errors)


def _checkpointing(model: nn.Module) -> None:
    """As diffusers, transformers and older transformers call it."""
    if hasattr(model, "enable_gradient_checkpointing"):
        model.enable_gradient_checkpointing()
    else:
        name = "activation_checkpointing_enable"
        getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")({"use_reentrant": False})
    model.train()


def run_step(rank: int, size: int, case: StepCase) -> Step:
    """One step of ``case`` on this rank, and on one process."""
    return _run(case, on_this_rank)


def simulate_step(size: int, case: StepCase) -> Step:
    """The same on ``size`` ranks in this process: what each of them sees, as outputs and gradients are compared."""
    return _run(case, simulating(size))


def _run(case: StepCase, compiler_of: Callable[[dict[str, Any]], Compiler]) -> Step:
    model, made = build(case.model, case.arguments)
    if case.loss == "labels":
        made["labels"] = _labels(made["input_ids"])
    if case.checkpoint:
        _checkpointing(model)
    whole = copy.deepcopy(model)
    inputs, same = _inputs(made, case.inputs), _inputs(made, case.inputs)
    expected_loss = _loss(whole(**same))
    expected_loss.backward()
    expected = _gradients(whole, same)

    compiler = compiler_of(case.options)
    run: Callable[..., Tensor]
    if case.loss == "function":

        def step(**arguments: Any) -> Tensor:
            return _loss(model(**arguments))

        run = torch.compile(step, **compiler.arguments, dynamic=case.dynamic)
    else:
        fast = torch.compile(model, **compiler.arguments, dynamic=case.dynamic)

        def run(**arguments: Any) -> Tensor:
            return _loss(fast(**arguments))

    with recorded() as texts:
        loss = run(**inputs)
        loss.backward()
        for x in [*model.parameters(), *tree_leaves(inputs)]:
            if isinstance(x, Tensor):
                x.grad = None
        # Again, now that all is compiled, to see which collectives run.
        with compiler.collectives() as forward:
            loss = run(**inputs)
        with compiler.collectives() as backward:
            loss.backward()
    reports = compiler.reports()
    unreduced = _worst(_gradients(model, inputs), expected)[0]
    if case.reduce:
        for p in model.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad)
    found = _gradients(model, inputs)
    error, worst = _worst(found, expected)
    return Step(
        loss_error=error_of(loss, expected_loss),
        gradient_error=error,
        worst=worst,
        mismatched=[name for name in expected if (found[name] is None) != (expected[name] is None)],
        gradients=sum(g is not None for g in found.values()),
        compiles=len(reports),
        attentions=[a.method for report in reports for a in report.attentions],
        implicit=[str(g) for report in reports for g in report.implicit_gathers if g.kind == "implicit"],
        unsharded=[report.unsharded for report in reports if report.unsharded],
        warnings=texts,
        forward=forward,
        backward=backward,
        before_reduce=unreduced,
    )
