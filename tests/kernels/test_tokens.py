"""Where a rank's rows lie, by the walk of the kernels, by that of the types, and by the oracle's."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from fxsp.kernels.tokens import local_length, placed
from fxsp.simulation.reference.lanes import pieces
from fxsp.types import Segment, Sequence

KINDS = [
    Segment(7), Segment(1), Segment(8), Segment(5, sharded=False), Segment(7, layout="head-tail"),
    Segment(12, unit=3), Segment(15, unit=5, layout="head-tail"),
]  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_three_walks_agree(size: int) -> None:
    for segments in product(KINDS, repeat=2):
        if not any(s.sharded for s in segments):
            continue
        sequence = Sequence(segments)
        described = [list(x) for x in (sequence.lengths, sequence.whole)], [sequence.head_tail, sequence.units]
        parts = placed(*described[0], size, *described[1])
        types, oracle = sequence.placed(size), list(pieces(*described[0], size, *described[1]))
        for part, (row, rows, segment), piece in zip(parts, types, oracle, strict=True):
            assert (part.row, part.rows) == (row, rows) == (piece.local_start, piece.local_length)
            assert (part.start, part.length) == (piece.start, segment.length) == (piece.start, piece.length)
            for rank in range(size):
                index = part.index(rank, torch.device("cpu"))
                assert index.tolist() == piece.rows(rank).tolist()
                assert part.may_have_pads(rank) == bool((index >= part.length).any())
            if not segment.dealt:
                assert local_length(part.length, part.whole, size) == part.rows
        assert sequence.local_length(size) == sum(part.rows for part in parts)


def test_what_is_left_out_is_contiguous_and_of_single_tokens() -> None:
    assert placed([7, 3], [False, True], 2) == placed([7, 3], [False, True], 2, [False, False], [1, 1])
    with pytest.raises(ValueError, match="zip"):
        placed([7, 3], [False], 2)
