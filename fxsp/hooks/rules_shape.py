"""What functions that move, cut or join dimensions do to split values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from fxsp.hooks.dispatch import Call, gather, mark, needs_whole
from fxsp.hooks.gradients import use
from fxsp.hooks.layout import (
    Layout,
    global_size,
    is_constant,
    layout_of,
    local_size,
    means_local,
    meant_shape,
    moved,
    segments,
)
from fxsp.hooks.region import Region
from fxsp.hooks.rules import aligned, marked
from fxsp.hooks.where import note_gather, refuse

__all__ = ["cat", "expand", "index_select", "narrow", "one_token", "part", "permute", "reshape"]
__all__ += ["segments_between", "select", "split", "squeeze", "stack", "unsqueeze"]


# --- reshapes: the tokens stay the same factor of all elements, in row-major order ------------------------------------


def reshaped(name: str, layout: Layout, old: Sequence[int], new: Sequence[int]) -> Layout:
    """The layout after a reshape from ``old`` to ``new`` sizes, as the model knows them."""
    tokens = old[layout.dim] // (layout.outer * layout.inner)
    after = layout.inner * prod(old[layout.dim + 1 :])
    found: list[Layout] = []
    rest = 1  # elements per step of the dimension at hand
    for dim in range(len(new) - 1, -1, -1):
        size = new[dim]
        if after % rest == 0 and size % (after // rest * tokens) == 0 and size:
            inner = after // rest
            found.append(Layout(dim, layout.lengths, layout.whole, layout.region, size // (inner * tokens), inner))
        rest = rest * size
    # An axis of its own is meant, where there is one; among axes of size one they cannot be told apart.
    own = [x for x in found if x.outer == 1 and x.inner == 1] or found[:1]
    same = [x for x in own if x.dim == layout.dim and list(old[: x.dim]) == list(new[: x.dim])]
    if len(own) > 1 and not same:
        needs_whole(name, f"leaves open which dimension of {tuple(new)} holds the {tokens} token(s)", layout)
    if not own:
        needs_whole(name, f"from {tuple(old)} to {tuple(new)} takes the dimension of {tokens} tokens apart", layout)
    return (same or own)[0]


def reshape(call: Call) -> Any:
    """Views and reshapes; ``view(dtype)``."""
    x, layout = call.x, layout_of(call.x) or call.layout()
    if isinstance(call.get(1, "dtype"), torch.dtype):
        return mark(call.run(), layout)
    out = call.as_meant()
    after = reshaped(call.name, layout, meant_shape(x), out.shape)
    if means_local(layout):
        return mark(out, after)
    new = list(out.shape)
    new[after.dim] = local_size(after)
    return mark(x.view(new) if "view" in call.name else x.reshape(new), after)


def squeeze(call: Call) -> Any:
    """Of a sequence of one token its dimension goes, too."""
    x, layout, dims = call.x, call.layout(), call.get(1, "dim")
    one = means_local(layout) and x.shape[layout.dim] == 1
    if dims is None and one:
        refuse(call.name, "without a dimension drops that of the one local token; name the dimension")
    chosen = range(x.dim()) if dims is None else [d % x.dim() for d in (dims if not isinstance(dims, int) else [dims])]
    gone = [d for d in chosen if (global_size(layout) if d == layout.dim else x.shape[d]) == 1]
    if layout.dim in gone:
        return call.func(gather(x, layout, used=False), *call.args[1:], **call.kwargs)
    if layout.dim in chosen and one:
        refuse(call.name, "drops the token dimension, whose local size is 1 but not its global one")
    return mark(x.squeeze(tuple(gone)), moved(layout, layout.dim - sum(1 for d in gone if d < layout.dim)))


def unsqueeze(call: Call) -> Any:
    """A dimension more."""
    layout, rank = call.layout(), call.x.dim()
    at = call.get(1, "dim") % (rank + 1)
    return mark(call.run(), moved(layout, layout.dim + (at <= layout.dim)))


def permute(call: Call) -> Any:
    """Permutations of all kinds: where the tokens go, a tensor shows whose sizes are the numbers of its dimensions."""
    layout = call.layout()
    numbered = torch.empty(list(range(call.x.dim())), device="meta")
    order = call.with_values(lambda x: numbered).shape
    return mark(call.run(), moved(layout, list(order).index(layout.dim)))


def expand(call: Call) -> Any:
    """Copies along other dimensions than that of the tokens; whole values get the shape of split ones."""
    x, layout = call.x, layout_of(call.x)
    if layout is None:  # whole.expand_as(split)
        new, layout, back = aligned(call.name, [x, call.args[1]])
        out = call.func(*new)
        return mark(out, moved(layout, out.dim() + back))
    back = layout.dim - x.dim()
    out = call.as_meant()
    if out.shape[back] != meant_shape(x)[back]:
        needs_whole(call.name, "repeats tokens", layout)
    if not means_local(layout):
        sizes = list(out.shape)
        sizes[back] = -1
        out = call.run() if call.name in ("repeat", "tile") else x.expand(sizes)
    return mark(out, moved(layout, out.dim() + back))


# --- cutting ----------------------------------------------------------------------------------------------------------


def segments_between(layout: Layout, start: int, stop: int) -> tuple[Layout, int, int] | None:
    """Tokens ``start .. stop``, as the model counts them, if they are entire segments of the sequence: their layout,
    the first of their local rows, and how many there are."""
    if layout.outer != 1 or layout.inner != 1:
        return None
    found = segments(layout)
    places = [(x.row, x.row + x.rows) if means_local(layout) else (x.start, x.start + x.length) for x in found]
    begin = next((i for i, (at, _) in enumerate(places) if at == start), None)
    end = next((i for i, (_, to) in enumerate(places) if to == stop), None)
    if begin is None or end is None or end < begin:
        return None
    first, last = found[begin].row, found[end].row + found[end].rows
    whole = layout.whole[begin : end + 1]
    return Layout(layout.dim, layout.lengths[begin : end + 1], whole, layout.region), first, last - first


def part(name: str, x: Tensor, layout: Layout, start: int, stop: int) -> Tensor:
    """Tokens ``start .. stop`` of a split value, as the model counts them; they must be entire segments."""
    if stop <= start and not means_local(layout):  # nothing is left: every rank has it
        return x.narrow(layout.dim, 0, 0)
    found = segments_between(layout, start, stop)
    if found is None:
        local = f"{[part.rows for part in segments(layout)]} local rows (global {layout.lengths})"
        counted = local if means_local(layout) else f"{list(layout.lengths)} tokens"
        needs_whole(name, f"cuts tokens {start}..{stop} out of segments of {counted}", layout)
    cut, first, rows = found
    y = x.narrow(layout.dim, first, rows)
    if not all(cut.whole):
        return mark(y, cut)
    # Rows that every rank has: whole from here on; their gradient is shared out among the ranks.
    return gather(y, cut, used=False) if torch.is_grad_enabled() and y.requires_grad else y


def narrow(call: Call) -> Any:
    """Entire segments, or a part of another dimension."""
    x, layout = call.x, call.layout()
    start, length, size = call.get(2, "start"), call.get(3, "length"), meant_shape(x)[layout.dim]
    if call.dim(1) != layout.dim:
        return mark(call.run(), layout)
    if length == size:
        return mark(x.view_as(x), layout)
    start = start + size if start < 0 else start
    return part(call.name, x, layout, start, start + length)


def split(call: Call) -> Any:
    """Pieces that are entire segments, or of another dimension."""
    x, layout = call.x, call.layout()
    if call.name in ("hsplit", "vsplit", "dsplit"):
        needs_whole(call.name, "is not followed; use split with a dimension", layout)
    dim = call.dim(2, 0)
    if dim != layout.dim:
        return marked(call.run(), layout)
    cut, pieces, start = call.as_meant(), [], 0
    for piece in cut:
        pieces.append(part(call.name, x, layout, start, start + piece.shape[dim]))
        start = start + piece.shape[dim]
    return type(cut)(pieces)


def select(call: Call) -> Any:
    """One row of another dimension, or a token."""
    x, layout, dim = call.x, call.layout(), call.dim(1)
    if dim == layout.dim:
        index = call.get(2, "index")
        return one_token(call.name, x, layout, index, lambda whole: call.func(whole, dim, index))
    return mark(call.run(), moved(layout, layout.dim - (dim < layout.dim)))


def one_token(name: str, x: Tensor, layout: Layout, index: Any, take: Callable[[Tensor], Any]) -> Any:
    """One of all tokens; where numbers are local ones, only the first and the last are known."""
    if not means_local(layout):
        needs_whole(name, "takes one of all tokens", layout)
    if isinstance(index, int) and index in (0, -1):
        note_gather(name, layout, x, "takes one of all tokens")
        return take(gather(x, layout, used=False))
    refuse(name, f"takes the token {index}, which may be one of the local or of all tokens")


def index_select(call: Call) -> Any:
    """Rows of a whole table by split numbers, or of another dimension."""
    dim, index = call.dim(1), call.get(2, "index")
    layout, rows = layout_of(call.x), layout_of(index)
    if layout is None and rows is not None:
        return mark(call.func(use(call.x, rows.region), dim, index), moved(rows, dim))
    if layout is None or rows is not None or dim == layout.dim:
        needs_whole(call.name, "takes some of the tokens", layout or rows)
    return mark(call.run(), layout)


# --- joining ----------------------------------------------------------------------------------------------------------


def cat(call: Call) -> Any:
    """Segments one after the other, or values side by side."""
    parts = [x for x in call.x if x.dim() != 1 or x.shape[0] != 0]  # torch lets empty vectors pass
    dim = call.get(1, "dim axis", 0) % parts[0].dim()
    layouts = [layout for layout in map(layout_of, parts) if layout is not None]
    if all(layout.dim == dim and layout.outer == layout.inner == 1 for layout in layouts):
        region = layouts[0].region
        lengths: tuple[int, ...] = ()
        whole: tuple[bool, ...] = ()
        for i, x in enumerate(parts):
            layout = layout_of(x)
            if layout is not None:
                lengths, whole = lengths + layout.lengths, whole + layout.whole
            elif x.shape[dim]:
                parts[i] = use(x, region)
                meant = _meant(call.name, x, region, x.shape[dim])
                lengths, whole = (*lengths, meant or x.shape[dim]), (*whole, meant is None)
        return mark(call.func(parts, dim), Layout(dim, lengths, whole, region))
    if any(layout.dim == dim for layout in layouts):
        why = "joins values along a dimension that holds tokens in some of them only"
        needs_whole(call.name, why, layouts[0])
    new, layout, back = aligned(call.name, parts)
    return mark(call.func(new, dim), moved(layout, new[0].dim() + back))


def _meant(name: str, x: Tensor, region: Region, size: int) -> int | None:
    """The global length of a constant that was made of a local length (a mask of ones); None: the value is whole."""
    call = region.call
    if not is_constant(x) or not call.looks_local(size):
        return None
    if len(call.split[size]) > 1:
        refuse(name, f"joins a constant of {size} tokens: are they the local ones of {call.split[size]}?")
    return call.split[size][0]


def stack(call: Call) -> Any:
    """Values side by side, along a new dimension."""
    parts, layout, back = aligned(call.name, call.x)
    at, dim = parts[0].dim() + back, call.get(1, "dim", 0) % (parts[0].dim() + 1)
    return mark(call.func(parts, dim), moved(layout, at + (dim <= at)))
