"""Split values that not all ranks look at, or not in the same order: an error on all of them, within seconds."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

import fxsp
from distributed import run_ranks
from small import Attention, inputs


def _attempt(rank: int, size: int, case: str) -> tuple[str, str, float]:
    """What the error is, and after how many seconds it came."""
    options = {"inner": "aot_eager", "outputs": "split"}
    model = torch.compile(Attention(), backend="sp", options=options)
    with torch.no_grad():
        x, y = (model(inputs(tokens=7)) for _ in range(2))
        assert isinstance(x, fxsp.SplitTensor)
        fxsp.whole(x.clone())
        start = time.monotonic()
        try:
            _CASES[case](rank, model, x, y)
        except fxsp.FxspError as error:
            return type(error).__name__, str(error), time.monotonic() - start
    return "", "", time.monotonic() - start


def _alone(rank: int, model: Any, x: Any, y: Any) -> None:
    if rank == 0:
        x.tolist()  # looks alone
    for _ in range(3):
        model(inputs(tokens=7))


def _another(rank: int, model: Any, x: Any, y: Any) -> None:
    first, second = (x, y) if rank == 0 else (y, x)
    if rank == 0:
        first.sum().item()
        second.tolist()
    else:
        first.tolist()
        second.sum().item()
    time.sleep(3)
    fxsp.whole(x + 1)


def _in_another_order(rank: int, model: Any, x: Any, y: Any) -> None:
    if rank == 0:
        fxsp.whole(x)
        fxsp.whole(y)
    else:
        fxsp.whole(y)
        fxsp.whole(x)
    time.sleep(4)
    fxsp.whole(x + 1)


_CASES = {"alone": _alone, "another": _another, "in another order": _in_another_order}


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (
            "alone",
            [
                "rank 0 gathers a split value of shape [2, 7, 8] for Tensor.tolist (test_looking_alone.py:",
                "rank 1 did not",
            ],
        ),
        ("another", ["rank 0 runs sum on split values (", "rank 1 gathers a split value"]),
        ("in another order", ["rank 0 gathers", "and rank 1 gathers", "fxsp.whole (test_looking_alone.py:"]),
    ],
)
def test_an_error_that_names_both(case: str, words: list[str]) -> None:
    for kind, text, seconds in run_ranks(2, _attempt, case, timeout=200):
        assert kind == "RanksApartError", (kind, text)
        assert seconds < 20
        for word in words:
            assert word in text, text
