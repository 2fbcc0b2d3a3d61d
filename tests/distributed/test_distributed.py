"""The harness itself: results by rank, failures with the traceback of their rank, no hang."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from distributed import RankError


def _sum(rank: int, size: int, scale: int) -> torch.Tensor:
    x = torch.tensor([scale * rank])
    dist.all_reduce(x)
    return x


def _one_fails(rank: int, size: int) -> None:
    if rank == 1:
        raise ValueError("from rank one")
    dist.barrier()


def test_results_by_rank(ranks):
    assert [int(x) for x in ranks(2).run(_sum, 3)] == [3, 3]


def test_a_failure_shows_its_rank_and_the_pool_starts_again(ranks):
    with pytest.raises(RankError, match=r"rank 1 of 2:\n[\s\S]*from rank one"):
        ranks(2).run(_one_fails)
    assert [int(x) for x in ranks(2).run(_sum, 1)] == [1, 1]
