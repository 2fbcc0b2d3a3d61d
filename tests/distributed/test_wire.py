"""Bytes: what the report says that a rank sends is what it sends, forward and backward, counted on real processes.

Counted is at the last place before the process group: every ``_c10d_functional`` operator that a compiled graph calls,
with the tensors and splits that it gets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any
from unittest import mock

import pytest
import torch
from test_ring_processes import Model as Grouped
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import fxsp
import models
import small
from distributed import Pool
from fxsp.inspection import profiler_names as marks

Ranks = Callable[[int], Pool]
TOKENS = {"": {"x": fxsp.SequenceParallelInput(1)}}


class Counting:
    """Stands in for the function that runs a collective, and adds up what this rank sends."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.sent: Counter[str] = Counter()

    def function(self) -> Callable[..., Any]:
        """What a graph calls has to be a function."""

        def counted(*args: Any) -> Any:
            return self.run(*args)

        return counted

    def run(self, label: str, namespace: str, name: str, *args: Any) -> Any:
        x, size = args[0], self.size
        all_bytes = Fraction(x.numel() * x.element_size())
        if name == "all_to_all_single":
            splits = args[2]
            rows, leaving = sum(splits), sum(n for r, n in enumerate(splits) if r != self.rank)
            to = [r for r, n in enumerate(splits) if n and r != self.rank]
            # A message to one rank is a step of a ring (of two ranks, an exchange also has one: its parts are equal).
            ring = len(to) == 1 and splits[self.rank] == 0
            self.sent["rotation" if ring else "all_to_all"] += all_bytes * Fraction(leaving, rows or 1)  # type: ignore[assignment]
        elif name == "all_gather_into_tensor":
            self.sent["all_gather"] += all_bytes * (size - 1)  # type: ignore[assignment]
        elif name == "reduce_scatter_tensor":
            self.sent["reduce_scatter"] += all_bytes * Fraction(size - 1, size)  # type: ignore[assignment]
        else:
            assert name == "all_reduce", name
            self.sent["all_reduce"] += all_bytes * Fraction(2 * (size - 1), size)  # type: ignore[assignment]
        return RUN(label, namespace, name, *args)


RUN = marks.named_collective


class Mixed(nn.Module):
    """What else sends: a mean, a learned table, an ignored target, an operator that needs all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small.Model(mix=True)
        self.table = nn.Parameter(torch.randn(1, 7, 8))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        scores = self.inner(x + self.table)
        loss = F.cross_entropy(scores.transpose(1, 2), target, ignore_index=0)
        return loss + scores.detach().mean() + scores.square().mean((1, 2)).sum()


class Saved(nn.Module):
    """Activation checkpoints, two of which need all tokens: a convolution, whose gradient needs its operand (it is
    gathered once more), and a cumulative sum, whose gradient does not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([small.Attention(), small.Attention()])
        self.mix = nn.Conv1d(8, 8, 3, padding=1)

    def _mixed(self, x: Tensor) -> Tensor:
        return x + self.mix(F.gelu(x).transpose(1, 2)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        x = checkpoint(self._mixed, x, use_reentrant=False)
        return checkpoint(lambda y: y + y.cumsum(1), x, use_reentrant=False)


def _x(tokens: int = 7, width: int = 8) -> Tensor:
    return torch.randn(2, tokens, width, generator=torch.Generator().manual_seed(1), requires_grad=True)


def _flux() -> Any:
    model, inputs = models.flux(image=5, text=3)
    return model, inputs, {}


def _llama() -> Any:
    model, inputs = models.llama(tokens=11, layers=1)
    return model, inputs, {"plan": {"": {"input_ids": fxsp.SequenceParallelInput(1)}}}


def _half() -> Any:
    return small.Model(mix=True).bfloat16(), {"x": _x().detach().bfloat16()}, {"plan": TOKENS}


#: Name -> model, keyword arguments, options.
CASES: dict[str, Callable[[], Any]] = {
    "flux": _flux,
    "llama": _llama,
    "mixed": lambda: (Mixed(), {"x": _x(), "target": torch.arange(14).view(2, 7) % 5}, {"plan": TOKENS}),
    "saved": lambda: (Saved(), {"x": _x()}, {"plan": TOKENS}),
    "half": _half,
    "grouped": lambda: (Grouped(kv=1), {"x": _x(9, 16)}, {}),
    "frozen": lambda: (small.Model().requires_grad_(False), {"x": _x()}, {"plan": TOKENS}),
    "deferred": lambda: (small.Model(), {"x": _x()}, {"plan": TOKENS, "grad_reduce": "defer"}),
    "ring": lambda: (Grouped(causal=True), {"x": _x(9, 16)}, {"ring_degree": 0}),
}


def _compare(rank: int, size: int, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Counted and reported bytes by kind (before it runs, on rank 0, and of the graph that runs), for a forward pass
    without gradients and for a step."""
    model, inputs, given = CASES[name]()
    options = {**given, **options}
    result: dict[str, Any] = {}
    for what in ("forward", "step"):
        counting = Counting(rank, size)
        with torch.set_grad_enabled(what == "step"):
            # What is known before it runs is the same on every rank: one of them asks.
            sent = {} if rank else fxsp.explain(model, world_size=size, options=options, **inputs).communication
            torch.compiler.reset()
            with mock.patch.object(marks, "named_collective", counting.function()):
                fast = torch.compile(model, backend="sp", options={**options, "inner": "aot_eager"})
                out = fast(**inputs)
                if what == "step":
                    sum(y.sum() for y in tree_leaves(out) if isinstance(y, Tensor)).backward()
        reported = {kind: count for kind, (_, count) in sent.items() if count}
        at_run_time = {kind: int(count) for kind, (_, count) in fxsp.reports()[-1].communication.items() if count}
        counted = {kind: count for kind, count in counting.sent.items() if count}
        result[what] = (counted, reported, at_run_time)
    return result


def agreed(results: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What each rank counted, which is what was reported before and when it was compiled."""
    for found in results:
        for what, (counted, _, at_run_time) in found.items():
            _, reported, _ = results[0][what]
            assert counted == reported == at_run_time, what
            yield what, counted


@pytest.mark.parametrize("name", [name for name in CASES if name != "ring"])
def test_two_ranks(name: str, ranks: Ranks) -> None:
    for what, counted in agreed(ranks(2).run(_compare, name, {})):
        assert counted, what


@pytest.mark.parametrize("degrees", [(1, 4), (2, 2), (4, 1)], ids=str)
def test_four_ranks(degrees: tuple[int, int], ranks: Ranks) -> None:
    options = {"ulysses_degree": degrees[0], "ring_degree": degrees[1]}
    for what, counted in agreed(ranks(4).run(_compare, "ring", options)):
        assert ("rotation" in counted) == (degrees[1] > 1), what
