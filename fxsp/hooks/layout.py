"""Which tokens a local tensor of eager mode holds: a layout, which the tensor carries."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxsp.hooks.region import Region
from fxsp.kernels.tokens import Part, placed

__all__ = ["Layout", "global_size", "layout_of", "local_size", "means_local", "meant_shape", "moved", "same_tokens"]
__all__ += ["is_constant", "mapped", "segments", "split_in"]


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


def split_in(values: Iterable[Any]) -> list[Tensor]:
    """The split tensors among arguments, lists and tuples of them included."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, (list, tuple)):
            found += split_in(value)
        elif layout_of(value) is not None:
            found.append(value)
    return found


def mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """An argument or result with its tensors changed: those in lists, tuples and slices, too."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        items = [mapped(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, slice):
        return slice(mapped(value.start, change), mapped(value.stop, change), mapped(value.step, change))
    return value


def is_constant(x: Any) -> bool:
    """Whether a whole tensor has one value everywhere (known only where a ``SplitMode`` saw how it was made)."""
    return isinstance(x, Tensor) and getattr(x, "_fxsp_constant", False)


def segments(layout: Layout) -> list[Part]:
    """The segments of its sequence, and where their rows lie on each rank."""
    return placed(layout.lengths, layout.whole, layout.region.size)


def local_size(layout: Layout) -> int:
    """Size of dimension ``dim`` on each rank, pads included."""
    rows: int = sum(part.rows for part in segments(layout))
    return rows * layout.outer * layout.inner


def global_size(layout: Layout) -> int:
    """Size of dimension ``dim`` of the whole value."""
    return sum(layout.lengths) * layout.outer * layout.inner


def means_local(layout: Layout) -> bool:
    """Whether a number that the model computed from a shape is a local one (else it is that of one process)."""
    return bool(torch.compiler.is_compiling() or layout.region.alone)


def meant_shape(x: Tensor) -> list[int]:
    """The sizes of a tensor, split or whole, as the model knows them."""
    sizes, layout = list(x.shape), layout_of(x)
    if layout is not None and not means_local(layout):
        sizes[layout.dim] = global_size(layout)
    return sizes


def moved(layout: Layout, dim: int) -> Layout:
    """The same tokens along another dimension."""
    return Layout(dim, layout.lengths, layout.whole, layout.region, layout.outer, layout.inner)


def same_tokens(a: Layout, b: Layout) -> bool:
    """Whether two dimensions hold the same rows in the same order."""
    return (a.lengths, a.whole, a.outer, a.inner) == (b.lengths, b.whole, b.outer, b.inner)
