"""Are two tensors the same, here, and are the inputs equal on all ranks?

``options={"check_inputs": True}`` compares fingerprints of all inputs at every call (each parameter once):
two 64-bit sums per tensor, and one all-gather of four numbers while they agree.  It synchronizes with the host, and is
not on by default.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fxsp.errors import InputMismatchError
from fxsp.types import Ranks

__all__ = ["TOLERANCE", "check_inputs", "fingerprint", "relative_error", "same_random_numbers"]

#: Largest relative error (in the 2-norm) that ``verify`` accepts, by dtype.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def fingerprint(value: Any) -> list[int]:
    """Two 64-bit numbers that differ, almost certainly, when dtype, shape or any bit of ``value`` differs."""
    if not isinstance(value, Tensor):
        return [_stable((value,)), 0]
    shape = _stable((str(value.dtype), *value.shape))
    flat = value.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
    pad = -flat.numel() % 8
    words = torch.nn.functional.pad(flat, (0, pad)).view(torch.int64)
    weights = torch.arange(1, words.numel() + 1, device=words.device)
    return [shape ^ (int(words.sum()) % 2**62), int((words * weights).sum())]


def _stable(parts: tuple[Any, ...]) -> int:
    """A hash that is the same in every process."""
    result = 1469598103934665603
    for byte in repr(parts).encode():
        result = ((result ^ byte) * 1099511628211) % 2**62
    return result


def check_inputs(run: Callable[..., Any], names: Sequence[str], ranks: Ranks, group: Any) -> Callable[..., Any]:
    """``run``, but raising :class:`InputMismatchError` on every rank if an input differs between ranks."""
    # One graph may serve several instances of a model: each has parameters of its own.
    checked_parameters = WeakIdKeyDictionary()

    def checked(*args: Any) -> Any:
        picked = [(n, a) for n, a in zip(names, args, strict=True) if a not in checked_parameters]
        for _, value in picked:
            if isinstance(value, torch.nn.Parameter):
                checked_parameters[value] = None
        mine = torch.tensor([fingerprint(a) for _, a in picked], dtype=torch.int64).view(-1, 2)
        device = next((a.device for _, a in picked if isinstance(a, Tensor)), torch.device("cpu"))
        # An input of another shape may mean another graph, with other inputs: first whether there is one list of them.
        kinds = _stable(tuple(name for name, _ in picked))
        heads = _from_all(torch.tensor([len(picked), kinds, *fingerprint(mine)]), device, ranks, group)
        if all(torch.equal(head, heads[0]) for head in heads):
            return run(*args)
        if not all(torch.equal(head[:2], heads[0][:2]) for head in heads):
            others = [r for r in range(ranks.size) if not torch.equal(heads[r][:2], heads[0][:2])]
            shapes = ", ".join(f"{n} {list(a.shape)}" for n, a in picked if _is_data(a))
            raise InputMismatchError(
                f"ranks {others} run another graph than rank 0, so the shapes of their inputs, or values that are no "
                f"tensors, differ. On rank {ranks.rank}: {shapes}. Every rank must call the model with the same inputs."
            )
        everyone = _from_all(mine, device, ranks, group)
        for row, (name, value) in enumerate(picked):
            others = [r for r in range(ranks.size) if not torch.equal(everyone[r][row], everyone[0][row])]
            if others:
                shape = list(value.shape) if isinstance(value, Tensor) else value
                raise InputMismatchError(
                    f"input {name} ({shape} on rank {ranks.rank}) differs between rank 0 and ranks {others}. Every "
                    "rank must call the model with the same inputs: seed random inputs alike, or broadcast them."
                )
        raise InputMismatchError("the inputs of the ranks differ")

    return checked


def _from_all(mine: Tensor, device: torch.device, ranks: Ranks, group: Any) -> list[Tensor]:
    """``mine`` of every rank, on the CPU."""
    everyone = [torch.empty_like(mine, device=device) for _ in range(ranks.size)]
    dist.all_gather(everyone, mine.to(device), group=group)
    return [other.cpu() for other in everyone]


def _is_data(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter)


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
