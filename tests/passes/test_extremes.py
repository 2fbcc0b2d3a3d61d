"""Maxima, any and all, positions, norms over split tokens: one device's results, and no token is gathered."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import fxsp
from fxsp.kernels import extremes
from fxsp.kernels.extremes import travels_as
from fxsp.passes.builder import Builder
from fxsp.passes.emit.emit import emit
from fxsp.passes.special import extremes as written
from replicated import check_replicated
from rule_recorder import Sample, T
from rule_validation import cases_of, problems
from tracing import check, collectives, partition, shard
from with_grads import simulate_with_grads

aten = torch.ops.aten
Function = Callable[[Tensor], Any]


def model(reduce: Function, text: int = -1) -> Callable[[Tensor, Tensor], Any]:
    """A reduction of tokens that no rank has whole: a projection stands before it."""
    return lambda x, w: reduce(F.linear(shard(x, 1, text), w))


def inputs(length: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, length, 4, dtype=dtype), torch.eye(4, dtype=dtype)


def rounded(y: Tensor) -> Tensor:
    """Values with many ties, and the gradient of ``y``."""
    return y - (y - y.round()).detach()


#: A reduction, how many all-reduces of maxima and of sums it costs, and the bytes of all on two ranks (fp64).
FLOATING: dict[str, tuple[Function, int, int, int]] = {
    "amax": (lambda y: y.amax(1), 1, 0, 64),
    "amax of ties": (lambda y: rounded(y).amax(1, keepdim=True), 1, 0, 64),
    "amax of all": (lambda y: rounded(y).amax(), 1, 0, 8),
    "amin of two dimensions": (lambda y: y.amin((0, 1)), 1, 0, 32),
    "max": (lambda y: y.max(), 1, 0, 8),
    "max of ties": (lambda y: rounded(y).max(), 1, 0, 8),
    "min": (lambda y: rounded(y).min(), 1, 0, 8),
    "max along": (lambda y: tuple(rounded(y).max(1)), 2, 0, 128),
    "min along": (lambda y: tuple(y.min(1, keepdim=True)), 2, 0, 128),
    "argmax": (lambda y: (rounded(y).argmax(1), y * 1), 2, 0, 128),
    "argmin of all": (lambda y: (rounded(y).argmin(), y * 1), 2, 0, 16),
    "aminmax": (lambda y: tuple(torch.aminmax(rounded(y), dim=1)), 2, 0, 128),
    "logsumexp": (lambda y: y.logsumexp(1), 1, 1, 128),
    "norm": (lambda y: y.norm(dim=1), 0, 1, 64),
    "norm of order one": (lambda y: torch.linalg.vector_norm(y, 1, (1, 2)), 0, 1, 16),
    "norm of infinite order": (lambda y: torch.linalg.vector_norm(y, torch.inf, 1), 1, 0, 64),
    "of a flattened dimension": (lambda y: tuple(rounded(y).flatten(0, 1).max(0)), 2, 0, 64),
    "of tokens within a dimension": (lambda y: rounded(y).transpose(0, 1).flatten(0, 1).amax(0), 1, 0, 32),
    "any": (lambda y: ((y > 1.5).any(), y * 1), 1, 0, 1),
    "all along": (lambda y: ((y < 1).all(1), y * 1), 1, 0, 8),
    "isnan": (lambda y: (y.isnan().any(), y * 1), 1, 0, 1),
    "scale of a quantization": (lambda y: (y / (y.detach().abs().amax() / 127)).round(), 1, 0, 8),
}


def reduced(program: Any) -> tuple[int, int, int]:
    records = [r for r in program.report.collectives if r.kind == "all_reduce"]
    counts = collectives(program)
    return counts.get("all_reduce_extreme", 0), counts.get("all_reduce", 0), sum(r.bytes for r in records)


@pytest.mark.parametrize("name", FLOATING)
@pytest.mark.parametrize(("length", "size"), [(5, 2), (2, 4), (17, 8)])
def test_values_gradients_and_what_is_sent(name: str, length: int, size: int) -> None:
    reduce, combined, sums, sent = FLOATING[name]
    program = check(model(reduce), *inputs(length), size=size)
    assert not [g for g in program.report.implicit_gathers if g.kind == "implicit"]
    found = reduced(program)
    assert found[:2] == (combined, sums)
    if size == 2:
        assert found[2] == sent


@pytest.mark.parametrize("name", ["amax of ties", "max of ties", "max along", "logsumexp", "norm", "any"])
@pytest.mark.parametrize("text", [1, 3])
def test_rows_that_every_rank_has_count_once(name: str, text: int) -> None:
    check(model(FLOATING[name][0], text), *inputs(7), size=3)


@pytest.mark.parametrize("name", FLOATING)
def test_one_device_without_an_annotation_has_no_collective(name: str) -> None:
    """What is whole for nothing stays whole: no all-reduce where there is nothing to combine."""
    program = partition(lambda x, w: FLOATING[name][0](shard(x) * 2), *inputs(), size=2)
    assert reduced(program)[:2] == (0, 0)


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8]
OF_ANY: dict[str, Function] = {
    "amax": lambda y: y.amax(1),
    "amin": lambda y: y.amin(),
    "max": lambda y: tuple(y.max(1)),
    "any": lambda y: y.any(),
    "all": lambda y: y.all(1),
    "argmin": lambda y: y.argmin(),
}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool], ids=str)
def test_of_any_dtype(dtype: torch.dtype) -> None:
    def function(x: Tensor, w: Tensor) -> Any:
        y = (F.linear(shard(x), w) * 3).to(dtype)
        found = [reduce(y) for reduce in OF_ANY.values() if dtype != torch.bool or reduce is not OF_ANY["argmin"]]
        return tuple(r for f in found for r in (f if isinstance(f, tuple) else (f,)))

    x, w = inputs(7)
    program = check(function, x.abs() if dtype == torch.uint8 else x, w, size=4, training=False)
    assert not [g for g in program.report.implicit_gathers if g.kind == "implicit"]


def test_halves_travel_as_wide_as_they_are_compared() -> None:
    x, w = inputs(dtype=torch.bfloat16)
    program = partition(model(lambda y: y.amax(1)), x, w, size=2)
    (record,) = program.report.collectives
    assert (record.kind, record.bytes) == ("all_reduce", 2 * 4 * 4)


@pytest.mark.parametrize("where", [0, 3, 6])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_so(value: float, where: int) -> None:
    def function(x: Tensor, w: Tensor) -> Any:
        y = torch.where(F.linear(shard(x), w) == 9, value, F.linear(shard(x), w))
        return y.amax(1), y.amin(), *y.max(1), *y.min(1), y.argmax(1), y.max(), y.isfinite().all(), y.logsumexp(1)

    x, w = inputs(7)
    x[0, where, 1] = 9
    check(function, x, w, size=3, training=False)


def test_nothing_but_the_least_there_is() -> None:
    """Ranks of pads only do not take part in where the first one is."""
    check(
        model(lambda y: tuple((y * 0 - torch.inf).nan_to_num(nan=-torch.inf).max(1))),
        *inputs(2),
        size=4,
        training=False,
    )


def test_symbolic_lengths_are_one_graph() -> None:
    torch.manual_seed(0)
    block = nn.Linear(4, 4)
    plan = {"": {"input": fxsp.SequenceParallelInput(1)}}

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            y = self.block(input)
            y = y / y.abs().amax((1, 2), keepdim=True)
            return torch.where(y.isinf().any(), y.clamp(-1, 1), y) + y.max(1, keepdim=True).values

    evidence = [fxsp.verify(Scaled(), torch.randn(2, n, 4), world_size=(2, 3), options={"plan": plan}) for n in (7, 12)]
    assert all(e.ok for e in evidence), evidence


@pytest.mark.parametrize("size", [2, 3])
def test_the_registered_derivatives_are_those_of_the_simulation(size: int) -> None:
    for name in ("amax of ties", "max along", "aminmax", "norm of infinite order", "logsumexp"):
        x, w = (v.requires_grad_() for v in inputs(5))
        function = model(FLOATING[name][0])
        expected = function(x, w)
        expected = expected if isinstance(expected, tuple) else (expected,)
        given = [torch.randn(y.shape).double() if y.requires_grad else None for y in expected]
        pairs = [(y, g) for y, g in zip(expected, given, strict=True) if g is not None]
        wanted = torch.autograd.grad([y for y, _ in pairs], (x, w), [g for _, g in pairs])
        program = partition(function, x.detach(), w.detach(), size=size, training=True)
        _, found = simulate_with_grads(program.gm, size, [x, w], given)
        for got, want in zip(check_replicated(found), wanted, strict=True):
            torch.testing.assert_close(got, want)


class Pooled(nn.Module):
    def __init__(self, reduce: Function) -> None:
        super().__init__()
        self.inner, self.reduce = nn.Linear(4, 4), reduce

    def forward(self, x: Tensor) -> Any:
        return self.reduce(self.inner(x))


@pytest.mark.parametrize(("name", "sent"), [("amax of ties", [("all_reduce", 32)]), ("max along", [])])
def test_the_backward_pass_is_foreseen(name: str, sent: list[tuple[str, int]]) -> None:
    plan = {"": {"x": fxsp.SequenceParallelInput(1)}}
    report = fxsp.explain(Pooled(FLOATING[name][0]), torch.randn(2, 5, 4), world_size=2, plan=plan)
    assert [(r.kind, r.bytes) for r in report.backward_collectives if "share a gradient" in r.reason] == sent


# The operators.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_keys_are_in_the_order_of_values(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    values = [-torch.inf, info.min, -2.5, -info.tiny, -0.0, 0.0, info.tiny, 1.0, info.max, torch.inf]
    x = torch.tensor(values, dtype=dtype)
    for op in ("max", "min"):
        key = extremes._key(x, op)
        assert key.dtype == travels_as(dtype)
        assert (key[1:] > key[:-1]).all()
        assert torch.equal(extremes._value(key, dtype), x)
        nan = extremes._key(torch.tensor([torch.nan, -torch.nan], dtype=dtype), op)
        assert (nan > key.max()).all() if op == "max" else (nan < key.min()).all()
        assert extremes._value(nan, dtype).isnan().all()


def test_it_is_an_all_reduce_of_its_own_kind() -> None:
    graph = make_fx(lambda x: torch.ops.fxsp.all_reduce_extreme(x, "max", "0"), tracing_mode="fake")(
        torch.ones(3)
    ).graph
    emit(graph)
    (call,) = [n for n in graph.nodes if "all_reduce" in str(n.target)]
    assert call.args[1] == "max"
    assert call.meta["val"].dtype == torch.int32


def test_without_a_group_it_is_the_identity() -> None:
    x = torch.randn(3)
    y = torch.ops.fxsp.all_reduce_extreme(x, "min", "")
    assert torch.equal(x, y)
    assert y.data_ptr() != x.data_ptr()


# What a wrong one would be found by.


@contextlib.contextmanager
def _only_own_ties() -> Any:
    right = Builder.at_extreme
    with mock.patch.object(Builder, "at_extreme", lambda self, *a, ties: right(self, *a, ties=False)):
        yield


SAMPLES = {
    "amax": Sample(aten.amax.default, (T((5, 2), "ties"), [0])),
    "max": Sample(aten.max.default, (T((5, 3)),)),
    "argmax": Sample(aten.argmax.default, (T((5, 2), "ties"), 0)),
    "all": Sample(aten.all.dim, (T((5, 3), "bool"), 0)),
    "logsumexp": Sample(aten.logsumexp.default, (T((5, 2)), [0])),
}
MUTANTS: dict[str, tuple[str, Callable[[], Any]]] = {
    "no collective": ("amax", lambda: mock.patch.object(Builder, "all_reduce_extreme", lambda self, x, op: x)),
    "the other way": (
        "max",
        lambda: mock.patch.object(
            Builder,
            "all_reduce_extreme",
            lambda self, x, op: self.call(torch.ops.fxsp.all_reduce_extreme, x, "min", ""),
        ),
    ),
    "the last place": ("argmax", lambda: mock.patch.object(written._Written, "_first", lambda self, a, b, c: c)),
    "pads count": ("logsumexp", lambda: mock.patch.object(written._Written, "_real", return_value=None)),
    "pads of ties count": ("amax", lambda: mock.patch.object(written._Written, "_hit", lambda self, found: found)),
    "own ties": ("amax", _only_own_ties),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_is_found(name: str) -> None:
    sample, change = MUTANTS[name]
    cases = list(cases_of(SAMPLES[sample], 2))
    assert not problems(cases)
    with change():
        assert problems(cases)


# Real processes.


class Clamped(nn.Module):
    """What T5 does in half precision, the scale of a quantization, and a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        h = self.inner(x)
        top = torch.finfo(h.dtype).max
        limit = torch.where(torch.isinf(h).any(), top - 1000, top).to(h.dtype)
        h = torch.clamp(h, min=-limit, max=limit)
        scale = h.abs().amax() / 127
        seen = self.inner(mask) > 0
        best = h.max(1)
        return self.out(best.values), best.indices, h.amin(1) / scale, seen.all(), seen.any(1), h.logsumexp(1)


