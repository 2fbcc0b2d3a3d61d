"""Sample calls of every operator in the rule table: data for ``rule_validation``.

Sizes are small and of all kinds: 1; below the number of ranks; primes; with divisors, so that a factor can be an inner
or outer part of a dimension.  Elementwise operators get their samples from their schemas.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from fxsp.passes.attention.operators import BANDED
from fxsp.passes.rules.families import TABLE, Row, family, overloads
from fxsp.passes.rules.notation import Pattern
from rule_recorder import Sample, T
from rule_sample_calls import CALLS, X

__all__ = ["SAMPLES", "WHOLE_SAMPLES", "elementwise_samples"]

_NO_DERIVATIVE = {
    "detach_copy", "floor_divide", "floor_divide.Scalar", "remainder.Scalar_Tensor", "scatter.reduce",
    "scatter.value_reduce",
    "heaviside", "nextafter", "histc", "searchsorted.Tensor",
}  # fmt: skip


def _sample(name: str, call: tuple[Any, ...]) -> Sample:
    (op,) = overloads(name)
    kwargs = call[-1] if call and isinstance(call[-1], dict) else {}
    return Sample(op, call[: len(call) - bool(kwargs)], kwargs, grads=name not in _NO_DERIVATIVE)


#: Operators defined on part of the numbers.
_UNIT = set("log log2 log10 sqrt rsqrt asin acos atanh erfinv log1p xlogy pow float_power digamma lgamma".split())
#: Arguments that the schema does not tell.
_GIVEN: dict[str, tuple[Any, ...]] = {
    "to.dtype": (X, torch.float32),
    "to.device": (X, torch.device("cpu"), torch.float64),
    "to.dtype_layout": (X, {"dtype": torch.float32}),
    "to.prim_dtype": (X, None),
    "_to_copy": (X, {"dtype": torch.float32}),
    "round.decimals": (X, {"decimals": 1}),
    "div.Tensor_mode": (X, T((5, 1)), {"rounding_mode": "floor"}),
    "div.Scalar_mode": (X, 0.3, {"rounding_mode": "trunc"}),
    "clamp": (X, -0.5, 0.5),
    "clip": (X, None, 0.5),
    "clamp.Tensor": (X, T((5, 1), "unit"), None),
    "clip.Tensor": (X, None, T((5, 1), "unit")),
    "threshold": (X, 0.5, 0.1),
    "where.self": (T((5, 1), "bool"), X, T((1, 6))),
    "where.ScalarSelf": (T((5, 1), "bool"), 1.0, X),
    "where.ScalarOther": (T((2, 5, 1), "bool"), T((5, 6)), 1.0),
    "where.Scalar": (T((5, 6), "bool"), 1.0, 2.0),
    "masked_fill.Scalar": (X, T((5, 1), "bool"), 0.5),
    "masked_fill.Tensor": (X, T((5, 1), "bool"), T(())),
    "polar": (X, T((5, 1))),
    "complex": (X, T((2, 1, 6))),
    "full_like": (X, 0.5),
    "bitwise_left_shift.Tensor_Scalar": (T((5, 6), "small"), 2),
    "bitwise_right_shift.Tensor_Scalar": (T((5, 6), "small"), 2),
    "lerp.Scalar": (X, T((5, 1)), 0.3),
    "relu6": (X,),
    "gelu": (X, {"approximate": "tanh"}),
    "isclose": (X, T((5, 1))),
    "logit": (T((2, 5, 6), "unit"), None),
    "max.other": (X, T((5, 1))),
    "min.other": (X, T((5, 1))),
}


def elementwise_samples() -> dict[Any, list[Sample]]:
    """A call of every elementwise operator, broadcast where it has several operands."""
    return {op: [_elementwise(op)] for op in sorted(family("elementwise"), key=str)}


def _elementwise(op: Any) -> Sample:
    name = op._schema.name.removeprefix("aten::")
    full = name if op._overloadname == "default" else f"{name}.{op._overloadname}"
    if full in _GIVEN:
        return _sample(full, _GIVEN[full])
    kinds = ["unit"] if name in _UNIT else ["above"] if name == "acosh" else ["normal"]
    if name in ("real", "imag", "conj", "_conj", "resolve_conj", "angle", "sgn"):
        kinds = ["complex"]
    shapes = iter([(2, 5, 6), (5, 1), (2, 1, 6)])
    for kind in (*kinds, "small", "bool"):
        args: list[Any] = []
        shapes = iter([(2, 5, 6), (5, 1), (2, 1, 6)])
        for argument in op._schema.arguments:
            if "Tensor" in str(argument.type):
                args.append(T(next(shapes), kind))
            elif argument.has_default_value() or argument.kwarg_only:
                break
            else:
                args.append(2)
        generator = torch.Generator().manual_seed(0)
        try:
            op(*(a.draw(generator) if isinstance(a, T) else a for a in args))
        except RuntimeError:  # not for operands of this dtype
            continue
        return Sample(op, tuple(args), grads=full not in _NO_DERIVATIVE, value=name != "empty_like")
    raise AssertionError(f"{op} needs an entry among the given arguments")


#: Calls without rule, of operators that need their operands whole, or that have no rule for this use.
WHOLE_SAMPLES = [
    _sample(name, call)
    for name, call in {
        "histc": (X, 4),
        "renorm": (T((4, 5)), 2, 0, 1.0),
        "rot90": (X, 1, [0, 1]),
        "diagonal": (T((4, 5, 6)), 0, 1, 2),
        "native_group_norm": (T((4, 6, 5)), T((6,)), T((6,)), 4, 6, 5, 3, 1e-5),
        "masked_select": (T((4, 5)), T((4, 5), "bool")),
        "repeat_interleave.Tensor": (T((5,), "small"),),
        "searchsorted.Tensor": (T((5,), "order"), T((4, 6))),
        "fft_rfft": (X, None, 1),
        "kron": (T((2, 3)), T((4, 1))),
        "embedding": (T((7, 3)), T((2, 5), "index", 7), -1, True),
        "index.Tensor": (T((4, 5)), [T((4, 5), "bool")]),
        "index_put": (T((4, 5)), [T((4, 5), "bool")], T(())),
        "conv1d": (T((3, 6)), T((4, 3, 3))),
    }.items()
]

#: Operator -> samples of it.
SAMPLES: dict[Any, list[Sample]] = {}
for _name, _calls in CALLS.items():
    for _call in _calls:
        _made = _sample(_name, _call)
        SAMPLES.setdefault(_made.op, []).append(_made)
#: Attention under a mask that is known by positions, which masks become: see fxsp.kernels.attention.banded.
SAMPLES[BANDED] = [
    replace(_made, op=BANDED)
    for _made in (
        _sample("scaled_dot_product_attention", call)
        for call in (
            (T((2, 2, 5, 4)), T((2, 2, 5, 4)), T((2, 2, 5, 3)), None, True, 2, None, False),
            (T((2, 4, 5, 4)), T((2, 2, 5, 4)), T((2, 2, 5, 4)), T((2, 1, 1, 5), "bool"), True, None, 0.5, True),
        )
    )
]


def samples_of(op: Any, row: Row) -> list[Sample]:
    """Calls of an operator, made of its rule in notation: each alternative, on operands of two ranks."""
    found = []
    for alternative in row.rule.split("|"):
        rule = Pattern.parse(alternative).rule
        factors = dict.fromkeys(f for dims in rule.operands for d in dims or () for f in d)
        for star in ((2, 5), (5,)):
            sizes = {f: star if f[0] == "*" else (n,) for f, n in zip(factors, itertools.cycle((4, 6, 3, 5, 2)))}
            shapes = [tuple(n for d in dims or () for n in (sizes[d[0]] if d else (1,))) for dims in rule.operands]
            found.append(_call_of(op, shapes, row.given))
    return list({str(sample): sample for sample in found}.values())


def _call_of(op: Any, shapes: list[tuple[int, ...]], given: Mapping[str, Any]) -> Sample:
    left = iter(shapes)
    arguments: dict[str, Any] = {}
    for argument in op._schema.arguments:
        shape = next(left, None) if "Tensor" in str(argument.type) else None
        if shape is not None:
            arguments[argument.name] = T(shape)
        elif argument.name in given:
            arguments[argument.name] = given[argument.name]
    return Sample(op, (), arguments)


for _row in TABLE:
    for _op in overloads(*_row.operators.split()) if _row.rule and "elementwise" not in _row.traits else ():
        if _op not in SAMPLES:
            SAMPLES[_op] = samples_of(_op, _row)
