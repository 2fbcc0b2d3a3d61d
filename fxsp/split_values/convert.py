"""Conversions of split values at run time, by the operators that graphs have for them (``fxsp.shard``, and others).

``R`` is a whole value, ``S`` this rank's part of it, ``S+`` a part whose pads are zero, as gradients are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.fx import Graph

from fxsp.passes.builder import Builder
from fxsp.report import Report
from fxsp.types import Length, Ranks, Shard, as_length

__all__ = ["masked", "sharded", "whole_of"]


class _AtOnce(Builder):
    """Runs the calls that a builder would write."""

    def __init__(self, ranks: Ranks, shape: Sequence[Any]) -> None:
        super().__init__(Graph(), ranks, Report(), training=False)
        self._known: dict[Length, Any] = {as_length(n): n for n in shape}

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    def size(self, length: Length) -> Any:
        return length if isinstance(length, int) else self._known[length]


def whole_of(local: Tensor, shape: Sequence[Any], type_: Shard, ranks: Ranks) -> Tensor:
    """``S -> R``, a collective: the value of global ``shape`` of which each rank has its ``local`` part."""
    build: Any = _AtOnce(ranks, shape)
    exposed, dim, back = build.expose(local, tuple(map(as_length, shape)), type_)
    found = back(build.gather(exposed, dim, type_.sequence, used=False), type_.sequence.length)
    assert isinstance(found, Tensor)
    return found


def sharded(whole: Tensor, type_: Shard, ranks: Ranks) -> Tensor:
    """``R -> S``: this rank's part, without communication; new memory."""
    build: Any = _AtOnce(ranks, whole.shape)
    return build.shard(whole, tuple(map(as_length, whole.shape)), type_).contiguous()  # type: ignore[no-any-return]


def masked(local: Tensor, shape: Sequence[Any], type_: Shard, ranks: Ranks) -> Tensor:
    """``S -> S+``: pads zeroed."""
    build: Any = _AtOnce(ranks, shape)
    return build.masked(local, tuple(map(as_length, shape)), type_)  # type: ignore[no-any-return]
