"""A random program as Python source, with its inputs, lengths and ranks; and as a file that checks it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from subclasses import Dispatching

__all__ = ["Case", "Input", "NotAProgram", "Refused", "Size", "script"]

#: A dimension: a number, or an expression of the lengths of the sequences, ``"S0 + S1"``.
Size = int | str


class Own(torch.autograd.Function):
    """The cumulative sum over tokens, with a gradient that is not its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.cumsum(1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 3 * grad * torch.tanh(x)


@torch._dynamo.disable
def _eagerly(function: Callable[..., Any], *args: Any) -> Any:
    """A call that no graph has."""
    return function(*args)


class NotAProgram(Exception):  # noqa: N818
    """The program itself fails: a write that autograd forbids, say."""


class Refused(Exception):  # noqa: N818
    """The program cannot be normalized: it would run whole, with a warning."""


@dataclass(frozen=True)
class Input:
    """One input: its shape, and how its values are drawn."""

    name: str
    shape: tuple[Size, ...]
    #: ``normal``; ``ids`` (below ``bound``); ``targets`` (the same, some of them -100, never the last two of the
    #: last dimension); ``mask`` (bool, true in the first place of the last dimension); ``blocked`` (bool, false in
    #: whole rows, and in the first places of others); ``index`` (as ``ids``); ``order`` (a permutation).
    kind: str = "normal"
    bound: Size = 7

    def __str__(self) -> str:
        return f"{self.name}[{', '.join(map(str, self.shape))}]{'' if self.kind == 'normal' else ' ' + self.kind}"


@dataclass(frozen=True)
class Case:
    """A program, its inputs, and the ranks to split it over."""

    source: str
    inputs: tuple[Input, ...]
    #: Length of each sequence that inputs bring.
    lengths: dict[str, int]
    #: Number of ranks.
    size: int
    double: bool = True
    #: Compare gradients too (of all floating inputs).
    training: bool = False
    #: Whether lengths are symbols in the traced graph; then other lengths are tried as well.
    dynamic: bool = False
    #: Trace with Dynamo, which sees checkpoints and grad modes, and not with ``make_fx``.
    dynamo: bool = False
    #: Degrees ``(ulysses, ring)`` that the user fixes.
    degrees: tuple[int, int] | None = None
    seed: int = 0
    #: Without the annotations in the program: what is split is found, whether it pays or not.
    infer: bool = False
    #: The instructions that wrote the program, for statistics.
    instructions: tuple[str, ...] = ()

    def function(self, annotate: Callable[..., torch.Tensor] | None = None) -> Callable[..., Any]:
        """The program; without ``annotate`` its annotations and checkpoints do nothing."""
        namespace: dict[str, Any] = {
            "torch": torch,
            "F": F,
            "math": math,
            "annotate": annotate or (lambda x, *_: x),
            "Own": Own,
            "eager": _eagerly if annotate else (lambda f, *args: f(*args)),
            "QUANTIZED": {n: self._quantized(n) for n in map(int, re.findall(r"QUANTIZED\[(\d+)\]", self.source))},
            "checkpoint": checkpoint if annotate else (lambda f, *args, **_: f(*args)),
        }
        exec(compile(self.source, "<program>", "exec"), namespace)
        return namespace["program"]  # type: ignore[no-any-return]

    def _quantized(self, width: int) -> torch.Tensor:
        """A weight that is a tensor subclass."""
        dtype = torch.float64 if self.double else torch.float32
        generator = torch.Generator().manual_seed(width)
        return Dispatching.of(torch.randn(width, width, generator=generator, dtype=torch.float64).to(dtype))

    def values(self) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        return [self._value(spec, generator) for spec in self.inputs]

    def _number(self, size: Size) -> int:
        return size if isinstance(size, int) else int(eval(size, {}, self.lengths))

    def shape(self, spec: Input) -> tuple[int, ...]:
        return tuple(map(self._number, spec.shape))

    def _value(self, spec: Input, generator: torch.Generator) -> torch.Tensor:
        shape = self.shape(spec)
        if spec.kind in ("ids", "index", "targets"):
            ids = torch.randint(0, max(self._number(spec.bound), 1), shape, generator=generator)
            if spec.kind == "targets":
                ignored = torch.rand(shape, generator=generator) < 0.4
                ignored[..., -2:] = False
                ids[ignored] = -100
            return ids
        if spec.kind == "order":
            return torch.randperm(math.prod(shape), generator=generator).view(shape)
        if spec.kind == "mask":
            mask = torch.rand(shape, generator=generator) < 0.7
            mask[..., :1] = True
            return mask
        if spec.kind == "blocked":
            first = torch.randint(0, shape[-1] + 1, (*shape[:-1], 1), generator=generator)
            rows = torch.rand((*shape[:-1], 1), generator=generator) < 0.7
            return (torch.arange(shape[-1]) >= first) & rows & (torch.rand(shape, generator=generator) < 0.9)
        dtype = torch.float64 if self.double else torch.float32
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def __repr__(self) -> str:
        facts = [f"{self.size} ranks", "float64" if self.double else "float32"]
        facts += [name for name in ("training", "dynamic", "dynamo") if getattr(self, name)]
        facts += [f"degrees {self.degrees}"] if self.degrees else []
        facts += [f"{name} = {n}" for name, n in self.lengths.items()]
        return f"\n# {', '.join(facts)}; {', '.join(map(str, self.inputs))}\n{self.source}"


def script(case: Case) -> str:
    """A file that runs the case, wherever it lies, in the environment that fxsp is installed in."""
    inputs = "".join(f"            {spec!r},\n" for spec in case.inputs)
    return f'''"""A program that computes something else once it is split over {case.size} ranks."""

import sys
from pathlib import Path

import fxsp

sys.path.insert(0, str(Path(fxsp.__file__).parents[1] / "tests" / "support"))

from fuzzing import Case, Input, check

PROGRAM = """
{case.source}"""

check(
    Case(
        PROGRAM,
        inputs=(
{inputs}        ),
        lengths={case.lengths!r},
        size={case.size},
        double={case.double},
        training={case.training},
        dynamic={case.dynamic},
        dynamo={case.dynamo},
        degrees={case.degrees},
        infer={case.infer},
        seed={case.seed},
    )
)
print("the partitioned program computes the same")
'''
