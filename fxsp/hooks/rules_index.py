"""Indexing split values: ``x[...]`` and ``x[...] = y``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxsp.hooks.dispatch import mark, needs_whole, rule
from fxsp.hooks.gradients import use
from fxsp.hooks.layout import Layout, layout_of, means_local, moved
from fxsp.hooks.rules import aligned, fit
from fxsp.hooks.rules_shape import meant_size, one_token, only_layout, part, segments_between
from fxsp.hooks.where import refuse

__all__ = ["Place", "place_of"]

Func = Callable[..., Any]


class Place(NamedTuple):
    """Where a dimension ends up: its number in the result, and what is taken of it."""

    dim: int
    item: Any


def _items(name: str, index: Any, ndim: int) -> list[Any]:
    """The index, one item for each dimension and each None, without Ellipsis."""
    items = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(item, (list, bool)) for item in items):
        needs_whole(name, "takes a list or a bool as an index")
    used = sum(_width(item) for item in items if item is not None and item is not Ellipsis)
    result: list[Any] = []
    dots = [i for i, item in enumerate(items) if item is Ellipsis]
    at = dots[0] if dots else len(items)
    result += items[:at]
    result += [slice(None)] * (ndim - used)
    result += items[at + 1 :]
    return result


def _width(item: Any) -> int:
    """How many dimensions an index item consumes: a mask takes all of its own."""
    return item.dim() if isinstance(item, Tensor) and item.dtype == torch.bool else 1


def place_of(name: str, index: Any, ndim: int, dim: int) -> Place:
    """What ``x[index]`` does with dimension ``dim`` of an ``x`` with ``ndim`` dimensions."""
    items = _items(name, index, ndim)
    tensors = [item for item in items if isinstance(item, Tensor)]
    if len(tensors) > 1 or any(layout_of(t) is not None for t in tensors) or any(_width(t) != 1 for t in tensors):
        needs_whole(name, "takes several tensors, a mask or split values as an index")
    source = target = 0
    place: Place | None = None
    for item in items:
        if item is None:
            target += 1
            continue
        if source == dim:
            place = Place(target, item)
        source += 1
        if isinstance(item, Tensor):
            target += item.dim()
        elif isinstance(item, slice):
            target += 1
    assert place is not None
    return place


def _bounds(name: str, item: slice, size: int) -> tuple[int, int]:
    if item.step not in (None, 1):
        needs_whole(name, "takes tokens at a distance from each other")
    start = 0 if item.start is None else item.start
    stop = size if item.stop is None else item.stop
    start = start + size if start < 0 else start
    stop = stop + size if stop < 0 else stop
    return start, min(stop, size)


def _all_tokens(name: str, index: Any, ndim: int, dim: int) -> tuple[Any, ...]:
    """The index with all of dimension ``dim``."""
    items = _items(name, index, ndim)
    real = [i for i, item in enumerate(items) if item is not None]
    items[real[dim]] = slice(None)
    return tuple(items)


@rule("getitem")
def getitem(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x, index = args
    layout = layout_of(x)
    if layout is None:
        return _rows_of_table(name, func, x, index)
    layout = only_layout(name, x)
    place = place_of(name, index, x.dim(), layout.dim)
    size = meant_size(x, layout, layout.dim)
    if isinstance(place.item, slice):
        start, stop = _bounds(name, place.item, size)
        target = moved(layout, place.dim)
        out = func(x, _all_tokens(name, index, x.dim(), layout.dim))
        return mark(out, target) if (start, stop) == (0, size) else part(name, out, target, start, stop)
    if isinstance(place.item, int):
        return one_token(name, x, layout, place.item, lambda whole: func(whole, index))
    needs_whole(name, "takes tokens by a tensor of numbers", layout)


def _rows_of_table(name: str, func: Func, table: Tensor, index: Any) -> Any:
    """``table[split positions]``."""
    rows = layout_of(index)
    if rows is None and isinstance(index, tuple) and len(index) == 1:
        rows = layout_of(index[0])
    if rows is None:
        needs_whole(name, "takes split values as one of several indices")
    if index is not None and (index[0] if isinstance(index, tuple) else index).dtype == torch.bool:
        needs_whole(name, "takes what a split mask chooses", rows)
    return mark(func(use(table, rows.region), index), rows)


@rule("setitem")
def setitem(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x, index, value = args
    layout, given = layout_of(x), layout_of(value)
    if layout is None:
        if given is None:
            needs_whole(name, "takes split values as an index")
        if not means_local(given):
            needs_whole(name, "writes split tokens into a whole tensor", given)
        _write_new(name, func, x, index, value, given)
        return None
    place = place_of(name, index, x.dim(), layout.dim)
    size = meant_size(x, layout, layout.dim)
    bounds = _bounds(name, place.item, size) if isinstance(place.item, slice) else None
    found = segments_between(layout, *bounds) if bounds is not None and bounds != (0, size) else None
    if bounds is None or (bounds != (0, size) and found is None):
        needs_whole(name, "writes to some of the tokens", layout)
    index = _all_tokens(name, index, x.dim(), layout.dim)
    if found is not None:
        layout, first, rows = found
        x = x.narrow(layout.dim, first, rows)
    if isinstance(value, Tensor):
        target = moved(layout, place.dim)
        back = place.dim - _target_dims(name, index, x)
        if given is not None and all(target.whole):
            needs_whole(name, "writes split tokens to whole ones", given)
        if given is None:
            value = use(value, target.region) if all(target.whole) else fit(name, value, target, back)
        else:
            value = aligned(name, [mark(x[index], target), value])[0][1]
    return func(x, index, value)


def _target_dims(name: str, index: Any, x: Tensor) -> int:
    """Dimensions of ``x[index]``."""
    count = 0
    for item in _items(name, index, x.dim()):
        count += item.dim() if isinstance(item, Tensor) else not isinstance(item, int)
    return count


def _write_new(name: str, func: Func, x: Tensor, index: Any, value: Tensor, given: Layout) -> None:
    """A new local buffer becomes split by what is written into it."""
    back = given.dim - value.dim()
    ndim = _target_dims(name, index, x)
    for dim in range(x.dim()):
        place = place_of(name, index, x.dim(), dim)
        if place.dim == ndim + back and isinstance(place.item, slice):
            if x.shape[dim] != value.shape[given.dim] or _bounds(name, place.item, x.shape[dim]) != (0, x.shape[dim]):
                refuse(name, "writes split tokens into a whole tensor")
            func(x, index, value)
            mark(x, moved(given, dim))
            return
    refuse(name, "writes split tokens into a whole tensor")
