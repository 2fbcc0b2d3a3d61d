"""One program run on copies of its inputs, and two such runs compared: outputs, inputs that it wrote to, gradients.

``fxsp.verify`` compares simulated ranks with the untouched graph in this way, and ``options={"verify": True}`` the real
ranks.  Gradients are those of all inputs that require one, for random gradients of the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fxsp.kernels.op import same_memory
from fxsp.simulation.joint import differentiate
from fxsp.torch_internals import is_wrapper_subclass, storage_key, version

__all__ = [
    "Difference",
    "Ran",
    "accepted",
    "copy_of",
    "differences",
    "random_seeds",
    "relative_error",
    "run_once",
    "same_random_numbers",
]

#: Largest relative error (in the 2-norm) that ``verify`` accepts, by dtype; other dtypes must be equal.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def accepted(*values: Any) -> float:
    """The largest relative error that is accepted of any of these values; what is no tensor counts for nothing."""
    return max((_TOLERANCE.get(x.dtype, 0.0) for x in values if isinstance(x, Tensor)), default=0.0)


def relative_error(found: Tensor, expected: Tensor, usual: float = 0.0) -> float:
    """``|found - expected| / |expected|`` in the 2-norm, in float64 (0 if both are zero).

    Infinities of one sign, and NaN beside NaN, are equal; beside anything else they are an infinite error.  Where
    ``expected`` is smaller than a hundredth of the norm ``usual``, the difference is divided by that instead: a
    gradient that is zero but for rounding (of a bias before a softmax, say) has no relative error of its own.
    """
    if not (expected.is_floating_point() or expected.is_complex()):
        return float((found != expected).any())
    wide = torch.complex128 if expected.is_complex() else torch.float64
    a, b = found.detach().to(wide), expected.detach().to(wide)
    same = (a == b) | (a.isnan() & b.isnan())
    if not bool((same | (a.isfinite() & b.isfinite())).all()):
        return math.inf
    difference = (a - b).masked_fill(same, 0).norm().item()
    scale = max(b.masked_fill(~b.isfinite(), 0).norm().item(), 1e-2 * usual)
    return float(difference / scale if scale else difference)


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Random numbers are drawn as if what runs inside had not drawn any."""
    with torch.random.fork_rng(list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []):
        yield


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
class Ran:
    """What one program gave for copies of the inputs."""

    outputs: list[Tensor]
    #: The inputs as it left them, and which of them it wrote to.
    inputs: Sequence[Any] = ()
    written: list[bool] = field(default_factory=list)
    #: Of each input that requires grad, by its position; None: the program does not use it.
    gradients: dict[int, Tensor | None] = field(default_factory=dict)
    #: The gradients that the outputs (those that are no tensors among them) were given.
    seeds: list[Tensor | None] = field(default_factory=list)


def run_once(function: Callable[..., Any], args: Sequence[Any], *, gradients: bool) -> Ran:
    """Run ``function`` on copies of ``args``; random numbers are drawn as if it had not drawn any."""
    with torch.set_grad_enabled(gradients), same_random_numbers():
        leaves = [copy_of(x, gradients) for x in args]
        # A graph may write to its inputs, and autograd lets no one write to a leaf.
        values = [_through(x) if isinstance(x, Tensor) and x.requires_grad else x for x in leaves]
        before = [_state(x) for x in values]
        alive = [x.detach() for x in values if isinstance(x, Tensor)]  # so that no other memory gets a key of theirs
        flat = tree_leaves(function(*values))
        written = [_state(x) != state for x, state in zip(values, before, strict=True)]
        del alive
        ran = Ran([x.detach() for x in flat if isinstance(x, Tensor)], values, written)
        if gradients:
            ran.seeds = random_seeds(flat)
            wanted = {i: x for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad}
            ran.gradients = dict(zip(wanted, differentiate(flat, ran.seeds, list(wanted.values())), strict=True))
    return ran


def copy_of(x: Any, gradients: bool) -> Any:
    """A copy of a tensor, without its history (of one made of others, which nothing writes to, another name)."""
    if not isinstance(x, Tensor):
        return x
    copy = x.detach() if is_wrapper_subclass(x) else same_memory(x.detach())
    return copy.requires_grad_(gradients and x.requires_grad)


def _through(x: Tensor) -> Tensor:
    """A value of its own memory whose gradient is that of ``x``, in the layout of ``x``."""
    if is_wrapper_subclass(x):
        return x
    if any(s == 0 and n > 1 for n, s in zip(x.shape, x.stride(), strict=True)):
        return x.view_as(x)  # expanded: nobody may write to it
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def _state(x: Any) -> tuple[int, int]:
    """What changes when a tensor is written to, or gets other memory."""
    return (version(x), storage_key(x)) if isinstance(x, Tensor) else (0, 0)


@dataclass(frozen=True)
class Difference:
    """One value of two runs: its relative error, and how large an error is accepted."""

    #: ``"output"``, ``"written"`` (an input, after the call) or ``"gradient"``.
    kind: str
    what: str
    error: float
    accepted: float


def differences(found: Sequence[Ran], wanted: Ran, names: Sequence[str]) -> list[Difference]:
    """All that two programs may differ in, the worst of the runs ``found``; ``names`` are those of the inputs.

    Outputs come first, then inputs that ``wanted`` wrote to (where ``found`` has them), then gradients.  A gradient
    that one program has and the other has not is compared with zeros.
    """
    made: list[Difference] = []

    def add(kind: str, what: str, values: Sequence[Tensor], expected: Tensor, usual: float = 0.0) -> None:
        error = max(relative_error(x, expected, usual) for x in values)
        made.append(Difference(kind, what, error, accepted(expected)))

    for i, (expected, *values) in enumerate(zip(wanted.outputs, *(ran.outputs for ran in found), strict=True)):
        add("output", f"output {i}", values, expected)
    for i in [i for i, written in enumerate(wanted.written) if written]:
        add("written", f"{names[i]} after the call", [ran.inputs[i] for ran in found], wanted.inputs[i])
    usual = max((g.norm().item() for g in wanted.gradients.values() if g is not None), default=0.0)
    for i, gradient in wanted.gradients.items():
        theirs = [ran.gradients[i] for ran in found]
        some = next((g for g in (gradient, *theirs) if g is not None), None)
        if some is not None:
            want, *got = (torch.zeros_like(some) if g is None else g for g in (gradient, *theirs))
            add("gradient", f"the gradient of {names[i]}", got, want, usual)
    return made
