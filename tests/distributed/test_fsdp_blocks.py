"""Blocks that are graphs by themselves, under FSDP2 and regional compilation: each is split, with right gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from distributed import Pool
from fsdp_blocks import BLOCKS, run_blocks
from fxsp.capture.graph_breaks import Split, Splits, same_view

Ranks = Callable[[int], Pool]

#: Ranks, form, batch, tokens, a projection before the blocks, training.
CASES = [
    (2, "fsdp", 1, 13, False, True),
    (2, "fsdp", 1, 13, True, True),
    (2, "fsdp", 1, 8, False, False),
    (2, "fsdp", 2, 7, True, True),
    (3, "fsdp", 1, 7, False, True),
    (3, "fsdp", 2, 13, True, False),
    (2, "tuple", 1, 13, False, True),
    (2, "view", 1, 13, True, True),
    (2, "checkpoint", 1, 13, False, True),
    (2, "backward hooks", 1, 13, False, True),
    (2, "regional", 1, 13, False, True),
    (3, "regional", 1, 7, True, False),
    (2, "regional fsdp", 1, 13, True, True),
    (3, "regional fsdp", 1, 7, False, True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_block_is_split(ranks: Ranks, case: tuple[int, str, int, int, bool, bool]) -> None:
    size, *arguments = case
    for errors, ran in ranks(size).run(run_blocks, *arguments):
        assert not {name: error for name, error in errors.items() if not error <= 1e-5}
        assert ran["all_to_all"] == 2 * BLOCKS, ran
        assert ran["all_gather"] == 1, "what the model returns, and nothing between its blocks"


@pytest.mark.parametrize("dim", range(3))
def test_the_stride_of_one_does_not_count(dim: int) -> None:
    shape = [4, 6, 8]
    shape[dim] = 1
    tensor = torch.randn(shape)
    strides = [7 if i == dim else s for i, s in enumerate(tensor.stride())]
    other = tensor.as_strided(shape, strides)
    splits = Splits()
    splits.remember(tensor, Split(1))
    assert splits.find(other) == Split(1)
    assert same_view(tensor, other)
    assert splits.find(tensor.view(1, *shape)) is None
    assert splits.find(tensor.narrow((dim + 1) % 3, 0, 2)) is None


def test_without_elements() -> None:
    splits, tensor = Splits(), torch.empty(2, 0, 8)
    splits.remember(tensor, Split(1))
    assert splits.find(tensor.as_strided((2, 0, 8), (1, 1, 1))) == Split(1)
