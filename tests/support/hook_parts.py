"""Small models for the tests of hooks: one construct each, with the calls to try and what hooks should do.

Every case is a function that returns a :class:`Part`; :func:`run_part` runs it on every rank beside one process.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxsp import SequenceParallelConfig
from fxsp.hooks.sequence_parallel import apply_sequence_parallel, remove_sequence_parallel, report_of
from fxsp.torch_internals import plain_functions
from hook_parts_base import PARTS, Part
from running import error_of, recorded

# isort: off
# In the order of their tests.
import hook_parts_values  # noqa: F401
import hook_parts_modules  # noqa: F401
import hook_parts_sequences  # noqa: F401
import hook_parts_attention  # noqa: F401
# isort: on

__all__ = ["PARTS", "Part", "Seen", "run_part"]


@dataclass
class Seen:
    """What one rank saw: the worst errors, and what the hooks report."""

    error: float = 0.0
    gradient_error: float = 0.0
    attentions: list[str] = field(default_factory=list)
    implicit: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    #: Modules -> rows of their first argument on this rank, in the first call.
    tokens: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


# --- on the ranks -----------------------------------------------------------------------------------------------------


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in _tensors(item)] if isinstance(value, (list, tuple)) else []


def _leaves(value: Any) -> Any:
    """A copy whose floating point tensors want gradients."""
    if isinstance(value, Tensor):
        copied = value.clone()
        return copied.requires_grad_() if copied.is_floating_point() else copied
    if isinstance(value, dict):
        return {key: _leaves(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_leaves(item) for item in value])
    return value


def _run(model: nn.Module, args: Any, kwargs: Any) -> tuple[list[Tensor], list[Tensor | None]]:
    args, kwargs = _leaves(args), _leaves(kwargs)
    outputs = _tensors(model(*args, **kwargs))
    for parameter in model.parameters():
        parameter.grad = None
    weights = [torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape) for out in outputs]
    torch.stack([(out * w).sum() for out, w in zip(outputs, weights, strict=True)]).sum().backward()
    gradients = [t.grad for t in [*_tensors(args), *_tensors(kwargs), *model.parameters()]]
    return [out.detach() for out in outputs], gradients


def _watch(model: nn.Module, seen: dict[str, int], names: Sequence[str]) -> list[Any]:
    def note(name: str) -> Any:
        def look(_module: nn.Module, args: Any, kwargs: Any) -> None:
            with plain_functions():
                seen.setdefault(name, _tensors([args, kwargs])[0].shape[1])

        return look

    found = [(name, module) for name, module in model.named_modules() if name in names]
    return [module.register_forward_pre_hook(note(name), with_kwargs=True) for name, module in found]


def run_part(rank: int, size: int, name: str, degrees: tuple[int, int, int] | None = None) -> Seen:
    """Run a case on this rank, in float64."""
    torch.manual_seed(0)
    found = PARTS[name]()
    model = found.model.double()
    whole = copy.deepcopy(model)
    seen = Seen()
    config = None if degrees is None else SequenceParallelConfig(*degrees)
    apply_sequence_parallel(model, config, found.plan)
    watching = _watch(model, seen.tokens, list(found.tokens))
    with recorded() as seen.warnings:
        for args, kwargs in found.calls:
            args, kwargs = (_double(value) for value in (args, kwargs))
            ours, gradients = _run(model, args, kwargs)
            for handle in watching:  # of the first call
                handle.remove()
            theirs, expected = _run(whole, args, kwargs)
            assert len(ours) == len(theirs)
            for a, b in zip(ours, theirs, strict=True):
                assert a.shape == b.shape, f"{list(a.shape)} is {list(b.shape)} on one process"
                seen.error = max(seen.error, error_of(a, b))
            for a, b in zip(gradients, expected, strict=True):
                assert (a is None) == (b is None)
                if a is not None and b is not None:
                    seen.gradient_error = max(seen.gradient_error, float((a - b).norm() / (1 + b.norm())))
            report = report_of(model)
            seen.attentions += [record.method for record in report.attentions]
            seen.implicit += [str(record) for record in report.implicit_gathers]
            seen.notes += report.notes
    remove_sequence_parallel(model, found.plan)
    assert not any("_hook_registry" in vars(m) or "forward" in vars(m) for m in model.modules())
    return seen


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _double(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_double(item) for item in value])
    return value
