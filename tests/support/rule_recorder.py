"""Calls of operators on random operands, and programs that are written call by call."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

import fxsp.kernels.ops  # noqa: F401
from fxsp.passes.graph import tensor_nodes
from fxsp.types import Length, Segment, Sequence, Shard, product

__all__ = ["Recorder", "Sample", "T"]

aten = torch.ops.aten


@dataclass(frozen=True)
class T:
    """A random operand.

    ``kind``: ``normal``; ``unit`` (between 0.1 and 0.9); ``above`` (between 1.1 and 1.9); ``complex``; ``bool``;
    ``buffer`` (as ``unit``, without gradient); ``small`` (integers 1 to 5); ``index`` (integers below ``bound``);
    ``order`` (a permutation); ``ties`` (-1, 0 or 1, in floating point); and for products of quantized matrices,
    without gradient, ``int8``, ``float8`` (e4m3) and ``scale`` (fp32).
    """

    shape: tuple[int, ...]
    kind: str = "normal"
    bound: int = 1

    def draw(self, generator: torch.Generator) -> torch.Tensor:
        if self.kind in ("normal", "complex"):
            dtype = torch.float64 if self.kind == "normal" else torch.complex128
            return torch.randn(self.shape, generator=generator, dtype=dtype)
        if self.kind in ("unit", "above", "buffer"):
            low = 1.1 if self.kind == "above" else 0.1
            return torch.rand(self.shape, generator=generator, dtype=torch.float64) * 0.8 + low
        if self.kind == "ties":
            return torch.randint(-1, 2, self.shape, generator=generator).double()
        if self.kind == "bool":
            return torch.rand(self.shape, generator=generator) < 0.5
        if self.kind == "small":
            return torch.randint(1, 6, self.shape, generator=generator)
        if self.kind == "index":
            return torch.randint(0, self.bound, self.shape, generator=generator)
        if self.kind == "int8":
            return torch.randint(-128, 128, self.shape, generator=generator).to(torch.int8)
        if self.kind == "float8":
            return torch.randn(self.shape, generator=generator).to(torch.float8_e4m3fn)
        if self.kind == "scale":
            return torch.rand(self.shape, generator=generator) + 0.5
        assert self.kind == "order", self.kind
        return torch.randperm(int(product(self.shape)), generator=generator).view(self.shape)

    def __str__(self) -> str:
        return f"{self.kind}{list(self.shape)}"


@dataclass(frozen=True)
class Sample:
    """One call of an operator; operands are :class:`T`, everything else is passed as it is."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    #: Whether its floating operands require grad.
    grads: bool = True
    #: Whether its result has a value (``empty_like`` has not).
    value: bool = True

    def __str__(self) -> str:
        given = [_text(a) for a in self.args] + [f"{k}={_text(v)}" for k, v in self.kwargs.items()]
        return f"{self.op}({', '.join(given)})"


def _text(value: Any) -> str:
    return f"[{', '.join(map(_text, value))}]" if isinstance(value, (list, tuple)) else str(value)


