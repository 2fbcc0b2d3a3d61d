"""What functions that move, cut or join dimensions do to split values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from fxsp.hooks.layout import (
    Layout,
    gather,
    is_constant,
    layout_of,
    leave,
    local_size,
    mark,
    moved,
    note_gather,
    refuse,
    rule,
    use,
)
from fxsp.hooks.region import Region
from fxsp.hooks.rules import aligned, argument, fit, marked, separate, tensors_in
from fxsp.kernels.lowering import local_length

__all__ = ["only_layout"]

Func = Callable[..., Any]


def only_layout(name: str, x: Any, others: Any = ()) -> Layout:
    """The layout of the first operand, where the others may not be split."""
    layout = layout_of(x)
    if layout is None or any(layout_of(other) is not None for other in others):
        refuse(name, "has a split argument where a whole one is needed")
    return layout


# --- reshapes: the tokens stay the same factor of all elements, in row-major order ------------------------------------


def reshaped(name: str, layout: Layout, old: Sequence[int], new: Sequence[int]) -> Layout:
    """The layout after a reshape from ``old`` to ``new`` local sizes."""
    tokens = local_size(layout) // (layout.outer * layout.inner)
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
        refuse(name, f"leaves open which dimension of {tuple(new)} holds the {tokens} local token(s)")
    if not own:
        refuse(name, f"from {tuple(old)} to {tuple(new)} takes the dimension of {tokens} local tokens apart")
    return (same or own)[0]


@rule("view reshape flatten unflatten ravel view_as reshape_as _unsafe_view")
def reshape(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x = args[0] if args else kwargs["input"]
    layout = only_layout(name, x)
    out = func(*args, **kwargs)
    if isinstance(argument(args, kwargs, 1, "dtype"), torch.dtype):
        return mark(out, layout)
    return mark(out, reshaped(name, layout, x.shape, out.shape))


@rule("view_as_complex view_as_real")
def complex_view(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x = args[0]
    layout = only_layout(name, x)
    if name == "view_as_complex" and layout.dim == x.dim() - 1:
        refuse(name, "makes complex numbers of pairs of tokens")
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
    if dims is None and x.shape[layout.dim] == 1:
        refuse(name, "without a dimension drops that of the one local token; name the dimension")
    chosen = range(x.dim()) if dims is None else [d % x.dim() for d in (dims if not isinstance(dims, int) else [dims])]
    if layout.dim in chosen:
        if sum(layout.lengths) != 1 and x.shape[layout.dim] == 1:
            refuse(name, "drops the token dimension, whose local size is 1 but not its global one")
        chosen = [d for d in chosen if d != layout.dim]
        if sum(layout.lengths) == 1:
            return func(gather(x, layout, used=False), *args[1:], **kwargs)
    gone = sum(1 for d in chosen if d < layout.dim and x.shape[d] == 1)
    return mark(func(*args, **kwargs), moved(layout, layout.dim - gone))


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
    out = func(*args, **kwargs)
    if layout is None:  # whole.expand_as(split)
        other = layout_of(args[1])
        assert other is not None
        back = other.dim - args[1].dim()
        if x.dim() >= -back and x.shape[back] != 1:
            refuse(name, "needs the local length of a value that is whole")
        return mark(use(out, other.region), moved(other, out.dim() + back))
    back = layout.dim - x.dim()
    if out.shape[back] != x.shape[back]:
        refuse(name, "repeats tokens")
    return mark(out, moved(layout, out.dim() + back))


# --- cutting ----------------------------------------------------------------------------------------------------------


def part(name: str, x: Tensor, layout: Layout, start: int, stop: int) -> Tensor:
    """Mark local rows ``start .. stop`` of a split value, which must be whole segments of its sequence."""
    if layout.outer == 1 and layout.inner == 1:
        begin = None
        at = 0
        for i, (n, whole) in enumerate(zip(layout.lengths, layout.whole, strict=True)):
            if at == start and begin is None:
                begin = i
            at = at + local_length(n, whole, layout.region.size)
            if at == stop and begin is not None:
                lengths, wholes = layout.lengths[begin : i + 1], layout.whole[begin : i + 1]
                cut = Layout(layout.dim, lengths, wholes, layout.region)
                return leave(x, cut) if all(wholes) else mark(x, cut)
    local = [local_length(n, w, layout.region.size) for n, w in zip(layout.lengths, layout.whole, strict=True)]
    refuse(name, f"cuts local rows {start}..{stop} out of segments of {local} local rows (global {layout.lengths})")


@rule("narrow")
def narrow(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x = args[0] if args else kwargs["input"]
    layout = only_layout(name, x)
    dim, start, length = (argument(args, kwargs, i, key) for i, key in ((1, "dim"), (2, "start"), (3, "length")))
    out = func(*args, **kwargs)
    if dim % x.dim() != layout.dim or length == x.shape[layout.dim]:
        return mark(out, layout)
    start = start + x.shape[layout.dim] if start < 0 else start
    return part(name, out, layout, start, start + length)


@rule("chunk split split_with_sizes tensor_split unsafe_chunk unsafe_split hsplit vsplit dsplit")
def split(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x = args[0] if args else kwargs.get("input", kwargs.get("tensor"))
    layout = only_layout(name, x)
    if name in ("hsplit", "vsplit", "dsplit"):
        refuse(name, "is not followed; use split with a dimension")
    dim = argument(args, kwargs, 2, "dim", 0) % x.dim()
    out = func(*args, **kwargs)
    if dim != layout.dim:
        return marked(out, layout)
    pieces, start = [], 0
    for piece in separate(out):
        stop = start + piece.shape[dim]
        pieces.append(part(name, piece, layout, start, stop))
        start = stop
    return type(out)(pieces)


@rule("unbind")
def unbind(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x = args[0] if args else kwargs["input"]
    layout = only_layout(name, x)
    dim = argument(args, kwargs, 1, "dim", 0) % x.dim()
    if dim == layout.dim:
        refuse(name, "takes the tokens apart")
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
    """The first or the last token of all; any other number may have been made from a local length."""
    if isinstance(index, int) and index in (0, -1):
        note_gather(name, layout, x, "takes one of all tokens")
        return take(gather(x, layout, used=False))
    refuse(name, f"takes the token {index}, which may be one of the local or of all tokens")


@rule("index_select")
def index_select(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x = args[0] if args else kwargs["input"]
    dim, index = argument(args, kwargs, 1, "dim") % x.dim(), argument(args, kwargs, 2, "index")
    layout, rows = layout_of(x), layout_of(index)
    out = func(*args, **kwargs)
    if layout is None and rows is not None:
        return mark(func(use(x, rows.region), dim, index), moved(rows, dim))
    if layout is None or rows is not None or dim == layout.dim:
        refuse(name, "takes some of the tokens")
    return mark(out, layout)


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
        refuse(name, "joins values along a dimension that holds tokens in some of them only")
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
        refuse(name, "repeats tokens")
    return mark(func(*args, **kwargs), layout)


@rule("pad constant_pad_nd")
def pad(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x = args[0] if args else kwargs["input"]
    layout = only_layout(name, x)
    amounts = list(argument(args, kwargs, 1, "pad"))
    first = 2 * (x.dim() - 1 - layout.dim)
    if any(amounts[first : first + 2]):
        refuse(name, "adds tokens")
    return mark(func(*args, **kwargs), layout)
