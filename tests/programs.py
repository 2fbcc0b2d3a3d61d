"""Random small programs over tokens, as Python source, with a plan and a number of ranks: what the fuzz test runs.

A program is a list of lines; each instruction below draws its operands with hypothesis and appends a line or a few.
So a failure shrinks to few lines, and :func:`script` prints a file that reproduces it::

    def program(x0, w1):
        x0 = annotate(x0, "shard", 1, -1, "x0")
        y1 = F.linear(x0, w1)
        y2 = y1 - y1.mean(1, keepdim=True)
        return y2
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

__all__ = ["Case", "Input", "cases", "script"]


@dataclass(frozen=True)
class Input:
    """One input: its shape, and how its values are drawn."""

    name: str
    shape: tuple[int, ...]
    #: ``normal``; ``ids`` (below 7); ``mask`` (bool, true in the first place of the last dimension); ``index``
    #: (positions below ``bound``).
    kind: str = "normal"
    bound: int = 7
    #: Its dimensions of tokens.
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Case:
    """A program, its inputs, and the ranks to split it over."""

    lines: tuple[str, ...]
    inputs: tuple[Input, ...]
    size: int
    double: bool = True
    #: Whether the numbers of tokens are symbols in the traced graph.
    dynamic: bool = False
    seed: int = 0
    #: The instructions that wrote the lines, for statistics.
    instructions: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        body = "\n".join(f"    {line}" for line in self.lines)
        return f"def program({', '.join(i.name for i in self.inputs)}):\n{body}\n"

    def function(self, annotate: Callable[..., torch.Tensor] | None = None) -> Callable[..., Any]:
        """The program; without ``annotate`` its annotations do nothing."""
        namespace: dict[str, Any] = {
            "torch": torch,
            "F": F,
            "math": math,
            "annotate": annotate or (lambda x, *_: x),
        }
        exec(compile(self.source, "<program>", "exec"), namespace)
        return namespace["program"]  # type: ignore[no-any-return]

    def values(self) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        return [self._value(spec, generator) for spec in self.inputs]

    def _value(self, spec: Input, generator: torch.Generator) -> torch.Tensor:
        if spec.kind in ("ids", "index"):
            return torch.randint(0, spec.bound, spec.shape, generator=generator)
        if spec.kind == "mask":
            mask = torch.rand(spec.shape, generator=generator) < 0.7
            mask[..., 0] = True
            return mask
        dtype = torch.float64 if self.double else torch.float32
        return torch.randn(spec.shape, generator=generator, dtype=torch.float64).to(dtype)

    def __repr__(self) -> str:
        inputs = ", ".join(f"{i.name}{list(i.shape)}{'' if i.kind == 'normal' else ' ' + i.kind}" for i in self.inputs)
        facts = f"{self.size} ranks, {'float64' if self.double else 'float32'}{', dynamic' if self.dynamic else ''}"
        return f"\n# {facts}; {inputs}\n{self.source}"


def script(case: Case) -> str:
    """A file that runs the case: ``python repro.py`` in ``tests``."""
    return f'''"""Reproduces a mismatch between a program and its partitioned form."""

from fuzzing import check
from programs import Case, Input

check(
    Case(
        lines={case.lines!r},
        inputs={case.inputs!r},
        size={case.size},
        double={case.double},
        dynamic={case.dynamic},
        seed={case.seed},
    )
)
'''


# --- the program while it is written ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Var:
    """A tensor of the program: dimensions by name.  ``S0``, ``S1``, ... are token dimensions."""

    name: str
    dims: tuple[str, ...]

    def at(self, dim: str) -> int:
        return self.dims.index(dim)

    @property
    def seq(self) -> str | None:
        """Its token dimension, if it is one of the value's dimensions."""
        return next((d for d in self.dims if _is_seq(d)), None)


def _is_seq(dim: str) -> bool:
    return dim[0] == "S" and dim[1:].isdigit()