class Recorder:
    """A program written call by call: the ``val`` of a node is its real, differentiable value."""

    def __init__(self, seed: int = 0) -> None:
        self.graph = Graph()
        self.generator = torch.Generator().manual_seed(seed)
        self.inputs: list[Node] = []
        self.outputs: list[Node] = []

    def input(self, spec: T, *, grads: bool = True) -> Node:
        value = spec.draw(self.generator)
        floating = value.dtype.is_floating_point or value.dtype.is_complex
        value.requires_grad_(grads and floating and spec.kind not in ("buffer", "float8", "scale"))
        where = self.inputs[-1] if self.inputs else None
        with self.graph.inserting_after(where):
            node = self.graph.placeholder(f"x{len(self.inputs)}")
        node.meta["val"] = value
        self.inputs.append(node)
        return node

    def call(self, op: Any, *args: Any, **kwargs: Any) -> Node:
        node = self.graph.call_function(op, args, kwargs)
        real_args, real_kwargs = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        node.meta["val"] = op(*real_args, **real_kwargs)
        return node

    def sample(self, sample: Sample, operand: Callable[[int, Node], Node] = lambda i, x: x) -> Node:
        """The call; ``operand(i, x)`` is what stands for its i-th operand ``x``."""
        given = _map((sample.args, sample.kwargs), lambda spec: self.input(spec, grads=sample.grads))
        nodes = tensor_nodes(list(_leaves(given)))
        swapped = iter([operand(i, x) for i, x in enumerate(nodes)])
        args, kwargs = torch.fx.map_arg(given, lambda _: next(swapped))
        return self.call(sample.op, *args, **kwargs)

    def lay(self, x: Node, type_: Shard) -> Node:
        """``x`` with this type, by annotations and views."""
        shape, dim = list(x.meta["val"].shape), type_.dim
        exposed, at = x, dim
        if not type_.plain:
            at += 1
            sizes = [*shape[:dim], type_.outer, type_.sequence.length, *shape[dim + 1 :]]
            exposed = self.call(aten.reshape.default, x, sizes)
        unit = type_.sequence.units[-1]
        tokens = type_.sequence.divided(unit)
        if tokens is None:
            unit, tokens = 1, type_.sequence
        # Cut by units, not into single ones: one unit beside a size of 1 could be either of the two.
        laid = self._joined(self._tokens(self._parted(exposed, at, unit), at, tokens), at, unit)
        return laid if type_.plain else self.call(aten.reshape.default, laid, shape)

    def _tokens(self, x: Node, dim: int, tokens: Sequence) -> Node:
        """``x`` with these segments along ``dim``; a whole one that is not alone in front is split by its ``cat``."""
        first, *rest = tokens.segments
        if not rest:
            return self._units(x, dim, first)
        if first.sharded or rest[0].unit != 1 or not all(s.sharded for s in rest):
            pieces = self._cut(x, dim, list(tokens.lengths))
            each = zip(pieces, tokens.segments, strict=True)
            return self.call(aten.cat.default, [self._units(p, dim, s) if s.sharded else p for p, s in each], dim)
        second, *others = rest
        if not others:
            return self._annotate(x, dim, first.length)
        front, *pieces = self._cut(x, dim, [first.length + second.length, *(s.length for s in others)])
        laid = [self._units(p, dim, s) for p, s in zip(pieces, others, strict=True)]
        return self.call(aten.cat.default, [self._annotate(front, dim, first.length), *laid], dim)

    def _cut(self, x: Node, dim: int, lengths: list[Length]) -> list[Node]:
        cut = self.call(aten.split_with_sizes.default, x, lengths, dim)
        return [self.call(operator.getitem, cut, i) for i in range(len(lengths))]

    def _units(self, x: Node, dim: int, segment: Segment) -> Node:
        """One split segment, by its units."""
        parted = self._parted(x, dim, segment.unit)
        return self._joined(self._annotate(parted, dim, -1), dim, segment.unit)

    def _parted(self, x: Node, dim: int, unit: Length) -> Node:
        return x if unit == 1 else self.call(aten.unflatten.int, x, dim, [-1, unit])

    def _joined(self, x: Node, dim: int, unit: Length) -> Node:
        return x if unit == 1 else self.call(aten.flatten.using_ints, x, dim, dim + 1)

    def _annotate(self, x: Node, dim: int, text: Length) -> Node:
        return self.call(torch.ops.fxsp.annotate.default, x, "shard", dim, text, "test")

    def finish(self) -> GraphModule:
        self.graph.output(tuple(self.outputs))
        return GraphModule({}, self.graph)


def _map(value: Any, f: Callable[[T], Node]) -> Any:
    if isinstance(value, T):
        return f(value)
    if isinstance(value, dict):
        return {k: _map(v, f) for k, v in value.items()}
    return type(value)(_map(v, f) for v in value) if isinstance(value, (list, tuple)) else value


def _leaves(given: Any) -> Iterator[Any]:
    args, kwargs = given
    yield from args
    yield from kwargs.values()
