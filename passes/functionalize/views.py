"""Views as data: how to see a part of a tensor, and how to write it back into the whole.

A :class:`View` is one step from a tensor to a view of it.  ``see`` writes nodes that give the view of a (new) whole;
``put`` writes nodes that give the whole with the view replaced by a value: ``slice_scatter`` for a slice, the inverse
permutation for a permutation, a reshape back for a reshape.

Which operators make views is known from their schemas; whether a result *is* a view (``reshape``, ``contiguous`` and
``to`` may copy) is for the caller to find out from the fakes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fxsp import torch_internals
from fxsp.passes.builder import Writer
from fxsp.passes.graph import Call
from fxsp.passes.normalize.retrace import is_annotation
from fxsp.passes.rules.dims import order
from fxsp.passes.rules.families import names_of
from fxsp.types import as_length, same_length

__all__ = ["Piece", "View", "cover", "view_of"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Piece:
    """The rows ``start : stop : step`` of dimension ``dim``; ``stop`` None is the end."""

    dim: int
    start: int
    stop: int | None
    step: int


@dataclass(frozen=True)
class View:
    """One step from a whole to a view of it."""

    see: Callable[[Writer, Node], Node]
    put: Callable[[Writer, Node, Node], Node]
    #: The view has all elements of the whole: ``put`` reads nothing of the old whole but its shape.
    complete: bool = False
    #: The rows that a slice takes, if they are known.
    piece: Piece | None = None
    #: Writes through this view are cut off from the gradient of the whole.
    detaches: bool = False
    #: The view is the whole, as it is.
    identity: bool = False


_IDENTITY = View(lambda _, whole: whole, lambda _, __, value: value, complete=True, identity=True)


def view_of(node: Node, whole: Node, index: int | None = None) -> View | None:
    """The view that ``node``, or its result ``index``, makes of ``whole``; None for an unknown one."""
    name = torch_internals.schema(node.target).name
    if is_annotation(node.target):
        return _inverted(node, lambda _, __, value: value)
    if index is None and name != "aten::detach" and _same_place(node.meta["val"], whole.meta["val"]):
        return _IDENTITY
    namespace, _, name = name.partition("::")
    return _view(name.removesuffix("_"), node, whole, index) if namespace == "aten" else None


def _same_place(a: Any, b: Any) -> bool:
    if a.ndim != b.ndim or a.dtype != b.dtype:
        return False
    facts = ((*t.shape, *t.stride(), t.storage_offset()) for t in (a, b))
    # Certainly: a slice that is all of the tensor at the length seen may be a part of it at another.
    return all(same_length(as_length(x), as_length(y)) for x, y in zip(*facts, strict=True))


def _again(node: Node) -> Callable[[Writer, Node], Node]:
    """See by calling the same operator again, on another whole.

    The whole is the first argument, whichever of its values that is by now: what has several results was made to read
    the value of its time before its results are looked at.
    """
    target, args, kwargs = node.target, node.args[1:], node.kwargs
    assert callable(target)
    return lambda w, base: w.call(target, base, *args, **kwargs)


def _inverted(node: Node, put: Callable[[Writer, Node, Node], Node], *, detaches: bool = False) -> View:
    """A view that has all elements of the whole."""
    return View(_again(node), put, complete=True, detaches=detaches)


def _view(name: str, node: Node, whole: Node, index: int | None) -> View | None:
    a, value = Call(node).arguments, whole.meta["val"]
    if name in names_of("reshape") and "dtype" not in a:
        return _inverted(node, lambda w, base, v: w.call(aten.reshape.default, v, w.sizes_of(base)))
    if name in names_of("permute") - names_of("conjugates"):
        moved = order(node.target, a, value.ndim)
        inverse = [moved.index(d) for d in range(len(moved))]
        return _inverted(node, lambda w, _, v: w.call(aten.permute.default, v, inverse))
    if name in names_of("split", "unsafe_split") and index is not None:
        return _part(node, whole, a.get("dim", 0), index)
    match name:
        case "view":
            return _inverted(node, lambda w, _, v: w.call(aten.view.dtype, v, value.dtype))
        case "view_as_real":
            return _inverted(node, lambda w, _, v: w.call(aten.view_as_complex.default, v))
        case "view_as_complex":
            return _inverted(node, lambda w, _, v: w.call(aten.view_as_real.default, v))
        case "detach":
            return _inverted(node, lambda _, __, v: v, detaches=True)
        case "slice":
            return _sliced(whole, a["dim"], a["start"], a["end"], a["step"])
        case "narrow":
            return _narrowed(node, whole, a["dim"], a["start"], a["length"])
        case "select":
            return _selected(a["dim"], a["index"])
        case "unbind" if index is not None:
            return _selected(a["dim"], index)
        case "diagonal":
            where = (a["offset"], a["dim1"], a["dim2"])
            return View(_again(node), lambda w, base, v: w.call(aten.diagonal_scatter.default, base, v, *where))
        case "real" if value.is_complex():
            other = aten.imag.default
            return View(_again(node), lambda w, base, v: w.call(aten.complex.default, v, w.call(other, base)))
        case "imag":
            other = aten.real.default
            return View(_again(node), lambda w, base, v: w.call(aten.complex.default, w.call(other, base), v))
    return None


def _sliced(whole: Node, dim: int, start: Any, stop: Any, step: Any = 1) -> View | None:
    """``whole[start:stop:step]`` along ``dim``, as an operator that can be written back."""
    size = whole.meta["val"].shape[dim]
    dim %= whole.meta["val"].ndim
    piece = _piece(size, dim, start, stop, step)
    if piece == Piece(dim, 0, None, 1):
        return _IDENTITY
    see = lambda w, base: w.call(aten.slice.Tensor, base, dim, start, stop, step)  # noqa: E731
    put = lambda w, base, v: w.call(aten.slice_scatter.default, base, v, dim, start, stop, step)  # noqa: E731
    return View(see, put, piece=piece)


def _piece(size: Any, dim: int, start: Any, stop: Any, step: Any) -> Piece | None:
    start = 0 if start is None else start
    if not isinstance(start, int) or not isinstance(step, int):
        return None
    if isinstance(size, int) and isinstance(stop, int | None):
        start, stop, step = slice(start, stop, step).indices(size)
        return Piece(dim, start, None if stop == size else stop, step)
    if start >= 0 and (stop is None or (isinstance(stop, int) and stop >= 2**62)):
        return Piece(dim, start, None, step)
    return None


def _narrowed(node: Node, whole: Node, dim: int, start: Any, length: Any) -> View | None:
    if isinstance(start, int) and isinstance(length, int):
        size = whole.meta["val"].shape[dim]
        if start < 0:
            if not isinstance(size, int):
                return None
            start += size
        return _sliced(whole, dim, start, start + length)
    dim %= whole.meta["val"].ndim

    def put(w: Writer, base: Node, v: Node) -> Node:
        return w.call(aten.slice_scatter.default, base, v, dim, start, w.call(operator.add, start, length))

    return View(_again(node), put)


def _part(node: Node, whole: Node, dim: int, index: int) -> View | None:
    """One of the results of ``split``, ``chunk`` and the like."""
    sizes = [part.shape[dim] for part in node.meta["val"]]
    index %= len(sizes)
    if all(isinstance(size, int) for size in sizes):
        start = sum(sizes[:index])
        return _sliced(whole, dim, start, start + sizes[index])
    again = _again(node)

    def part(w: Writer, base: Node) -> Node:
        return w.call(operator.getitem, again(w, base), index)

    def put(w: Writer, base: Node, value: Node) -> Node:
        parts = again(w, base)
        all_of_them = [value if i == index else w.call(operator.getitem, parts, i) for i in range(len(sizes))]
        return w.call(aten.cat.default, all_of_them, dim)

    return View(part, put)


def _selected(dim: int, index: Any) -> View:
    return View(
        lambda w, base: w.call(aten.select.int, base, dim, index),
        lambda w, base, v: w.call(aten.select_scatter.default, base, v, dim, index),
    )


def cover(w: Writer, size: Any, writes: Sequence[tuple[Piece | None, Node]]) -> Node | None:
    """The whole if writes to pieces of one dimension cover all of it (what was there before is gone), else None.

    ``out[..., 0::2] = a; out[..., 1::2] = b`` is ``flatten(stack([a, b], -1), -2)``; consecutive pieces are a ``cat``.
    """
    last = dict(writes)
    pieces = [piece for piece in last if piece is not None]
    if not isinstance(size, int) or len(pieces) != len(last) or len({(p.dim, p.step) for p in pieces}) != 1:
        return None
    dim, step = pieces[0].dim, pieces[0].step
    pieces.sort(key=lambda p: p.start)
    values = [last[piece] for piece in pieces]
    if step == 1:
        stops = [size if p.stop is None else p.stop for p in pieces]
        if [p.start for p in pieces] != [0, *stops[:-1]] or stops[-1] != size:
            return None
        return values[0] if len(values) == 1 else w.call(aten.cat.default, values, dim)
    if [p.start for p in pieces] != list(range(step)) or any(p.stop is not None for p in pieces) or size % step:
        return None
    return w.call(aten.flatten.using_ints, w.call(aten.stack.default, values, dim + 1), dim, dim + 1)