@dataclass
class Builder:
    """Draws choices and writes lines."""

    draw: st.DrawFn
    sizes: dict[str, int]
    lines: list[str] = field(default_factory=list)
    inputs: list[Input] = field(default_factory=list)
    values: list[Var] = field(default_factory=list)
    #: A token dimension made by cat -> the dimensions it was made of.
    parts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    count: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    # choices
    def pick(self, options: Sequence[Any]) -> Any:
        return options[self.draw(st.integers(0, len(options) - 1))]

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def value(self, where: Callable[[Var], bool]) -> Var | None:
        """A value that satisfies ``where``; late ones first."""
        found = [v for v in reversed(self.values) if where(v)]
        return self.pick(found[:4]) if found else None

    def canonical(self, seq: str | None = None) -> Var | None:
        """A value ``[B, S, C]``."""
        return self.value(lambda v: len(v.dims) == 3 and self._canonical(v) and seq in (None, v.seq))

    @staticmethod
    def _canonical(v: Var) -> bool:
        return v.dims[0] == "B" and _is_seq(v.dims[1]) and v.dims[2] == "C"

    # sizes
    def size(self, dim: str) -> int:
        return math.prod(self.sizes[d] for d in dim.split("*"))

    def shape(self, dims: Sequence[str]) -> tuple[int, ...]:
        return tuple(self.size(d) for d in dims)

    def sequence(self, length: int, parts: tuple[str, ...] = ()) -> str:
        name = f"S{sum(1 for d in self.sizes if _is_seq(d))}"
        self.sizes[name] = length
        if parts:
            self.parts[name] = parts
        return name

    # lines
    def line(self, text: str) -> None:
        self.lines.append(text)

    def fresh(self, prefix: str = "y") -> str:
        return f"{prefix}{next(self.count)}"

    def let(self, expression: str, prefix: str = "t") -> str:
        """A line ``name = expression``; the name."""
        name = self.fresh(prefix)
        self.line(f"{name} = {expression}")
        return name

    def emit(self, expression: str, dims: Sequence[str]) -> Var:
        """A line that makes a value of the program."""
        var = Var(self.let(expression, "y"), tuple(dims))
        self.values.append(var)
        return var

    def input(self, dims: Sequence[str], kind: str = "normal", prefix: str = "w", bound: int = 7) -> str:
        tokens = tuple(i for i, d in enumerate(dims) if _is_seq(d))
        spec = Input(self.fresh(prefix), self.shape(dims), kind, bound, tokens)
        self.inputs.append(spec)
        return spec.name


Instruction = Callable[[Builder], Any]
INSTRUCTIONS: dict[str, Instruction] = {}


def instruction(function: Instruction) -> Instruction:
    """Register an instruction.  It returns without a line where nothing fits."""
    INSTRUCTIONS[function.__name__] = function
    return function


# --- whole cases -----------------------------------------------------------------------------------------------------


#: Instructions that are drawn more often than once.
OFTEN = {
    "annotated": 3,
    "attention": 4,
    "concatenate": 2,
    "flatten": 2,
    "heads": 2,
    "in_place": 2,
    "linear": 2,
    "permute": 2,
    "reduce_tokens": 2,
    "split": 2,
}


@st.composite
def cases(draw: st.DrawFn, max_instructions: int = 10, only: tuple[str, ...] | None = None) -> Case:
    """A program with one or two inputs of tokens, for 1 to 8 ranks and 1 to 4P + 1 tokens."""
    import instructions  # noqa: F401  (fills INSTRUCTIONS)

    size = draw(st.sampled_from([2, 3, 4, 8, 5, 6, 7, 1]))
    h = draw(st.sampled_from([4, 1, 2, 3, 6, 8, size, 2 * size]))
    d = draw(st.sampled_from([2, 4, 1]))
    n = h * d if draw(st.integers(0, 4)) == 4 else draw(st.integers(1, 4 * size + 1))
    b = Builder(draw, {"1": 1, "B": draw(st.integers(1, 2)), "H": h, "D": d, "C": h * d, "S0": n})
    _add_tokens(b, "S0", ("shard", "shard", "text"))
    if draw(st.booleans()):
        b.sizes["S1"] = draw(st.integers(1, 9))
        _add_tokens(b, "S1", ("shard", "text", "plain"))
    names = [name for name in only or INSTRUCTIONS for _ in range(OFTEN.get(name, 1))]
    used = []
    for _ in range(draw(st.integers(1, max_instructions))):
        name = b.pick(names)
        before = len(b.lines)
        INSTRUCTIONS[name](b)
        used += [name] if len(b.lines) > before else []
    # What nothing reads is returned, so that no line is dead; late values first.
    text = "\n".join(b.lines)
    results = [v.name for v in reversed(b.values) if len(re.findall(rf"\b{v.name}\b", text)) == 1 or v is b.values[-1]]
    b.line(f"return {', '.join(results)}")
    return Case(
        tuple(b.lines),
        tuple(b.inputs),
        size,
        double=draw(st.integers(0, 3)) > 0,
        dynamic=draw(st.integers(0, 2)) == 2,
        seed=draw(st.integers(0, 9)),
        instructions=tuple(used),
    )


def _add_tokens(b: Builder, seq: str, ways: Sequence[str]) -> None:
    """An input ``[B, S, C]``, with its line of the plan."""
    x = b.input(("B", seq, "C"), prefix="x")
    how = b.pick(ways)
    if how == "text" and b.size(seq) > 1:
        b.line(f'{x} = annotate({x}, "shard", 1, {b.number(1, b.size(seq) - 1)}, "{x}")')
    elif how != "plain":
        b.line(f'{x} = annotate({x}, "shard", 1, -1, "{x}")')
    b.values.append(Var(x, ("B", seq, "C")))
    if how != "plain" and b.number(0, 2) < 2:
        # What is computed from inputs by cheap operators alone is computed whole: give the shards some work.
        b.emit(f"F.linear({x}, {b.input(('C', 'C'))}) / {math.sqrt(b.size('C')):.4g}", ("B", seq, "C"))
