"""Lengths that the program itself requires to be equal, though they come from different inputs."""

from __future__ import annotations

import sympy
import torch
from torch import Tensor
from torch.utils._sympy.functions import FloorDiv

from fuzzing import Case, Input, check
from fxsp.passes.base import Program
from fxsp.passes.pipeline import Runner, partition_program
from fxsp.simulation.machine import simulate
from fxsp.types import Ranks, as_length, equal_lengths, same_length
from lockstep import gradients
from replicated import check_replicated
from tracing import collectives, partition, shard, trace

A, B, C, D = (sympy.Symbol(name, positive=True, integer=True) for name in "abcd")


def test_known_differences_make_lengths_equal() -> None:
    assert not same_length(as_length(A + B), as_length(C + D))
    with equal_lengths([A + B - C - D]):
        assert same_length(as_length(A + B), as_length(C + D))
        assert same_length(as_length(2 * A + 2 * B + 1), as_length(2 * C + 2 * D + 1))
        assert not same_length(as_length(A), as_length(C))
        with equal_lengths([A - C, B - 3]):
            assert same_length(as_length(A), as_length(C))
            assert as_length(B) == 3
        assert not same_length(as_length(A), as_length(C))
    assert not same_length(as_length(A + B), as_length(C + D))


def test_one_difference_is_used_in_the_next() -> None:
    with equal_lengths([A - B, B - C, C - 2 * D]):
        assert same_length(as_length(A), as_length(2 * D))
    with equal_lengths([A - A, 2 * A - 3 * B]):  # nothing to learn, nothing to solve in whole numbers
        assert not same_length(as_length(A), as_length(B))


def test_a_length_that_divides_is_a_multiple_of_its_quotient() -> None:
    quotient = FloorDiv(A, 4)
    assert not same_length(as_length(4 * quotient), as_length(A))
    with equal_lengths([A - 4 * quotient]):
        assert same_length(as_length(4 * quotient), as_length(A))
        assert same_length(as_length(8 * quotient + B), as_length(2 * A + B))
        assert as_length(2 * quotient + B) == 2 * quotient + B  # not A / 2, which is no whole number
        assert not same_length(as_length(4 * FloorDiv(B, 4)), as_length(B))
    with equal_lengths([8 * A - 32 * quotient, A - 8]):
        assert as_length(4 * quotient) == 8
    with equal_lengths([A - 4 * quotient, B - 4 * quotient]):  # what equals it by way of the quotient, too
        assert same_length(as_length(A), as_length(B))


def test_quotients_inside_of_other_functions_stay_whole_numbers() -> None:
    """Windows of a sequence whose number is computed, ``x.view(B, S // 4, 4, C)``, or left to ``-1``."""
    quotient, tokens = FloorDiv(A, 4), A * B
    inferred = FloorDiv(A, quotient)
    with equal_lengths([A - quotient * inferred, A - 4 * quotient]):
        assert as_length(quotient * 4) == A
        assert as_length(FloorDiv(A + 2, 3) + 4 * quotient) == FloorDiv(A + 2, 3) + A
        assert as_length(FloorDiv(quotient + 2, 3)) == FloorDiv(quotient + 2, 3)
    assert as_length(inferred) != 4
    windows = FloorDiv(tokens, 4)
    with equal_lengths([tokens - windows * FloorDiv(tokens, windows), tokens - 4 * windows]):
        assert as_length(FloorDiv(tokens, windows)) == 4


def _windows(x: Tensor) -> Tensor:
    y = shard(x) * 2
    y = y.view(y.shape[0], y.shape[1] // 4, 4, y.shape[2]).softmax(2).flatten(1, 2)
    return torch.softmax(y.view(-1, 4, y.shape[2]), -1).view_as(y)


def test_windows_of_a_symbolic_length() -> None:
    x = torch.randn(2, 12, 4, dtype=torch.float64)
    for symbolic in (False, True):
        gm = trace(_windows, x, symbolic=symbolic)
        program = partition_program(Program(gm, Ranks(0, 2, "simulated"), training=True), Runner(check=True))
        (out,) = check_replicated(simulate(program.gm, 2, [x]))
        torch.testing.assert_close(out, _windows(x))


def _rotary(text: Tensor, image: Tensor, text_table: Tensor, image_table: Tensor) -> Tensor:
    """As Flux: tokens and the tables of their positions are joined apart, and meet in a product."""
    x = torch.softmax(torch.cat([shard(text), shard(image)], 1), -1)
    table = torch.cat([shard(text_table, 0), shard(image_table, 0)], 0).outer(torch.arange(3, 7, dtype=torch.float64))
    return (x * table.cos()).softmax(-1)[:, text.shape[1] :]


def test_two_inputs_with_lengths_of_their_own() -> None:
    """Their sums are equal, so the product is of one sequence; the table is laid out anew without communication."""
    shapes = [(2, 3, 4), (2, 6, 4), (4,), (5,)]  # 3 + 6 tokens, and 4 + 5 positions
    inputs = [torch.randn(*shape, dtype=torch.float64) for shape in shapes]
    for symbolic in (False, True):
        gm = trace(_rotary, *inputs, symbolic=symbolic)
        program = partition_program(Program(gm, Ranks(0, 2, "simulated"), training=True), Runner(check=True))
        assert collectives(program) == {"gather": 1}
        assert not [g for g in program.report.implicit_gathers if g.kind == "implicit"]
        (out,) = check_replicated(simulate(program.gm, 2, inputs))
        torch.testing.assert_close(out, _rotary(*inputs))
    leaves = [x.clone().requires_grad_() for x in inputs]
    expected = _rotary(*leaves)
    given = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, leaves, given)
    program = partition(_rotary, *inputs, training=True)
    _, found = gradients(program.gm, 2, leaves, [given])
    for a, b in zip(check_replicated(found), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_a_sum_that_turns_out_to_be_a_number() -> None:
    """What tracing has replaced no input is named by: lengths are computed from the symbols that are left."""
    source = """
def program(x1, w2, w3, x4, w5):
    x1 = annotate(x1, "shard", 1, -1, "x1")
    y6 = torch.cat([x4, x1], dim=1).unflatten(2, (4, 2))
    y7 = torch.cat([y6, y6], dim=1)
    y8 = y6 + w5  # as long as both
    return y7.split([1, 9], dim=1)  # so both have five
"""
    # Symbols are named after the position of an input, and solved for in the order of their names.
    shapes = {"x1": (1, "(S0)", 8), "w2": (8,), "w3": (8,), "x4": (1, "(S1)", 8), "w5": (1, "((S1) + (S0))", 1, 1)}
    given = tuple(Input(name, shape, "normal", 7) for name, shape in shapes.items())
    lengths = {"S0": 2, "S1": 3}
    check(
        Case(source, given, lengths, 2, double=True, training=False, dynamic=True, dynamo=False, degrees=None, seed=0)
    )
