"""Symbolic lengths as numbers: one reading of them, for who chooses and for who tells."""

from __future__ import annotations

import sympy
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fxsp.lengths import hint, sizes_at_hand
from fxsp.passes.base import Program
from fxsp.torch_internals import fake_mode_of, size_hints
from fxsp.types import Ranks, as_length, ceil_div

N, M = (sympy.Symbol(name, positive=True, integer=True) for name in "nm")


def test_what_is_known() -> None:
    assert hint(7) == hint(sympy.Integer(7)) == 7
    assert hint(2 * N, {N: 3}) == 6
    with sizes_at_hand({N: 5}):
        assert hint(ceil_div(N, 2)) == 3
        assert hint(N * M) == 5 * 1024
        assert hint(N, {N: 3}) == 3
        with sizes_at_hand({M: 2}):
            assert hint(N * M) == 2048
        assert hint(N) == 5
    assert hint(N + 1) == 1025


def test_a_program_reads_the_sizes_of_its_inputs() -> None:
    gm = make_fx(lambda x: x + x, tracing_mode="symbolic")(torch.ones(6, 3))
    (x,) = gm.graph.find_nodes(op="placeholder")
    program = Program(gm, Ranks(0, 2, "hint"))
    sizes = size_hints(fake_mode_of(x.meta["val"]))
    rows = as_length(x.meta["val"].shape[0])
    assert isinstance(rows, sympy.Symbol)
    assert program.number(rows * 2) == hint(rows * 2, sizes) == 12
    assert hint(x.meta["val"].shape[0]) == 6
    assert hint(rows) == 1024
    assert not x.meta["val"].fake_mode.shape_env.guards
