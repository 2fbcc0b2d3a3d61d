"""A model whose values a plan names, and what *annotate* makes of a plan for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from capturing import Traced, compiled, trace
from fxsp.errors import PlanError
from fxsp.plan import SequenceParallelInput, SequenceParallelOutput

__all__ = ["IN", "OUT", "Model", "Pair", "Two", "X", "one", "only_record", "refused", "run"]

IN = SequenceParallelInput
OUT = SequenceParallelOutput
X = torch.randn(2, 5, 4)


class Two(nn.Module):
    """``(x, y) -> (x + 1, x * y)``."""

    def forward(self, x: torch.Tensor, y: Any = None, n: Any = None) -> Any:
        return x + 1, x * (3 if y is None else y)


class Pair(nn.Module):
    def forward(self, pair: Any) -> torch.Tensor:
        return pair[0] * pair[1]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.two, self.pair, self.same = Two(), Pair(), nn.Identity()
        self.extra = nn.ReLU()

    def forward(self, x: torch.Tensor, text: Any = None, number: int = 2) -> torch.Tensor:
        a, b = self.two(torch.sin(x) if text is None else x + text.sum(), n=text)
        return self.same(self.pair((a, b)))


def one(log: list[Traced]) -> Traced:
    (traced,) = log
    return traced


def run(plan: Any, *args: Any, model: nn.Module | None = None, **kwargs: Any) -> Traced:
    return one(trace(Model() if model is None else model, *(args or (X,)), plan=plan, **kwargs))


def refused(plan: Any, *args: Any, model: nn.Module | None = None) -> str:
    fast, _ = compiled(Model() if model is None else model, plan)
    with pytest.raises(Exception, match="plan entry") as error:
        fast(*(args or (X,)))
    assert isinstance(error.value.inner_exception, PlanError)  # type: ignore[attr-defined]
    return str(error.value.inner_exception)  # type: ignore[attr-defined]


def only_record(traced: Traced) -> tuple[bool, str]:
    (record,) = traced.records
    return record.applied, record.detail
