"""Attentions that are written out are in the report where they are in the program, among those that are not."""

from __future__ import annotations

import torch
from torch import Tensor

from fxsp.passes.attention.unfused_report import GATHERED, LINEAR
from tracing import gather, partition, shard

SDPA = torch.nn.functional.scaled_dot_product_attention
INPUTS = tuple(torch.randn(2, 4, 7, 4) for _ in "qkv")


def _unfused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).softmax(-1) @ v


def _linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.softmax(-1) @ (k.softmax(-1).transpose(-2, -1) @ v)


def _all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (shard(x, 2) for x in (q, k, v))
    x = SDPA(_unfused(q, k, v), k, v)
    x = SDPA(_linear(x, k, v), k, v)
    return gather(x)


def test_records_are_in_the_order_of_the_program() -> None:
    report = partition(_all, *INPUTS).report
    assert [record.method for record in report.attentions] == [GATHERED, "ulysses", LINEAR, "ulysses"]
    assert [record.memory is None for record in report.attentions] == [True, False, True, False]


def test_a_record_counts_what_its_own_nodes_send() -> None:
    report = partition(lambda q, k, v: gather(_unfused(*(shard(x, 2).softmax(-1) for x in (q, k, v)))), *INPUTS).report
    (record,) = report.attentions
    # Keys and values, 4 of 7 rows on each rank; the output is none of its own.
    assert [r.bytes for r in report.collectives] == [2 * 4 * 4 * 4 * 4] * 3
    assert record.bytes == 2 * 2 * 4 * 4 * 4 * 4
    assert dict(record.rejected).keys() == {"scaled_dot_product_attention"}


def test_nothing_is_added_where_nothing_is_split() -> None:
    assert not partition(_unfused, *INPUTS).report.attentions
