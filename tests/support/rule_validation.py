"""Brute-force validation of sharding rules: each operator against itself on shards.

For a sample call and every factor of its rule, the operands that have the factor are laid out with that factor split -
in one segment or two, beside a whole segment, as an inner or outer part of it, with pads or without - and the call goes
through *propagate*, *partition* and the simulator.  Outputs and gradients must be those of the call on whole operands,
pads may have any values, and the call must really run on shards: a rule that promises a factor and gathers is wrong
too.  A factor that must be whole is split all the same, and is to be gathered.

Many cases are parts of one program, because one large program is simulated faster than many.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.fx import Graph, GraphModule, Node

import fxsp.kernels.ops  # noqa: F401
from fxsp.errors import FxspError
from fxsp.passes.base import Program
from fxsp.passes.graph import facts, tensor_nodes
from fxsp.passes.partition.reshard import Converter
from fxsp.passes.pipeline import partition_program
from fxsp.passes.propagate import propagate
from fxsp.passes.rules.rule import Dims, OpRule
from fxsp.passes.rules.table import rule_of
from fxsp.types import Length, Partial, Ranks, Replicate, Segment, Sequence, Shard, Type, Used, product
from lockstep import gradients
from poisoning import simulate
from replicated import check_replicated

__all__ = ["Case", "Layout", "Sample", "T", "cases_of", "layouts", "problems", "rule_for", "whole_cases_of"]

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


@dataclass(frozen=True)
class Layout:
    """How a factor is split: its tokens are ``outer * sequence * inner`` inside it."""

    sequence: Sequence
    outer: int = 1
    inner: int = 1


@dataclass(frozen=True)
class Case:
    """A call with one factor of its rule split in one way.  With ``only``, one operand is laid out."""

    sample: Sample
    rule: OpRule
    #: Sizes of all factors.
    sizes: dict[str, Length]
    factor: str
    layout: Layout
    size: int
    only: int | None = None

    def __str__(self) -> str:
        layout, which = self.layout, "" if self.only is None else f", operand {self.only} alone"
        how = f"{self.factor} as {layout.outer}*{layout.sequence}*{layout.inner}"
        return f"{self.sample}: {self.rule}, {how}{which}, {self.size} ranks"

    @property
    def passes(self) -> bool:
        return self.factor not in self.rule.whole

    def place(self, dims: Dims | None) -> Shard | None:
        """The type of a tensor with these dimensions; None if it does not have the factor."""
        for d, factors in enumerate(dims or ()):
            if self.factor in factors:
                i = factors.index(self.factor)
                outer = product([*(self.sizes[f] for f in factors[:i]), self.layout.outer])
                inner = product([self.layout.inner, *(self.sizes[f] for f in factors[i + 1 :])])
                return Shard(d, self.layout.sequence, outer, inner)
        return None


def layouts(length: int) -> Iterator[Layout]:
    """Ways to split a factor of this size, the plain one first."""
    yield Layout(Sequence.of(length))
    if length > 1:
        first = max(1, length // 3)
        yield Layout(Sequence.of(first, length - first))
        yield Layout(Sequence((Segment(first, False), Segment(length - first))))
    part = next((p for p in (2, 3) if length % p == 0 and length > p), None)
    if part is None:
        return
    rest = length // part
    yield Layout(Sequence.of(rest), outer=part)
    if rest % part == 0:
        yield Layout(Sequence.of(rest // part), part, part)
    if rest > 1:
        yield Layout(Sequence((Segment(1, False), Segment(rest - 1))), inner=part)
    yield Layout(Sequence.of(rest), inner=part)


def cases_of(sample: Sample, size: int, *, thorough: bool = True) -> Iterator[Case]:
    """Every factor of the sample's rule in every layout (not ``thorough``: the plain one and one other)."""
    node, rule = rule_for(sample)
    if rule is None:
        return
    sizes = dict(rule.sizes)
    holders: dict[str, list[int]] = {}
    for i, (x, dims) in enumerate(zip(_operands(node), rule.operands, strict=True)):
        for n, factors in zip(x.meta["val"].shape, dims or [()] * x.meta["val"].dim(), strict=True):
            for f in factors:
                holders.setdefault(f, []).append(i)
                if len(factors) == 1:
                    sizes.setdefault(f, n)
    for factor, where in holders.items():
        found = list(layouts(int(sizes[factor])))
        if factor in rule.whole:
            found, where = found[:1], []
        for layout in found if thorough else dict.fromkeys((found[0], found[-1])):
            yield Case(sample, rule, sizes, factor, layout, size)
        for only in where if len(where) > 1 else ():
            yield Case(sample, rule, sizes, factor, found[-1], size, only)


