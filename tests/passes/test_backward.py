"""What the report says of the backward pass, by hand for two ranks and five tokens, three rows on each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from fxsp.report import Report
from tracing import gather, partition, shard

ITEM = 8
X, W = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)


def _report(function: Callable[[Tensor, Tensor], Tensor], wanted: str = "xw", *, training: bool = True) -> Report:
    """Gradients of the inputs that are ``wanted`` may be asked for."""

    def prepare(gm: GraphModule) -> None:
        for name, node in zip("xw", gm.graph.find_nodes(op="placeholder"), strict=True):
            node.meta["val"].requires_grad_(name in wanted)

    return partition(function, X, W, training=training, prepare=prepare).report


def _linear(x: Tensor, w: Tensor) -> Tensor:
    return gather(shard(x) @ w)


def test_rows_are_gathered_and_what_all_ranks_use_is_summed() -> None:
    # The sum of n elements sends 2 (P-1)/P n of them, a gather (P-1) times the rows of a rank.
    assert [(r.kind, r.bytes) for r in _report(_linear).backward] == [
        ("all_gather", 2 * 3 * 8 * ITEM),
        ("all_reduce", 8 * 4 * ITEM),
    ]


@pytest.mark.parametrize(("wanted", "kinds"), [("w", ["all_reduce"]), ("x", ["all_gather"]), ("", [])])
def test_nothing_where_no_gradient_goes(wanted: str, kinds: list[str]) -> None:
    assert [r.kind for r in _report(_linear, wanted).backward] == kinds


def test_nothing_without_training() -> None:
    assert not _report(_linear, training=False).backward


def test_summed_results_send_nothing_back() -> None:
    report = _report(lambda x, w: (shard(x) @ w).sum(1), "w")
    assert [r.kind for r in report.collectives] == ["all_reduce"]
    assert [r.reason for r in report.backward] == ["the gradient of a whole value that is used with shards"]
