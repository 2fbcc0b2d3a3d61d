"""Rules are written in the notation that they print, and read back from it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxsp.passes.rules.families import TABLE
from fxsp.passes.rules.notation import Pattern, parse
from fxsp.passes.rules.rule import OpRule
from fxsp.types import Length
from rule_samples import SAMPLES, elementwise_samples
from rule_validation import rule_for


def test_the_rule_of_every_sample_is_read_back() -> None:
    count = 0
    for samples in (*SAMPLES.values(), *elementwise_samples().values()):
        for sample in samples:
            _, rule = rule_for(sample)
            if rule is not None:
                assert parse(str(rule)) == rule, sample
                count += 1
    assert count > 400


def test_the_patterns_of_the_table_are_read_back() -> None:
    for row in TABLE:
        for text in row.rule.split("|") if row.rule else ():
            rule = Pattern.parse(text).rule
            assert parse(str(rule)) == rule


_FACTORS = st.sampled_from([*"abcdimnx", "d0", "d1", "w10", "p0_1"])
_DIMS = st.lists(st.lists(_FACTORS, max_size=2).map(tuple), max_size=4).map(tuple)


@st.composite
def _rules(draw: st.DrawFn) -> OpRule:
    operands = draw(st.lists(st.none() | _DIMS, max_size=3))
    results = draw(st.lists(_DIMS, min_size=1, max_size=2))
    inner = {f for dims in operands for dim in dims or () for f in dim}
    outer = {f for dims in results for dim in dims for f in dim}
    kinds: dict[str, frozenset[str]] = {}
    for kind, known in (("reduction", inner - outer), ("combined", inner - outer), ("whole", inner | outer)):
        if known:
            kinds[kind] = draw(st.frozensets(st.sampled_from(sorted(known))))
    return OpRule(tuple(operands), tuple(results), **kinds)


@settings(deadline=None, max_examples=200)
@given(_rules())
def test_any_rule_is_read_back(rule: OpRule) -> None:
    assert parse(str(rule)) == rule


@pytest.mark.parametrize(
    ("text", "operands", "results", "expected"),
    [
        ("[*d, i], [o, i] -> [*d, o] reduction={i}", [(2, 5, 6), (4, 6)], [(2, 5, 4)],
         "([d0, d1, i], [o, i]) -> ([d0, d1, o]) reduction={i}"),
        ("[*d, i], [o, i] -> [*d, o] reduction={i}", [(6,), (4, 6)], [(4,)], "([i], [o, i]) -> ([o]) reduction={i}"),
        ("[*d, i], [o, i] -> [*d, o] reduction={i}", [(6,), (6,)], [()], None),
        ("[*d, i], [o, i] -> [*d, o] reduction={i}", [(6,), (4, 6), (4,)], [(4,)], None),
        ("[*d], ... -> [*d]", [(2, 5, 6), (5, 1), ()], [(2, 5, 6)], "([d0, d1, d2], [d1, 1], []) -> ([d0, d1, d2])"),
        ("[*d], ... -> [*d], ...", [(5,), (2, 1)], [(2, 5), (2, 5)], "([d1], [d0, 1]) -> ([d0, d1], [d0, d1])"),
        ("[*d], - -> [*d]", [(2, 5), (3,)], [(2, 5)], "([d0, d1], -) -> ([d0, d1])"),
        ("[b, c, *d], [c] -> [b, c, *d]", [(2, 5, 6), (1,)], [(2, 5, 6)], "([b, c, d0], [1]) -> ([b, c, d0])"),
        ("[*d, c] -> [*d] whole={c}", [(2, 5, 3)], [(2, 5)], "([d0, d1, c]) -> ([d0, d1]) whole={c}"),
        ("[*d] -> [] whole={*d}", [(2, 5)], [()], "([d0, d1]) -> ([]) whole={d0, d1}"),
        ("[a, 1] -> [a]", [(2, 1)], [(2,)], "([a, 1]) -> ([a])"),
        ("[a, 1] -> [a]", [(2, 3)], [(2,)], None),
    ],
)  # fmt: skip
def test_patterns_fit_operands_of_any_rank(
    text: str, operands: list[tuple[Length, ...]], results: list[tuple[Length, ...]], expected: str | None
) -> None:
    found = Pattern.parse(text).fit(operands, results)
    assert (str(found) if found is not None else None) == expected


def test_sizes_are_those_of_the_result_where_it_has_them() -> None:
    found = Pattern.parse("[*d], [*d], [k] -> [*d] whole={k}").fit([(1, 5), (2, 1), (3,)], [(2, 5)])
    assert found is not None
    assert found.sizes == {"d0": 2, "d1": 5, "k": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a] [b]", "is no rule"),
        ("[a] -> [a] small={a}", "is no rule"),
        ("[a -> [a]", "is no list of tensors"),
        ("a -> [a]", "is no list of tensors"),
        ("[a] -> -", "a result lends nothing"),
        ("[a] -> [a] whole={b}", r"factors \['b'\] are in no dimension"),
        ("[a] -> [a] reduction={a}", r"reduction factors \['a'\] appear in a result"),
    ],
)
def test_what_is_no_rule_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)
