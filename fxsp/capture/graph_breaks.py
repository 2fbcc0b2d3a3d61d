"""Splits that outlive a graph: what is gathered only because a graph ends is split again in the next one.

A graph break, or a hook that Dynamo does not trace (FSDP puts two around each block), cuts a model into several
graphs.  Every graph takes and returns whole tensors, so that whatever runs in between is right; but a tensor that one
graph returned, and that was split within it, is worth splitting in the next one.  It is found again by its storage.
The split is a wish, as a plan entry is: it makes a program faster or slower, never wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fxsp import torch_internals

__all__ = ["Split", "Splits", "remembering", "same_view"]


@dataclass(frozen=True)
class Split:
    """Tokens along ``dim``, the first ``text`` of them whole on every rank (-1: none); ``name`` says which tokens."""

    dim: int
    text: int = -1
    name: str = "tokens"


def _view(tensor: Tensor) -> tuple[Any, ...]:
    """What part of which storage, in which order.  The stride of a dimension of size one says nothing, and differs:
    a gather leaves another one there than the hooks or the graph in between.  Without elements no stride says anything.
    """
    steps = () if not tensor.numel() else tuple(s for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1)
    return torch_internals.storage_key(tensor), tensor.storage_offset(), tuple(tensor.shape), steps


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor in memory of its own (a DTensor, or a tensor under a function transform, is not)."""
    return isinstance(value, Tensor) and torch_internals.is_plain_tensor(value)


def same_view(a: Any, b: Any) -> bool:
    """Whether two real tensors are the same part of the same storage, in the same order."""
    return _is_plain(a) and _is_plain(b) and _view(a) == _view(b)


@dataclass(eq=False)
class Splits:
    """What the graphs of one compilation returned and had split, as long as it lives."""

    _known: dict[tuple[Any, ...], tuple[Any, Split]] = field(default_factory=dict)
    _limit: int = 64

    def remember(self, tensor: Tensor, split: Split) -> None:
        if not _is_plain(tensor):
            return
        if len(self._known) >= self._limit:
            self._known = {view: row for view, row in self._known.items() if not row[0].expired()}
            self._limit = max(64, 2 * len(self._known))
        self._known[_view(tensor)] = torch_internals.storage_ref(tensor), split

    def find(self, tensor: Tensor) -> Split | None:
        row = self._known.get(_view(tensor)) if _is_plain(tensor) else None
        return None if row is None or row[0].expired() else row[1]


def remembering(run: Callable[..., Any], rows: Sequence[tuple[int, Split]], splits: Splits) -> Callable[..., Any]:
    """``run``, but outputs that were split (positions, and how) are remembered in ``splits``."""
    if not rows:
        return run

    def remembered(*args: Any) -> Any:
        outputs = run(*args)
        for position, split in rows:
            splits.remember(outputs[position], split)
        return outputs

    return remembered