def _processes(rank: int, size: int, dtype: torch.dtype) -> tuple[list[str], dict[str, int], str]:
    from running import collectives as ran
    from running import compiled, error_of

    model = Clamped().to(dtype)
    x, mask = torch.randn(2, 7, 8, dtype=dtype), torch.randn(2, 7, 8, dtype=dtype)
    plan = {"": {"x": fxsp.SequenceParallelInput(1), "mask": fxsp.SequenceParallelInput(1)}}
    fast = compiled(model, plan=plan, strict=True)
    expected, found = model(x, mask), fast(x, mask)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    problems_ = [
        f"output {i}" for i, (a, b) in enumerate(zip(found, expected, strict=True)) if error_of(a, b) > tolerance
    ]
    leaves = list(model.parameters())
    wanted, got = (torch.autograd.grad([y.sum() for y in out if y.requires_grad], leaves) for out in (expected, found))
    problems_ += [
        f"gradient {i}" for i, (a, b) in enumerate(zip(got, wanted, strict=True)) if error_of(a, b) > tolerance
    ]
    bad = x.clone()
    bad[1, 6, 3] = float("nan")
    with torch.no_grad():
        a, b = model(bad, mask), fast(bad, mask)
        problems_ += [
            f"NaN in output {i}"
            for i, (u, v) in enumerate(zip(a, b, strict=True))
            if not torch.equal(u.isnan(), v.isnan())
        ]
        with ran() as counts:
            fast(x, mask)
    return problems_, dict(counts), str(fxsp.reports()[-1].implicit_gathers)


@pytest.mark.parametrize(("size", "dtype"), [(2, torch.float32), (3, torch.bfloat16)], ids=str)
def test_on_real_ranks(ranks: Any, size: int, dtype: torch.dtype) -> None:
    for problems_, counts, gathers in ranks(size).run(_processes, dtype):
        assert not problems_, gathers
        # isinf, abs().amax(), max (value and place), amin, all, any, and two of logsumexp.
        assert counts == {"all_reduce": 9}