def whole_cases_of(sample: Sample, size: int) -> Iterator[Case]:
    """Every dimension of every operand split, for a call without rule: all of them are to be gathered."""
    node, _ = rule_for(sample)
    shapes = [x.meta["val"].shape for x in _operands(node)]
    operands = tuple(tuple((f"x{i}_{d}",) for d in range(len(s))) for i, s in enumerate(shapes))
    sizes: dict[str, Length] = {f"x{i}_{d}": n for i, s in enumerate(shapes) for d, n in enumerate(s)}
    rule = OpRule(operands, (), sizes, whole=frozenset(sizes))
    for factor, n in sizes.items():
        yield Case(sample, rule, sizes, factor, list(layouts(int(n)))[-1], size)


def _operands(node: Node) -> list[Node]:
    return list(tensor_nodes((node.args, list(node.kwargs.values()))))


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


def rule_for(sample: Sample) -> tuple[Node, OpRule | None]:
    """The sample as a call on whole operands, and its rule."""
    node = Recorder().sample(sample)
    return node, rule_of(node)


@dataclass
class _Placed:
    """A case as a part of a program."""

    case: Case
    call: Node
    wanted: list[Type]
    #: Its outputs and inputs, by position.
    outputs: range
    inputs: range

    def decision_problem(self) -> str:
        """How the decision differs from what the rule promises."""
        if not self.case.passes:
            return ""
        decision, rule = facts(self.call).decision, self.case.rule
        for i, (want, got) in enumerate(zip(self.wanted, decision.operands, strict=True)):
            if rule.operands[i] is not None and not _same(want, got):
                return f"operand {i} is wanted as {got}, not {want}: {decision.reason or 'no reason given'}"
        for i, (dims, got) in enumerate(zip(rule.results, decision.results, strict=True)):
            want = self.case.place(dims) or (Partial() if self.case.factor in rule.reduction else None)
            want = Replicate() if self.case.factor in rule.combined else want
            # One token beside a size of 1: either of the two may be called the tokens.
            if (want is None or not _same(want, got)) and self.case.sizes[self.case.factor] != 1:
                return f"result {i} is {got}, not {want}"
        return ""


def _same(a: Type, b: Type) -> bool:
    return a.same_as(b) if isinstance(a, Shard) else type(a) is type(b)


def _add(recorder: Recorder, case: Case) -> _Placed:
    first_input, first_output = len(recorder.inputs), len(recorder.outputs)
    wanted: list[Type] = []

    def operand(i: int, x: Node) -> Node:
        type_ = case.place(case.rule.operands[i])
        wanted.append(type_ or Used())
        if type_ is None or case.only not in (None, i):
            return x
        laid = recorder.lay(x, type_)
        # An input itself is whole on every rank: what is combined would be found there, without any collective.
        return recorder.call(aten.clone.default, laid) if case.rule.combined else laid

    call = recorder.sample(case.sample, operand)
    values = call.meta["val"]
    if not case.sample.value:
        recorder.outputs.append(recorder.call(aten.zeros_like.default, call))
    elif isinstance(values, torch.Tensor):
        recorder.outputs.append(call)
    else:
        tensors = [i for i, v in enumerate(values) if isinstance(v, torch.Tensor)]
        recorder.outputs += [recorder.call(operator.getitem, call, i) for i in tensors]
    outputs, inputs = range(first_output, len(recorder.outputs)), range(first_input, len(recorder.inputs))
    return _Placed(case, call, wanted, outputs, inputs)


