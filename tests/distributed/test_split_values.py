"""Split values between graphs: eager programs on them, and what is no operator, as on plain tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from distributed import Pool
from split_programs import run_gathers, run_programs, run_samples, run_strangers

Ranks = Callable[[int], Pool]


@pytest.mark.parametrize(
    ("size", "tokens", "lengths", "layout"),
    [(2, 7, (), "contiguous"), (3, 7, (2, 5), "contiguous"), (3, 2, (), "contiguous"), (3, 9, (4, 5), "head-tail")],
    ids=str,
)
def test_eager_programs(ranks: Ranks, size: int, tokens: int, lengths: tuple[int, ...], layout: str) -> None:
    for problems in ranks(size).run(run_programs, tokens, lengths, layout):
        assert not problems


@pytest.mark.parametrize("part", range(6))
def test_every_rule(ranks: Ranks, part: int) -> None:
    for problems, ran in ranks(2).run(run_samples, part, 6):
        assert not problems
        assert ran > 200


def test_gathers_are_said_and_recorded(ranks: Ranks) -> None:
    for said, rows in ranks(3).run(run_gathers):
        assert len(said) == 2, said
        assert all(text.startswith("ImplicitGatherWarning ") and "split_programs.py:" in text for text in said), said
        assert ["[1, 6, 4]" in text for text in said] == [True, True]
        assert rows == 2 * [*[(op, "implicit", 2 * 32) for op, _, _ in rows[:2]], ("fxsp.whole", "output", 2 * 32)]
        assert rows[1][0] == "Tensor.tolist"


def test_what_is_no_operator(ranks: Ranks) -> None:
    plain = torch.arange(24.0).view(1, 6, 4)
    for found in ranks(2).run(run_strangers):
        assert "fxsp.whole(x)" in found["repr"]
        assert (found["shape"], found["strides"], found["len"]) == ((1, 6, 4), (24, 4, 1), 1)
        for name in ("list", "numpy", "dlpack"):
            assert found[name] == plain.tolist()
        assert found["compiled"] == (plain * 2 + plain.cumsum(1)).tolist()
        assert found["vmap"] == (plain * 2).tolist()
        assert found["data_ptr"] != 0
        for name in ("saved", "pickled"):
            assert type(found[name]) is torch.Tensor
            assert torch.equal(found[name], plain)
