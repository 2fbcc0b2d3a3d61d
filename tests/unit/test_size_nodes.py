"""Sizes that are computed from other sizes while the program runs are whole numbers."""

from __future__ import annotations

import pytest
import sympy
import torch
from torch.utils._sympy.functions import FloorDiv

from fxsp.torch_internals import sympy_to_fx

n = sympy.Symbol("n", integer=True, positive=True)
QUOTIENTS = [
    (2 / n, 2, 1),
    (n / 2 + sympy.Rational(1, 2), 5, 3),
    (12 / n + 6 / (n + 1), 2, 8),
    (FloorDiv(n, 2) * 4 / n, 4, 2),
]


@pytest.mark.parametrize(("expression", "length", "expected"), QUOTIENTS)
def test_quotients_are_whole(expression: sympy.Expr, length: int, expected: int) -> None:
    graph = torch.fx.Graph()
    given = graph.placeholder("n")
    graph.output(sympy_to_fx(expression, {n: given}, graph))
    found = torch.fx.GraphModule({}, graph)(length)
    assert type(found) is int
    assert found == expected
