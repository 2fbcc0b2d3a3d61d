"""Fingerprints of inputs, and the comparison of outputs."""

from __future__ import annotations

import pytest
import torch

from fingerprints import fingerprint
from fxsp.simulation.compare import relative_error

VALUES = [
    torch.randn(3, 5),
    torch.randn(7).bfloat16(),
    torch.tensor(True),
    torch.tensor(2.5),
    torch.zeros(0, 3),
    torch.randn(3, 4).t(),
    torch.randn(2, 2, dtype=torch.complex64),
    3,
]


@pytest.mark.parametrize("value", VALUES, ids=lambda v: str(getattr(v, "dtype", v)))
def test_a_fingerprint_depends_on_the_value_alone(value: object) -> None:
    copy = value.clone() if isinstance(value, torch.Tensor) else value
    assert fingerprint(copy) == fingerprint(value)
    assert all(-(2**63) <= n < 2**63 for n in fingerprint(value))


def test_a_fingerprint_sees_one_bit_the_order_the_shape_and_the_dtype() -> None:
    x = torch.randn(4, 6)
    changed = x.clone()
    changed[1, 2] = torch.nextafter(changed[1, 2], torch.tensor(9.0))
    others = [changed, x[[1, 0, 2, 3]], x.view(6, 4), x.view(torch.int32)]
    assert all(fingerprint(other) != fingerprint(x) for other in others)


def test_relative_error() -> None:
    x = torch.tensor([3.0, 4.0])
    assert relative_error(x * 1.5, x) == pytest.approx(0.5)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_error(torch.tensor([1, 2]), torch.tensor([1, 3])) == 1.0


def test_relative_error_of_infinities_and_of_what_is_zero_but_for_rounding() -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([3.0, 4.0, -inf, nan])
    assert relative_error(x.clone(), x) == 0.0
    assert relative_error(torch.tensor([3.0, 4.5, -inf, nan]), x) == pytest.approx(0.1)
    for other in ([3.0, 4.0, inf, nan], [3.0, 4.0, 0.0, nan], [3.0, 4.0, -inf, 0.0], [3.0, nan, -inf, nan]):
        assert relative_error(torch.tensor(other), x) == inf
    rounding = torch.tensor([1e-8])
    assert relative_error(-rounding, rounding) == pytest.approx(2.0)
    assert relative_error(-rounding, rounding, usual=1.0) == pytest.approx(2e-6)
    assert relative_error(torch.tensor([1e-3]), rounding, usual=1.0) == pytest.approx(0.1, rel=1e-3)