def problems(cases: list[Case], *, grads: bool = True) -> list[str]:
    """What is wrong with these cases (of one number of ranks): a line each; none if they are right."""
    recorder = Recorder()
    placed = [_add(recorder, case) for case in cases]
    size = cases[0].size
    program = Program(recorder.finish(), Ranks(0, size, "simulated"), training=grads)
    try:
        # Cheap operators on whole inputs would be computed again instead of gathered, and their shards never looked at.
        with (
            mock.patch.object(propagate, "_is_free", lambda node, type_: isinstance(type_, Replicate)),
            mock.patch.object(Converter, "_whole_for_free", return_value=False),
        ):
            gm = partition_program(program).gm
        found = _compare(recorder, gm, placed, size, grads)
    except (
        FxspError,
        RuntimeError,
        ValueError,
        TypeError,
        IndexError,
        KeyError,
        AssertionError,
        StopIteration,
    ) as error:
        if len(cases) == 1:
            return [f"{cases[0]}: {type(error).__name__}: {error}"]
        return [line for case in cases for line in problems([case], grads=grads)]
    return [line for p in placed for line in (p.decision_problem(),) if line for line in [f"{p.case}: {line}"]] + found


def _compare(recorder: Recorder, gm: GraphModule, placed: list[_Placed], size: int, grads: bool) -> list[str]:
    values = [x.meta["val"] for x in recorder.inputs]
    leaves = [i for i, x in enumerate(values) if x.requires_grad]
    wanted = [x.meta["val"] for x in recorder.outputs]
    count = len(wanted)
    given = [torch.randn(y.shape, generator=recorder.generator, dtype=torch.float64).to(y.dtype) for y in wanted]
    pairs = [(y, g) for y, g in zip(wanted, given, strict=True) if y.requires_grad]
    grads = bool(grads and pairs)
    if grads:
        wanted += torch.autograd.grad(
            [p[0] for p in pairs], [values[i] for i in leaves], [p[1] for p in pairs], materialize_grads=True
        )
    lines = []
    for poison in (False, True) if size == 2 else (True,):
        if grads:
            outputs, found = gradients(gm, size, values, given, poison_pads=poison)
            got = check_replicated([[*o, *g] for o, g in zip(outputs, found, strict=True)])
        else:
            got = check_replicated(simulate(gm, size, values, poison_pads=poison))
        for p in placed:
            places = [(f"output {i - p.outputs[0]}", i) for i in p.outputs]
            if grads:
                places += [
                    (f"gradient of operand {i - p.inputs[0]}", count + leaves.index(i)) for i in p.inputs if i in leaves
                ]
            single = any(wanted[i].dtype == torch.float32 for i in p.outputs)
            for what, i in places:
                problem = _difference(got[i], wanted[i].detach(), 1e-6 if single else 1e-9)
                if problem:
                    lines.append(f"{p.case}: {what}{' with other pads' * poison}: {problem}")
    return lines


def _difference(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> str:
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"{got.dtype} {list(got.shape)} instead of {want.dtype} {list(want.shape)}"
    if not (want.dtype.is_floating_point or want.dtype.is_complex):
        return "" if torch.equal(got, want) else f"{got.tolist()} instead of {want.tolist()}"
    if not torch.equal(got.isnan(), want.isnan()):
        return "NaN in other places"
    error = float((got - want).nan_to_num().abs().max()) if want.numel() else 0.0
    return "" if error <= tolerance * max(1.0, float(want.nan_to_num().abs().max())) else f"error {error:.3g}"
