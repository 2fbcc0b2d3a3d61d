"""What the report says of the backward pass, by hand for two ranks and five tokens, three rows on each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tracing import gather, partition, shard

ITEM = 8
X = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
W = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)


def _linear(x: Tensor, w: Tensor) -> Tensor:
    return gather(shard(x) @ w)


def _records(x: Tensor, w: Tensor, *, training: bool = True) -> list[tuple[str, int]]:
    return [(r.kind, r.bytes) for r in partition(_linear, x, w, training=training).report.backward]


def test_rows_are_gathered_and_what_all_ranks_use_is_summed() -> None:
    # The sum of n elements sends 2 (P-1)/P n of them, a gather (P-1) times the rows of a rank.
    assert sorted(_records(X, W)) == [("all_gather", 2 * 3 * 8 * ITEM), ("all_reduce", 8 * 4 * ITEM)]


@pytest.mark.parametrize(
    ("x", "w", "kinds"),
    [(X.detach(), W, ["all_reduce"]), (X, W.detach(), ["all_gather"]), (X.detach(), W.detach(), [])],
)
def test_nothing_where_no_gradient_goes(x: Tensor, w: Tensor, kinds: list[str]) -> None:
    assert [kind for kind, _ in _records(x, w)] == kinds


def test_nothing_without_training() -> None:
    assert not _records(X, W, training=False)


def test_summed_results_send_nothing_back() -> None:
    report = partition(lambda x, w: (shard(x) @ w).sum(1), X.detach(), W, training=True).report
    assert [r.kind for r in report.collectives] == ["all_reduce"]
    assert [r.reason for r in report.backward] == ["the gradient of a whole value that is used with shards"]
