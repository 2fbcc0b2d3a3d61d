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
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from torch.fx import GraphModule, Node

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
from rule_recorder import Recorder, Sample

__all__ = ["Case", "Layout", "cases_of", "layouts", "problems", "rule_for", "whole_cases_of"]

aten = torch.ops.aten


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
