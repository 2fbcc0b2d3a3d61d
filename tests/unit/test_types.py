"""The sharding types: one notation, invalid ones cannot be made, lengths stay symbolic."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._sympy.functions import FloorDiv

from fxsp.types import (
    Length,
    Partial,
    Ranks,
    Replicate,
    Segment,
    Sequence,
    Shard,
    Type,
    Used,
    as_length,
    ceil_div,
    parse,
    product,
    same_length,
)

S0, S1 = (sympy.Symbol(name, positive=True, integer=True) for name in ("s0", "s1"))


def lengths() -> st.SearchStrategy[Length]:
    numbers = st.integers(1, 10_000)
    symbols = st.sampled_from([S0, S1])
    forms = st.sampled_from(
        [
            lambda s, n: s,
            lambda s, n: s + n,
            lambda s, n: n * s,
            lambda s, n: s * S1 - n,
            lambda s, n: FloorDiv(s + n, 7),
            lambda s, n: 3 * FloorDiv(s, 2) + n,
        ]
    )
    return st.one_of(numbers, st.builds(lambda f, s, n: as_length(f(s, n)), forms, symbols, numbers))


@st.composite
def sequences(draw: st.DrawFn) -> Sequence:
    kinds = st.sampled_from([(True, "contiguous"), (True, "head-tail"), (False, "contiguous")])
    segments = []
    for n in draw(st.lists(lengths(), min_size=1, max_size=4)):
        sharded, layout = draw(kinds)
        segments.append(Segment(n, sharded, layout=layout))
    at = draw(st.integers(0, len(segments) - 1))
    segments[at] = Segment(segments[at].length)
    return Sequence(tuple(segments))


def types() -> st.SearchStrategy[Type]:
    shards = st.builds(Shard, st.integers(0, 6), sequences(), lengths(), lengths())
    return st.one_of(st.sampled_from([Replicate(), Used(), Partial()]), shards)


@given(types())
@settings(max_examples=200, deadline=None)
def test_parse_is_the_inverse_of_str(type_: Type) -> None:
    assert parse(str(type_)) == type_


@pytest.mark.parametrize(
    ("type_", "text"),
    [
        (Replicate(), "R"),
        (Used(), "U"),
        (Partial(), "P"),
        (Shard(1, Sequence.of(512, 4096)), "S(1, [512|4096])"),
        (Shard(1, Sequence((Segment(512, False), Segment(4096)))), "S(1, [512 whole|4096])"),
        (Shard(0, Sequence.of(4096), 2, 3), "S(0, 2*[4096]*3)"),
        (Shard(0, Sequence.of(4096), 1, 3), "S(0, 1*[4096]*3)"),
        (Shard(2, Sequence.of(8, layout="head-tail")), "S(2, [8 head-tail])"),
        (
            Shard(1, Sequence((Segment(3, False), Segment(2 * S0 - 1, layout="head-tail"), Segment(4)))),
            "S(1, [3 whole|2*s0 - 1 head-tail|4])",
        ),
        (Shard(1, Sequence.of(S0, 2 * S1 - 1), S0 + 1), "S(1, (s0 + 1)*[s0|2*s1 - 1]*1)"),
        (Shard(1, Sequence.of(FloorDiv(S0 + 1, 2))), "S(1, [((s0 + 1)//2)])"),
    ],
)
def test_notation(type_: Type, text: str) -> None:
    assert str(type_) == text
    assert parse(text) == type_


@pytest.mark.parametrize(
    "text",
    ["", "X", "S", "S(1)", "S(1, 5)", "S(-1, [5])", "S(1, [])", "S(1, [5 whole])", "S(1, [0])", "S(1, [5 ring])",
     "S(1, [a.b])", "S(1, 0*[5]*1)", "S(1, [print(1)])", "S(1, [5|])"],
)  # fmt: skip
def test_what_is_no_type_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a|at least|layout|sharded|Replicate"):
        parse(text)


def test_the_origin_is_no_part_of_equality() -> None:
    assert Replicate(origin="plan") == Replicate()
    assert Shard(1, Sequence.of(4), origin="a") == Shard(1, Sequence.of(4), origin="b")
    assert Replicate() != Used()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Sequence(()), ValueError, "at least one segment"),
        (lambda: Sequence((Segment(3, False),)), ValueError, "without one the value is Replicate"),
        (lambda: Sequence.of(3, layout="ring"), ValueError, "contiguous or head-tail"),
        (lambda: Segment(3, False, layout="head-tail"), ValueError, "no layout"),
        (lambda: Segment(0), ValueError, "at least one token, not 0"),
        (lambda: Segment(-2), ValueError, "at least one token"),
        (lambda: Segment(2.0), TypeError, "an int or a sympy expression"),
        (lambda: Shard(1), TypeError, "needs a Sequence"),
        (lambda: Shard(-1, Sequence.of(3)), ValueError, "not negative"),
        (lambda: Shard(0, Sequence.of(3), 0), ValueError, "Shard.outer"),
        (lambda: Shard(0, Sequence.of(3), 1, -1), ValueError, "Shard.inner"),
        (lambda: Ranks(2, 2, "g"), ValueError, "not in 0..1"),
        (lambda: Ranks(-1, 2, "g"), ValueError, "not in 0..1"),
    ],
)
def test_invalid_types_cannot_be_made(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("segments", "size", "local"),
    [
        ([Segment(6)], 2, 3),
        ([Segment(5)], 2, 3),
        ([Segment(1)], 8, 1),
        ([Segment(5), Segment(7)], 3, 2 + 3),
        ([Segment(5, False), Segment(7)], 3, 5 + 3),
        ([Segment(7), Segment(1, False), Segment(8)], 4, 2 + 1 + 2),
        ([Segment(7, layout="head-tail"), Segment(8, layout="head-tail"), Segment(5)], 4, 2 + 2 + 2),
        ([Segment(9, layout="head-tail")], 4, 4),
        ([Segment(2, layout="head-tail")], 4, 2),
    ],
)
def test_local_lengths(segments: list[Segment], size: int, local: int) -> None:
    sequence = Sequence(tuple(segments))
    assert sequence.local_length(size) == local
    shard = Shard(1, sequence, 2, 3)
    assert shard.local_size(size) == 6 * local
    assert shard.global_size() == 6 * sum(int(s.length) for s in segments)
    assert sequence.whole == tuple(not s.sharded for s in segments)
    assert sequence.has_pads(size) == any(
        s.sharded and int(s.local_length(size)) * size != int(s.length) for s in segments
    )
    assert sequence.has_pads(1) == any(s.head_tail and int(s.length) % 2 for s in segments)


@given(st.integers(1, 100), st.integers(1, 9), st.integers(1, 100))
def test_symbolic_sizes_are_the_numbers_when_the_symbol_is_one(n: int, size: int, text: int) -> None:
    symbolic = Shard(0, Sequence((Segment(text, False), Segment(S0), Segment(2 * S0))), S1, 3)
    numbers = Shard(0, Sequence((Segment(text, False), Segment(n), Segment(2 * n))), 5, 3)
    values = {S0: n, S1: 5}
    assert sympy.sympify(symbolic.local_size(size)).subs(values) == numbers.local_size(size)
    assert sympy.sympify(symbolic.global_size()).subs(values) == numbers.global_size()
    assert symbolic.sequence.has_pads(2)


def test_lengths_of_symbolic_shapes_add_no_guard() -> None:
    seen: list[Length] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        n = x.shape[0]
        seen.extend([as_length(n), as_length(2 * n), as_length(x.shape[1]), ceil_div(as_length(n), 2)])
        assert same_length(product((as_length(n), 2)), as_length(2 * n))
        return x + 1

    gm = make_fx(function, tracing_mode="symbolic")(torch.ones(6, 3))
    symbol = seen[0]
    assert isinstance(symbol, sympy.Symbol)
    assert seen[1] == 2 * symbol
    assert str(seen[3]) == f"(({symbol} + 1)//2)"
    shape_env = next(iter(gm.graph.nodes)).meta["val"].fake_mode.shape_env
    assert not shape_env.guards


def test_equal_lengths() -> None:
    assert same_length(S0 * 2 + 2, 2 * (S0 + 1))
    assert not same_length(S0, S1)
    assert not same_length(S0, 7)
    assert as_length(sympy.Integer(7)) == 7
    assert type(as_length(sympy.Integer(7))) is int
    assert product(()) == 1


def test_same_placement() -> None:
    a = Shard(1, Sequence.of(2 * (S0 + 1)))
    assert a.same_as(Shard(1, Sequence.of(2 * S0 + 2), origin="elsewhere"))
    assert not a.same_as(Shard(1, Sequence.of(S0, S0 + 2)))
    assert not a.same_as(Shard(2, a.sequence))
    assert not a.same_as(Shard(1, a.sequence, 2))
    assert not a.same_as(Replicate())
    whole = Sequence((Segment(2, False), Segment(4)))
    assert not Sequence.of(2, 4).same_as(whole)
    assert not Sequence.of(4, layout="head-tail").same_as(Sequence.of(4))
