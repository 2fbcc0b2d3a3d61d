"""Indexing split values: ``x[...]`` and ``x[...] = y``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxsp.hooks.dispatch import Call, mark, needs_whole
from fxsp.hooks.gradients import use
from fxsp.hooks.layout import Layout, layout_of, means_local, meant_shape, moved, split_in
from fxsp.hooks.rules import aligned, fit
from fxsp.hooks.rules_shape import one_token, part, segments_between
from fxsp.hooks.where import refuse

__all__ = ["getitem", "setitem"]


class _Place(NamedTuple):
    """What is taken of a dimension, and the number of the first dimension of the result that comes of it."""

    item: Any
    dim: int


def _places(name: str, index: Any, ndim: int) -> tuple[list[_Place], list[Any], int]:
    """``x[index]``: each dimension of an ``x`` of ``ndim``, the index without Ellipsis, dimensions of the result."""
    items = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(item, (list, bool)) for item in items):
        needs_whole(name, "takes a list or a bool as an index")
    tensors = [item for item in items if isinstance(item, Tensor)]
    masks = [item for item in tensors if item.dtype == torch.bool and item.dim() != 1]
    if len(tensors) > 1 or split_in(tensors) or masks:
        needs_whole(name, "takes several tensors, a mask or split values as an index")
    dots = [i for i, item in enumerate(items) if item is Ellipsis]
    at = dots[0] if dots else len(items)
    rest = [slice(None)] * (ndim - sum(1 for item in items if item is not None and item is not Ellipsis))
    items = [*items[:at], *rest, *items[at + 1 :]]
    places: list[_Place] = []
    dim = 0
    for item in items:
        if item is not None:
            places.append(_Place(item, dim))
        dim += item.dim() if isinstance(item, Tensor) else item is None or isinstance(item, slice)
    return places, items, dim


def _bounds(name: str, item: slice, size: int) -> tuple[int, int]:
    if item.step not in (None, 1):
        needs_whole(name, "takes tokens at a distance from each other")
    start = 0 if item.start is None else item.start
    stop = size if item.stop is None else item.stop
    start = start + size if start < 0 else start
    stop = stop + size if stop < 0 else stop
    return start, min(stop, size)


def _all_tokens(items: list[Any], dim: int) -> tuple[Any, ...]:
    """The index with all of dimension ``dim``."""
    real = [i for i, item in enumerate(items) if item is not None]
    return tuple(slice(None) if i == real[dim] else item for i, item in enumerate(items))


def getitem(call: Call) -> Any:
    """Entire segments, one of all tokens, parts of other dimensions; rows of a table by split numbers."""
    name, (x, index), layout = call.name, call.args, layout_of(call.x)
    if layout is None:
        return _rows_of_table(call, x, index)
    places, items, _ = _places(name, index, x.dim())
    place, size = places[layout.dim], meant_shape(x)[layout.dim]
    if isinstance(place.item, slice):
        start, stop = _bounds(name, place.item, size)
        target = moved(layout, place.dim)
        out = call.func(x, _all_tokens(items, layout.dim))
        return mark(out, target) if (start, stop) == (0, size) else part(name, out, target, start, stop)
    if isinstance(place.item, int):
        return one_token(name, x, layout, place.item, lambda whole: call.func(whole, index))
    needs_whole(name, "takes tokens by a tensor of numbers", layout)


def _rows_of_table(call: Call, table: Tensor, index: Any) -> Any:
    """``table[split positions]``."""
    if isinstance(index, tuple) and len(index) == 1:
        index = index[0]
    rows = layout_of(index)
    if rows is None:
        needs_whole(call.name, "takes split values as one of several indices")
    if index.dtype == torch.bool:
        needs_whole(call.name, "takes what a split mask chooses", rows)
    return mark(call.func(use(table, rows.region), index), rows)


def setitem(call: Call) -> Any:
    """A write into all tokens or entire segments, of a split value or one for all; into a new buffer, that is split
    from then on."""
    name, (x, index, value) = call.name, call.args
    layout, given = layout_of(x), layout_of(value)
    if layout is None:
        if given is None:
            needs_whole(name, "takes split values as an index")
        if not means_local(given):
            needs_whole(name, "writes split tokens into a whole tensor", given)
        return _write_new(call, given)
    places, items, ndim = _places(name, index, x.dim())
    place, size = places[layout.dim], meant_shape(x)[layout.dim]
    bounds = _bounds(name, place.item, size) if isinstance(place.item, slice) else None
    found = segments_between(layout, *bounds) if bounds is not None and bounds != (0, size) else None
    if bounds is None or (bounds != (0, size) and found is None):
        needs_whole(name, "writes to some of the tokens", layout)
    index = _all_tokens(items, layout.dim)
    if found is not None:
        layout, first, rows = found
        x = x.narrow(layout.dim, first, rows)
    if isinstance(value, Tensor):
        target = moved(layout, place.dim)
        if given is not None and all(target.whole):
            needs_whole(name, "writes split tokens to whole ones", given)
        if given is None:
            back = place.dim - ndim
            value = use(value, target.region) if all(target.whole) else fit(name, value, target, back)
        else:
            value = aligned(name, [mark(x[index], target), value])[0][1]
    return call.func(x, index, value)


def _write_new(call: Call, given: Layout) -> None:
    """A new local buffer becomes split by what is written into it."""
    name, (x, index, value) = call.name, call.args
    places, _, ndim = _places(name, index, x.dim())
    for dim, place in enumerate(places):
        if place.dim == ndim + given.dim - value.dim() and isinstance(place.item, slice):
            if x.shape[dim] != value.shape[given.dim] or _bounds(name, place.item, x.shape[dim]) != (0, x.shape[dim]):
                break
            call.run()
            mark(x, moved(given, dim))
            return
    refuse(name, "writes split tokens into a whole tensor")
