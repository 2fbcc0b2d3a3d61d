"""Random small programs over tokens, as Python source, with a plan and a number of ranks: what the fuzz test runs.

A program is a list of lines; each instruction draws its operands with hypothesis and appends a line or a few.  So a
failure shrinks to few lines, and ``fuzzing.script`` prints a file that reproduces it::

    def program(x0, w1):
        x0 = annotate(x0, "shard", 1, -1, "x0")
        y1 = F.linear(x0, w1)
        y2 = y1 - y1.mean(1, keepdim=True)
        return y2
"""

from __future__ import annotations

import importlib
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from fuzzing_cases import Case, Input, Size

__all__ = ["INSTRUCTIONS", "SLOW", "Builder", "Var", "cases", "every_instruction", "finished", "instruction"]


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
    #: A token dimension -> its length as an expression of the sequences that inputs bring.
    expressions: dict[str, str] = field(default_factory=dict)
    #: A token dimension made by cat -> the dimensions it was made of.
    parts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    #: Whether the lines are the body of a checkpoint or the like.
    inside: bool = False
    #: Whether the program has what only Dynamo sees.
    dynamo: bool = False
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

    def canonical(self, seq: str | None = None) -> Var:
        """A value ``[B, S, C]``."""
        found = self.value(lambda v: len(v.dims) == 3 and self._canonical(v) and seq in (None, v.seq))
        assert found is not None, "the inputs are such values"
        return found

    @staticmethod
    def _canonical(v: Var) -> bool:
        return v.dims[0] == "B" and _is_seq(v.dims[1]) and v.dims[2] == "C"

    # sizes
    def size(self, dim: str) -> int:
        return math.prod(self.sizes[d] for d in dim.split("*"))

    def expression(self, dim: str) -> Size:
        """A size that follows the lengths of sequences."""
        if not any(map(_is_seq, dim.split("*"))):
            return self.size(dim)
        return " * ".join(f"({self.expressions[d]})" if _is_seq(d) else str(self.size(d)) for d in dim.split("*"))

    def sequence(self, length: int, expression: str = "", parts: tuple[str, ...] = ()) -> str:
        """A new token dimension; ``expression`` may name others (a base sequence has none)."""
        name = f"S{sum(1 for d in self.sizes if _is_seq(d))}"
        self.sizes[name] = length
        known = re.sub(r"S\d+", lambda m: f"({self.expressions[m[0]]})", expression)
        self.expressions[name] = known or name
        if parts:
            self.parts[name] = parts
        return name

    def length(self, seq: str) -> str:
        """Source of the length of a sequence: a value's size, or the number where no value has it."""
        v = self.value(lambda v: seq in v.dims)
        return f"{v.name}.shape[{v.at(seq)}]" if v is not None else str(self.size(seq))

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

    def input(self, dims: Sequence[str], kind: str = "normal", prefix: str = "w", bound: Size = 7) -> str:
        shape = tuple(self.expression(d) for d in dims)
        self.inputs.append(Input(self.fresh(prefix), shape, kind, bound))
        return self.inputs[-1].name


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
    "attention": 5,
    "concatenate": 3,
    "flatten": 2,
    "heads": 2,
    "in_place": 2,
    "linear": 2,
    "loss": 2,
    "permute": 2,
    "reduce_tokens": 2,
    "split": 2,
    "write_through_view": 2,
}
#: Instructions that need Dynamo, which takes long: drawn in one program of five.
SLOW = ("piece", "opaque", "write", "subclass")


def every_instruction() -> list[str]:
    """The names of all instructions."""
    for module in ("instructions", "instructions_tokens", "instructions_parts", "instructions_dynamo"):
        importlib.import_module(module)  # they fill INSTRUCTIONS
    return list(INSTRUCTIONS)


@st.composite
def cases(draw: st.DrawFn, first: str | None = None, max_instructions: int = 10) -> Case:
    """A program with one to three inputs of tokens, for 1 to 8 ranks and 1 to 4P + 1 tokens.

    ``first`` is its first instruction.
    """
    size = draw(st.sampled_from([2, 3, 4, 8, 5, 6, 7, 1]))
    h = draw(st.sampled_from([4, 1, 2, 3, 6, 8, size, 2 * size]))
    d = draw(st.sampled_from([2, 4, 1]))
    n = h * d if draw(st.integers(0, 4)) == 4 else draw(st.integers(1, 4 * size + 1))
    b = Builder(draw, {"1": 1, "B": draw(st.integers(1, 2)), "H": h, "D": d, "C": h * d})
    _add_tokens(b, b.sequence(n), ("shard", "shard", "text"))
    sequences = draw(st.sampled_from([1, 2, 3]))
    for _ in range(1, sequences):
        _add_tokens(b, b.sequence(draw(st.integers(1, 9))), ("shard", "text", "plain"))
    lengths = {name: b.sizes[name] for name in b.expressions}
    slow = first in SLOW or draw(st.integers(0, 4)) == 4
    names = [name for name in INSTRUCTIONS for _ in range(OFTEN.get(name, 1)) if slow or name not in SLOW]
    if slow:
        names += [name for name in SLOW for _ in range(5)]
    used: list[str] = []
    for i in range(draw(st.integers(1, max_instructions))):
        name = first if first is not None and i == 0 else b.pick(names)
        before = len(b.lines)
        INSTRUCTIONS[name](b)
        used += [name] if len(b.lines) > before else []
    return finished(
        b,
        draw,
        lengths,
        size,
        double=draw(st.integers(0, 3)) > 0,
        training=draw(st.booleans()),
        dynamic=draw(st.integers(0, 2)) == 2,
        dynamo=b.dynamo,
        seed=draw(st.integers(0, 9)),
        degrees=_degrees(draw, size) if "attention" in used else None,
        instructions=tuple(used),
    )


def _further_outputs(b: Builder, results: Sequence[str]) -> list[str]:
    """Names of values that are returned although others read them, as hidden states, keys and values are; mostly none.

    One may be returned twice.
    """
    read = [v.name for v in b.values if v.name not in results and v.name.startswith("y")]
    count = b.number(0, 4) - 2  # two programs of five
    return [b.pick(read) for _ in range(count)] if read and count > 0 else []


def finished(b: Builder, draw: st.DrawFn, lengths: dict[str, int], size: int, **facts: Any) -> Case:
    """The lines as a case: what nothing reads is returned, so that no line is dead; late values first."""
    text = "\n".join(b.lines)
    results = [v.name for v in reversed(b.values) if len(re.findall(rf"\b{v.name}\b", text)) == 1 or v is b.values[-1]]
    results += _further_outputs(b, results)
    body = "".join(f"    {line}\n" for line in [*b.lines, f"return {', '.join(results)}"])
    source = f"def program({', '.join(i.name for i in b.inputs)}):\n{body}"
    return Case(source, tuple(b.inputs), lengths, size, **facts)


def _degrees(draw: st.DrawFn, size: int) -> tuple[int, int] | None:
    """Degrees of attention that the user fixes, ``(ulysses, ring)``; mostly none."""
    if draw(st.integers(0, 2)) < 2:
        return None
    ulysses = draw(st.sampled_from([k for k in range(1, size + 1) if size % k == 0]))
    return ulysses, size // ulysses


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
