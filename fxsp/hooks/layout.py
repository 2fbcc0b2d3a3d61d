"""Which tokens a local tensor of eager mode holds: a layout, which the tensor carries."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxsp.hooks.region import Region
from fxsp.kernels.tokens import local_length

__all__ = ["Layout", "global_size", "layout_of", "local_size", "means_local", "moved", "same_tokens", "segments"]


class Layout(NamedTuple):
    """Dimension ``dim`` of a local tensor is ``outer * tokens * inner``; the tokens are this rank's of a sequence.

    ``lengths`` and ``whole`` describe the sequence: the global length of each segment, and whether it is entire on
    every rank (see ``fxsp.types.Sequence``).
    """

    dim: int
    lengths: tuple[int, ...]
    whole: tuple[bool, ...]
    region: Region
    outer: int = 1
    inner: int = 1


def layout_of(value: Any) -> Layout | None:
    """The layout of a split tensor; None for a whole one, and for anything else."""
    return getattr(value, "_fxsp_layout", None) if isinstance(value, Tensor) else None


def segments(layout: Layout) -> list[tuple[int, int, int, bool]]:
    """Of each segment: where its local rows begin and how many there are, its global length, whether it is whole."""
    result, start = [], 0
    for n, whole in zip(layout.lengths, layout.whole, strict=True):
        rows = local_length(n, whole, layout.region.size)
        result.append((start, rows, n, whole))
        start = start + rows
    return result


def local_size(layout: Layout) -> int:
    """Size of dimension ``dim`` on each rank, pads included."""
    return sum(rows for _, rows, *_ in segments(layout)) * layout.outer * layout.inner


def global_size(layout: Layout) -> int:
    """Size of dimension ``dim`` of the whole value."""
    return sum(layout.lengths) * layout.outer * layout.inner


def means_local(layout: Layout) -> bool:
    """Whether a number that the model computed from a shape is a local one (else it is that of one process)."""
    return bool(torch.compiler.is_compiling() or layout.region.alone)


def moved(layout: Layout, dim: int) -> Layout:
    """The same tokens along another dimension."""
    return Layout(dim, layout.lengths, layout.whole, layout.region, layout.outer, layout.inner)


def same_tokens(a: Layout, b: Layout) -> bool:
    """Whether two dimensions hold the same rows in the same order."""
    return (a.lengths, a.whole, a.outer, a.inner) == (b.lengths, b.whole, b.outer, b.inner)
