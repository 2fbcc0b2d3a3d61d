"""The order in which the dimensions of a value lie in memory, and values that are laid in memory in a given order."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Node

from fxsp.lengths import hint
from fxsp.types import as_length

__all__ = ["laid", "memory_order", "turned_back"]

aten = torch.ops.aten


def memory_order(value: torch.Tensor) -> list[int]:
    """The dimensions of a value, the outermost in memory first."""
    steps = [hint(as_length(stride)) for stride in value.stride()]
    return sorted(range(len(steps)), key=lambda d: -steps[d])


def turned_back(call: Callable[..., Node], x: Node, order: list[int]) -> Node:
    """``x``, whose dimensions are in ``order``, with dimension 0 first; ``call`` writes a call."""
    return _turned(call, x, [order.index(d) for d in range(len(order))])


def laid(call: Callable[..., Node], x: Node, order: list[int]) -> Node:
    """``x`` without gaps in memory, its dimensions there in ``order``, the outermost first."""
    return turned_back(call, call(aten.contiguous.default, _turned(call, x, order)), order)


def _turned(call: Callable[..., Node], x: Node, order: list[int]) -> Node:
    return x if order == sorted(order) else call(aten.permute.default, x, order)
