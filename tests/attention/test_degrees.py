"""Degrees that cannot be followed are said, with the operator, its place and what is done instead."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxsp
from fxsp.offline.explain import explain
from simulated import Simulated, by_plan

PLAN = {"": {"x": fxsp.SequenceParallelInput(1)}}


@torch.library.custom_op("degrees_test::attention", mutates_args=())
def own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v).contiguous()


@own.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q)


fxsp.register_attention(own)


class Part(nn.Module):
    def __init__(self, kind: str, heads: int) -> None:
        super().__init__()
        self.qkv, self.kind, self.heads = nn.Linear(24, 72), kind, heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, 24 // self.heads)).permute(2, 0, 3, 1, 4).unbind()
        if self.kind == "own":
            y = own(q.contiguous(), k.contiguous(), v.contiguous())
        elif self.kind == "written":
            y = (q @ k.mT).softmax(-1) @ v
        elif self.kind == "none":
            return q.transpose(1, 2).flatten(2)
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return y.transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self, kind: str, heads: int = 6) -> None:
        super().__init__()
        self.part = Part(kind, heads)

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x).mean(1)


def notes(kind: str, heads: int = 6, size: int = 2, **options: Any) -> list[str]:
    """Sentences of the report about degrees."""
    with torch.no_grad():
        report = explain(Model(kind, heads), torch.randn(1, 9, 24), world_size=size, plan=PLAN, options=options)
    return [note for note in report.to_dict()["graphs"][0]["notes"] if "degree" in note]


@pytest.mark.parametrize(
    ("kind", "heads", "size", "options", "parts"),
    [
        ("own", 6, 2, {"ring_degree": 2}, ["ring_degree=2", "degrees_test", "do not merge", "ulysses instead"]),
        ("own", 6, 4, {"ring_degree": 2}, ["ulysses_degree=2 and ring_degree=2", "do not merge"]),
        ("sdpa", 3, 2, {"ulysses_degree": 2}, ["ulysses_degree=2", "3 query heads do not divide", "instead"]),
        ("written", 6, 2, {"ring_degree": 2}, ["ring_degree=2", "written out", "gather_kv (written out) instead"]),
    ],
)
def test_each_is_named(kind: str, heads: int, size: int, options: dict[str, int], parts: list[str]) -> None:
    (sentence,) = notes(kind, heads, size, **options)
    for part in [*parts, "part", "test_degrees.py:"]:
        assert part in sentence
    with pytest.raises(fxsp.StrictError, match=r"cannot be followed|written out"):
        notes(kind, heads, size, strict=True, **options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("own", {"ulysses_degree": 2}),
        ("sdpa", {"ring_degree": 2}),
        ("sdpa", {"allgather_degree": 2}),
        ("own", {}),
        ("written", {"allgather_degree": 2}),
    ],
)
def test_nothing_is_said_where_they_are_followed(kind: str, options: dict[str, int]) -> None:
    assert not notes(kind, **options)


def test_it_is_a_warning() -> None:
    torch.compiler.reset()
    backend = Simulated(2, by_plan({"plan": PLAN, "ring_degree": 2}))
    with torch.no_grad(), pytest.warns(fxsp.DegreeWarning, match=r"degrees_test[\s\S]*runs as ulysses instead"):
        torch.compile(Model("own"), backend=backend)(torch.randn(1, 9, 24))


def test_degrees_without_an_attention_are_a_note() -> None:
    assert notes("none", ring_degree=2) == ["ring_degree=2: there is no attention of split tokens in this graph"]


def entries(length: int, spec: Any, size: int = 2) -> tuple[list[tuple[bool, str]], dict[str, Any], str]:
    with torch.no_grad(), warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        report = explain(Model("sdpa"), torch.randn(2, length, 24), world_size=size, plan={"": {"x": spec}})
    return [(p.applied, p.detail) for p in report.plan], report.communication, str(report)


def test_an_entry_on_one_token_does_not_apply_and_costs_nothing() -> None:
    """A step of decoding: what is one token is whole on every rank."""
    ((applied, detail),), sent, _ = entries(1, fxsp.SequenceParallelInput(1))
    assert not applied
    assert "one token: it stays whole" in detail
    assert not sent
    ((applied, _),), sent, _ = entries(2, fxsp.SequenceParallelInput(1))
    assert applied
    assert sent


class Pair(nn.Module):
    """A query of one token beside a sequence: cross-attention while decoding."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(8, 8)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        k, v = self.kv(context).unflatten(-1, (2, 2, 4)).permute(2, 0, 3, 1, 4).unbind()
        q = self.q(x).unflatten(-1, (2, 4)).transpose(1, 2)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_one_token_beside_a_sequence_that_is_split() -> None:
    plan = {"": {"x": fxsp.SequenceParallelInput(1), "context": fxsp.SequenceParallelInput(1)}}
    model, inputs = Pair(), (torch.randn(2, 1, 8), torch.randn(2, 13, 8))
    with torch.no_grad():
        report = explain(model, *inputs, world_size=3, plan=plan)
        evidence = fxsp.verify(model, *inputs, world_size=(2, 3), options={"plan": plan})
    assert evidence.ok, str(evidence)
    assert [p.applied for p in report.plan] == [False, True]
    assert [a.method for a in report.attentions] == ["merged"]
    assert len(report.collectives) == 1


def test_lengths_that_vary_bring_no_further_graph() -> None:
    """One token is a graph of its own in any case, by torch's own specialization of sizes of one."""
    torch.compiler.reset()
    reports: list[Any] = []
    fast = torch.compile(Model("sdpa"), backend=Simulated(2, by_plan({"plan": PLAN}, reports)), dynamic=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", fxsp.UnshardedWarning)
        for length in (5, 8, 1, 1, 11):
            fast(torch.randn(1, length, 24))
    assert len(reports) == 2
