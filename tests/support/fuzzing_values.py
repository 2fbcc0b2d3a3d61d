"""What a random program computes on one device, and whether two results differ by more than rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fuzzing_cases import Case

__all__ = [
    "Values",
    "difference",
    "execute",
    "gradients_of_outputs",
    "is_ill_conditioned",
    "is_rounding",
    "wanted_gradients",
]

#: Largest relative error (of the largest element) by dtype.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


@dataclass
class Values:
    """What a run gives: outputs, inputs afterwards, gradients of inputs; by name."""

    outputs: list[torch.Tensor]
    written: list[torch.Tensor] = field(default_factory=list)
    gradients: list[torch.Tensor] = field(default_factory=list)

    def named(self) -> dict[str, torch.Tensor]:
        return {f"{what[:-1]} {i}": x for what, values in vars(self).items() for i, x in enumerate(values)}


def execute(case: Case, function: Callable[..., Any], *, mark: bool = False) -> Values:
    """The function on the case's inputs: outputs, inputs afterwards, gradients."""
    leaves = case.values()
    if not case.training:
        _mark(case, leaves, mark)
        with torch.no_grad():
            out = function(*leaves)
        return Values(list(out) if isinstance(out, tuple) else [out], leaves)
    for x in leaves:
        x.requires_grad_(x.is_floating_point())
    # A program may write to its inputs, which leaves must not see.
    values = [x.clone() for x in leaves]
    _mark(case, values, mark)
    out = function(*values)
    outputs = list(out) if isinstance(out, tuple) else [out]
    given = gradients_of_outputs(case, outputs)
    if not any(o.requires_grad for o in outputs):
        return Values(outputs, [v.detach() for v in values], [torch.zeros_like(x) for x in leaves if x.requires_grad])
    pairs = [(o, g) for o, g in zip(outputs, given, strict=True) if o.requires_grad]
    wanted = [x for x in leaves if x.requires_grad]
    grads = torch.autograd.grad(
        [o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True, materialize_grads=True
    )
    return Values([o.detach() for o in outputs], [v.detach() for v in values], list(grads))


def gradients_of_outputs(case: Case, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(case.seed)
    return [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]


def wanted_gradients(case: Case) -> tuple[list[torch.Tensor], Values]:
    expected = execute(case, case.function())
    return gradients_of_outputs(case, expected.outputs), expected


def _mark(case: Case, values: Sequence[torch.Tensor], mark: bool) -> None:
    for spec, value in zip(case.inputs, values, strict=True):
        for i, size in enumerate(spec.shape):
            if mark and isinstance(size, str):
                torch._dynamo.maybe_mark_dynamic(value, i)


def difference(got: torch.Tensor, want: torch.Tensor) -> str:
    """How two results differ by more than rounding, or ``""``."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"{got.dtype} {list(got.shape)} instead of {want.dtype} {list(want.shape)}"
    if not want.dtype.is_floating_point:
        return "" if torch.equal(got, want) else "other values"
    if not torch.equal(got.isnan(), want.isnan()):
        return f"NaN in {int(got.isnan().sum())} elements instead of {int(want.isnan().sum())} (a pad was used?)"
    if not torch.equal(got.isinf(), want.isinf()):
        return f"infinite in {int(got.isinf().sum())} elements instead of {int(want.isinf().sum())}"
    error, scale = _largest(got - want), _largest(want)
    # What is zero by cancellation has the rounding of what was cancelled.
    return "" if error <= TOLERANCE[want.dtype] * max(scale, 1e-2) else f"error {error:.3g} of {scale:.3g}"


def _largest(x: torch.Tensor) -> float:
    x = torch.where(x.isfinite(), x, 0.0)
    return float(x.abs().max()) if x.numel() else 0.0


def is_rounding(case: Case, name: str, got: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether the partitioned program is about as near to the exact result as the program itself is."""
    double = replace(case, double=True)
    exact = execute(double, double.function()).named()[name]
    if want.dtype != torch.float32 or got.shape != exact.shape or not torch.equal(got.isnan(), exact.isnan()):
        return False
    return _largest(got.double() - exact) <= 8 * _largest(want.double() - exact)


class _Noise(TorchDispatchMode):
    """Every operator, forward and backward, rounds a little differently (Monte Carlo arithmetic)."""

    def __init__(self, seed: int, relative: float) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)
        self.relative = relative

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(r.alias_info is not None for r in func._schema.returns):
            return result  # a view, or written in place
        return tree_map_only(torch.Tensor, self._nudged, result)

    def _nudged(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_floating_point():
            return x
        noise = torch.randn(x.shape, generator=self.generator, dtype=torch.float64)
        return x * (1 + self.relative * noise).to(x.dtype)


def is_ill_conditioned(case: Case, name: str, got: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether the program itself answers so differently if its operators round differently (a tie, say)."""
    if got.shape != want.shape:
        return False
    error, own = _largest(got - want), 0.0
    for seed in range(4):
        with _Noise(seed, 1e-15):
            other = execute(case, case.function()).named()[name]
        if not torch.equal(other.isnan(), want.isnan()) or not torch.equal(other.isinf(), want.isinf()):
            return True
        own = max(own, _largest(other - want))
    return torch.equal(got.isnan(), want.isnan()) and error <= 16 * own
