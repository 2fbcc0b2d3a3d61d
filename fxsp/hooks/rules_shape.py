"""What functions that move, cut or join dimensions do to split values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from fxsp.hooks.dispatch import gather, is_constant, mark, needs_whole, note_gather, rule
from fxsp.hooks.gradients import leave, use
from fxsp.hooks.layout import Layout, global_size, layout_of, local_size, means_local, moved, segments
from fxsp.hooks.region import Region
from fxsp.hooks.rules import aligned, argument, fit, marked, tensors_in
from fxsp.hooks.where import refuse

__all__ = ["meant_size", "one_token", "only_layout", "part", "segments_between"]

Func = Callable[..., Any]


def only_layout(name: str, x: Any, others: Any = ()) -> Layout:
    """The layout of the first operand, where the others may not be split."""
    layout = layout_of(x)
    split = [other for other in others if layout_of(other) is not None]
    if layout is None or split:
        found = layout_of(split[0]) if layout is None and split else layout
        needs_whole(name, "has a split argument where a whole one is needed", found)
    return layout


def meant_size(x: Tensor, layout: Layout, dim: int) -> int:
    """The size of a dimension as the model knows it."""
    return x.shape[dim] if dim != layout.dim or means_local(layout) else global_size(layout)


# --- reshapes: the tokens stay the same factor of all elements, in row-major order ------------------------------------


def reshaped(name: str, layout: Layout, old: Sequence[int], new: Sequence[int]) -> Layout:
    """The layout after a reshape from ``old`` to ``new`` sizes, as the model knows them."""
    size = local_size(layout) if means_local(layout) else global_size(layout)
    tokens = size // (layout.outer * layout.inner)
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


@rule("view reshape flatten unflatten ravel view_as reshape_as _unsafe_view")
def reshape(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x = args[0] if args else kwargs["input"]
    layout = only_layout(name, x)
    if isinstance(argument(args, kwargs, 1, "dtype"), torch.dtype):
        return mark(func(*args, **kwargs), layout)
    if means_local(layout):
        out = func(*args, **kwargs)
        return mark(out, reshaped(name, layout, x.shape, out.shape))
    old = [meant_size(x, layout, dim) for dim in range(x.dim())]
    asked = [_as_meant(value) for value in args[1:]]
    meta = torch.empty(old, device="meta", dtype=x.dtype)
    new = list(func(meta, *asked, **{key: value for key, value in kwargs.items() if key != "input"}).shape)
    after = reshaped(name, layout, old, new)
    new[after.dim] = local_size(after)
    return mark(x.view(new) if "view" in name else x.reshape(new), after)


def _as_meant(value: Any) -> Any:
    """A tensor whose shape is asked for: one of the global shape."""
    layout = layout_of(value)
    if layout is None:
        return value
    return torch.empty([meant_size(value, layout, dim) for dim in range(value.dim())], device="meta")


@rule("view_as_complex view_as_real")
def complex_view(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x = args[0]
    layout = only_layout(name, x)
    if name == "view_as_complex" and layout.dim == x.dim() - 1:
        needs_whole(name, "makes complex numbers of pairs of tokens", layout)
    return mark(func(*args, **kwargs), layout)


# --- permutations -----------------------------------------------------------------------------------------------------


def _permutation(name: str, x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[int]:
    """For each dimension of the result, the one of ``x`` that it was."""
    order = list(range(x.dim()))
    if name == "permute":
        dims = argument(args, kwargs, 1, "dims")
        dims = dims if isinstance(dims, (list, tuple)) else args[1:]
        return [d % x.dim() for d in dims]
    if name in ("movedim", "moveaxis"):
        source, target = argument(args, kwargs, 1, "source"), argument(args, kwargs, 2, "destination")
        return list(torch.empty(order, device="meta").movedim(source, target).shape)
    if name in ("t", ".T", ".H"):
        return order[::-1]
    if name in (".mT", ".mH", "adjoint"):
        first, second = -2, -1
    else:
        first, second = argument(args, kwargs, 1, "dim0 axis0"), argument(args, kwargs, 2, "dim1 axis1")
    order[first], order[second] = order[second], order[first]
    return order


@rule("permute transpose swapaxes swapdims t movedim moveaxis adjoint .T .H .mT .mH")
def permute(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x = args[0] if args else kwargs["input"]
    layout = only_layout(name, x)
    order = _permutation(name, x, args, kwargs)
    return mark(func(*args, **kwargs), moved(layout, order.index(layout.dim)))


@rule("squeeze")
def squeeze(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x = args[0] if args else kwargs["input"]
    layout = only_layout(name, x)
    dims = argument(args, kwargs, 1, "dim")
    local = means_local(layout)
    if dims is None and local and x.shape[layout.dim] == 1:
        refuse(name, "without a dimension drops that of the one local token; name the dimension")
    chosen = range(x.dim()) if dims is None else [d % x.dim() for d in (dims if not isinstance(dims, int) else [dims])]
    gone = [d for d in chosen if (global_size(layout) if d == layout.dim else x.shape[d]) == 1]
    if layout.dim in gone:
        return func(gather(x, layout, used=False), *args[1:], **kwargs)
    if layout.dim in chosen and local and x.shape[layout.dim] == 1:
        refuse(name, "drops the token dimension, whose local size is 1 but not its global one")
    return mark(x.squeeze(tuple(gone)), moved(layout, layout.dim - sum(1 for d in gone if d < layout.dim)))


@rule("unsqueeze")
def unsqueeze(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x = args[0] if args else kwargs["input"]
    layout = only_layout(name, x)
    at = argument(args, kwargs, 1, "dim") % (x.dim() + 1)
    return mark(func(*args, **kwargs), moved(layout, layout.dim + (at <= layout.dim)))


@rule("expand expand_as broadcast_to repeat tile")
def expand(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x = args[0] if args else kwargs["input"]
    layout = layout_of(x)
    if layout is None:  # whole.expand_as(split)
        return _expand_whole(name, func, x, args[1])
    back = layout.dim - x.dim()
    if name in ("repeat", "tile"):
        out = func(*args, **kwargs)
        if out.shape[back] != x.shape[back]:
            needs_whole(name, "repeats tokens", layout)
        return mark(out, moved(layout, out.dim() + back))
    if means_local(layout):
        out = func(*args, **kwargs)
        if out.shape[back] != x.shape[back]:
            refuse(name, "repeats tokens")
    else:
        sizes = argument(args, kwargs, 1, "size sizes other")
        if isinstance(sizes, Tensor):
            sizes = _as_meant(sizes).shape
        sizes = list(sizes) if isinstance(sizes, (list, tuple)) else list(args[1:])
        if sizes[back] != -1 and int(sizes[back]) != global_size(layout):
            needs_whole(name, "repeats tokens", layout)
        sizes[back] = -1
        out = x.expand(sizes)
    return mark(out, moved(layout, out.dim() + back))


def _expand_whole(name: str, func: Func, x: Tensor, like: Tensor) -> Tensor:
    layout = layout_of(like)
    assert layout is not None
    back = layout.dim - like.dim()
    if x.dim() >= -back and x.shape[back] != 1:
        x = fit(name, x, layout, back)
    return mark(func(use(x, layout.region), like), moved(layout, like.dim() + back))


# --- cutting ----------------------------------------------------------------------------------------------------------


def segments_between(layout: Layout, start: int, stop: int) -> tuple[Layout, int, int] | None:
    """Tokens ``start .. stop``, as the model counts them, if they are entire segments of the sequence: their layout,
    the first of their local rows, and how many there are."""
    if layout.outer != 1 or layout.inner != 1:
        return None
    begin = None
    at = first = 0
    for i, (row, rows, n, _) in enumerate(segments(layout)):
        if at == start and begin is None:
            begin, first = i, row
        at, last = at + (rows if means_local(layout) else n), row + rows
        if at == stop and begin is not None:
            lengths, wholes = layout.lengths[begin : i + 1], layout.whole[begin : i + 1]
            return Layout(layout.dim, lengths, wholes, layout.region), first, last - first
    return None


def part(name: str, x: Tensor, layout: Layout, start: int, stop: int) -> Tensor:
    """Tokens ``start .. stop`` of a split value, as the model counts them; they must be entire segments."""
    if stop <= start and not means_local(layout):  # nothing is left: every rank has it
        return x.narrow(layout.dim, 0, 0)
    found = segments_between(layout, start, stop)
    if found is None:
        needs_whole(name, f"cuts tokens {start}..{stop} out of segments of {_counted(layout)}", layout)
    cut, first, rows = found
    y = x.narrow(layout.dim, first, rows)
    return leave(y, cut) if all(cut.whole) else mark(y, cut)


def _counted(layout: Layout) -> str:
    local = [rows for _, rows, *_ in segments(layout)]
    return f"{local} local rows (global {layout.lengths})" if means_local(layout) else f"{list(layout.lengths)} tokens"


@rule("narrow")
def narrow(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x = args[0] if args else kwargs["input"]
    layout = only_layout(name, x)
    dim, start, length = (argument(args, kwargs, i, key) for i, key in ((1, "dim"), (2, "start"), (3, "length")))
    if dim % x.dim() != layout.dim:
        return mark(func(*args, **kwargs), layout)
    size = meant_size(x, layout, layout.dim)
    if length == size:
        return mark(x.view_as(x), layout)
    start = start + size if start < 0 else start
    return part(name, x, layout, start, start + length)


@rule("chunk split split_with_sizes tensor_split unsafe_chunk unsafe_split hsplit vsplit dsplit")
def split(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x = args[0] if args else kwargs.get("input", kwargs.get("tensor"))
    layout = only_layout(name, x)
    if name in ("hsplit", "vsplit", "dsplit"):
        needs_whole(name, "is not followed; use split with a dimension", layout)
    dim = argument(args, kwargs, 2, "dim", 0) % x.dim()
    if dim != layout.dim:
        return marked(func(*args, **kwargs), layout)
    meta = torch.empty([meant_size(x, layout, d) for d in range(x.dim())], device="meta")
    cut = func(meta, *args[1:], **{key: value for key, value in kwargs.items() if key not in ("input", "tensor")})
    pieces, start = [], 0
    for piece in cut:
        pieces.append(part(name, x, layout, start, start + piece.shape[dim]))
        start = start + piece.shape[dim]
    return type(cut)(pieces)


@rule("unbind")
def unbind(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x = args[0] if args else kwargs["input"]
    layout = only_layout(name, x)
    dim = argument(args, kwargs, 1, "dim", 0) % x.dim()
    if dim == layout.dim:
        needs_whole(name, "takes the tokens apart", layout)
    return marked(func(*args, **kwargs), moved(layout, layout.dim - (dim < layout.dim)))


@rule("select")
def select(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x = args[0] if args else kwargs["input"]
    layout = only_layout(name, x)
    dim, index = argument(args, kwargs, 1, "dim") % x.dim(), argument(args, kwargs, 2, "index")
    if dim == layout.dim:
        return one_token(name, x, layout, index, lambda whole: func(whole, dim, index))
    return mark(func(*args, **kwargs), moved(layout, layout.dim - (dim < layout.dim)))


def one_token(name: str, x: Tensor, layout: Layout, index: Any, take: Callable[[Tensor], Any]) -> Any:
    """One of all tokens; where numbers are local ones, only the first and the last are known."""
    if not means_local(layout):
        needs_whole(name, "takes one of all tokens", layout)
    if isinstance(index, int) and index in (0, -1):
        note_gather(name, layout, x, "takes one of all tokens")
        return take(gather(x, layout, used=False))
    refuse(name, f"takes the token {index}, which may be one of the local or of all tokens")


@rule("index_select")
def index_select(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x = args[0] if args else kwargs["input"]
    dim, index = argument(args, kwargs, 1, "dim") % x.dim(), argument(args, kwargs, 2, "index")
    layout, rows = layout_of(x), layout_of(index)
    if layout is None and rows is not None:
        return mark(func(use(x, rows.region), dim, index), moved(rows, dim))
    if layout is None or rows is not None or dim == layout.dim:
        needs_whole(name, "takes some of the tokens", layout or rows)
    return mark(func(*args, **kwargs), layout)


# --- joining ----------------------------------------------------------------------------------------------------------


@rule("cat concat concatenate")
def cat(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    parts = list(argument(args, kwargs, 0, "tensors"))
    parts = [x for x in parts if x.dim() != 1 or x.shape[0] != 0]  # torch lets empty vectors pass
    dim = argument(args, kwargs, 1, "dim axis", 0) % parts[0].dim()
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
                meant = _meant(name, x, region, x.shape[dim])
                lengths, whole = (*lengths, meant or x.shape[dim]), (*whole, meant is None)
        return mark(func(parts, dim), Layout(dim, lengths, whole, region))
    if any(layout.dim == dim for layout in layouts):
        needs_whole(name, "joins values along a dimension that holds tokens in some of them only", layouts[0])
    back = layouts[0].dim - parts[0].dim()
    new = [x if layout_of(x) is not None else fit(name, x, layouts[0], back) for x in parts]
    new, layout, _ = aligned(name, new) if len(layouts) > 1 else (new, layouts[0], 0)
    return mark(func(new, dim), layout)


def _meant(name: str, x: Tensor, region: Region, size: int) -> int | None:
    """The global length of a constant that was made of a local length (a mask of ones); None: the value is whole."""
    call = region.call
    if not is_constant(x) or not call.looks_local(size):
        return None
    if len(call.split[size]) > 1:
        refuse(name, f"joins a constant of {size} tokens: are they the local ones of {call.split[size]}?")
    return call.split[size][0]


@rule("stack")
def stack(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    parts, layout, _ = aligned(name, list(argument(args, kwargs, 0, "tensors")))
    dim = argument(args, kwargs, 1, "dim", 0) % (parts[0].dim() + 1)
    at = layout_of(next(x for x in parts if layout_of(x) is not None))
    assert at is not None
    return mark(func(parts, dim), moved(layout, at.dim + (dim <= at.dim)))


@rule("repeat_interleave")
def repeat_interleave(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x = args[0] if args else kwargs["input"]
    layout = only_layout(name, x, tensors_in([*args[1:], *kwargs.values()]))
    dim = argument(args, kwargs, 2, "dim")
    if dim is None or dim % x.dim() == layout.dim:
        needs_whole(name, "repeats tokens", layout)
    return mark(func(*args, **kwargs), layout)


@rule("pad constant_pad_nd")
def pad(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x = args[0] if args else kwargs["input"]
    layout = only_layout(name, x)
    amounts = list(argument(args, kwargs, 1, "pad"))
    first = 2 * (x.dim() - 1 - layout.dim)
    if any(amounts[first : first + 2]):
        needs_whole(name, "adds tokens", layout)
    return mark(func(*args, **kwargs), layout)
