"""Tokens to split in small functions, and the implicit gathers of what becomes of them."""

from __future__ import annotations

from typing import Any

import torch

from fxsp.passes.base import Program
from tracing import shard

__all__ = ["W", "X", "Y", "implicit", "tokens"]

X = torch.randn(2, 5, 4, dtype=torch.float64)
Y = torch.randn(2, 5, 4, dtype=torch.float64)
W = torch.randn(4, 4, dtype=torch.float64)


def tokens(x: torch.Tensor, text: int = -1) -> torch.Tensor:
    """Split tokens that are not to be had whole without communication."""
    return torch.softmax(shard(x, 1, text), -1)


def implicit(program: Program) -> list[Any]:
    return [g for g in program.report.implicit_gathers if g.kind == "implicit"]
