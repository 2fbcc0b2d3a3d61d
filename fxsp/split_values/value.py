"""A split value at run time: this rank's rows, under the shape of the whole.

A :class:`SplitTensor` keeps the meaning of one device: it shows the global shape, strides and dtype, and whatever
touches it sees the whole value.  What needs the rows of other ranks gathers them, on all ranks (``fxsp.whole(x)``); the
whole is kept, so that a value is gathered once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fxsp import torch_internals
from fxsp.errors import UnsupportedError
from fxsp.lengths import as_length
from fxsp.split_values.convert import sharded, whole_of
from fxsp.split_values.forward import gathering
from fxsp.types import Ranks, Sequence, Shard

__all__ = ["Family", "Kind", "Placed", "SplitTensor", "dense", "handle_with"]


def dense(x: Tensor) -> Tensor:
    """``x`` in order, with the strides of its shape for sizes of one, too: guards and some operators read them."""
    if x.is_contiguous():
        expected = 1
        for size, stride in zip(reversed(x.shape), reversed(x.stride()), strict=True):
            if stride != expected:
                break
            expected *= size
        else:
            return x
    return x.contiguous().view(-1).view(x.shape)


@dataclass(frozen=True)
class Placed:
    """How a value lies on the ranks: its type (no segment is whole), and this rank among them."""

    type: Shard
    ranks: Ranks
    #: Whether pads are zero, as those of gradients are.
    zero_pads: bool = False

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.type, self.ranks, self.zero_pads))

    def for_shape(self, shape: Any) -> Shard:
        """The type of a tensor of this kind and shape, whose lengths may be symbols."""
        if not self.type.is_one_sequence:
            return self.type
        (segment,) = self.type.sequence.segments
        length = as_length(shape[self.type.dim])
        return replace(self.type, sequence=Sequence((replace(segment, length=length),)))

    def same_kind(self, other: Placed) -> bool:
        """Whether a graph for one is a graph for the other: lengths that the shape tells are left to its guards."""
        if self.ranks != other.ranks or self.zero_pads != other.zero_pads or self.type.dim != other.type.dim:
            return False
        if not (self.type.is_one_sequence and other.type.is_one_sequence):
            return self.type == other.type
        (a,), (b,) = self.type.sequence.segments, other.type.sequence.segments
        return a.layout == b.layout


@dataclass(eq=False, frozen=True, slots=True)
class Kind:
    """What decides by which program a split value is run: one object for all values of equal type, shape and dtype."""

    placed: Placed
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


#: Kinds that are known; they are compared by identity, so one that is forgotten is made, and programs for it, anew.
_kinds: dict[Any, Kind] = {}
_KEPT = 4096


def _kind_of(placed: Placed, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Kind:
    key = placed, shape, dtype, device
    found = _kinds.get(key)
    if found is None:
        if len(_kinds) >= _KEPT:
            _kinds.clear()  # shapes that change for ever
        found = _kinds[key] = Kind(*key)
    return found


@dataclass(eq=False)
class Family:
    """Split values that are views of one memory on one device, and here have memory of their own.

    As long as nobody writes, nobody sees the difference; who writes, while another one lives, is told.
    """

    members: list[tuple[weakref.ref[SplitTensor], int]]

    def join(self, *members: SplitTensor) -> None:
        new = {id(x) for x in members}
        left = [(ref, seen) for ref, seen in self.members if (x := ref()) is not None and id(x) not in new]
        self.members = [*left, *((weakref.ref(x), torch_internals.version(x)) for x in members)]

    def check(self, reader: SplitTensor) -> None:
        """Raises UnsupportedError where another member was written to."""
        if any(x is not reader and torch_internals.version(x) != seen for x, seen in self._living()):
            raise self.error(reader)

    def others(self, writer: SplitTensor) -> bool:
        """Whether another member lives."""
        return any(x is not writer for x, _ in self._living())

    def _living(self) -> Iterator[tuple[SplitTensor, int]]:
        return ((x, seen) for ref, seen in self.members if (x := ref()) is not None)

    @staticmethod
    def error(x: SplitTensor) -> UnsupportedError:
        return UnsupportedError(
            f"a split value of shape {list(x.shape)}, or a view of it, is written to in place while the other is used; "
            "make it whole before: x = fxsp.whole(x)"
        )


@dataclass(eq=False, slots=True)
class _Rows:
    """The memory of a split value and of its aliases (``x.detach()``)."""

    local: Tensor
    #: The whole value, once it was gathered.
    whole: Tensor | None = None
    #: Whether ``whole`` may be written to, by itself or a view of it: ``local`` is what it was before.
    shared: bool = False
    family: Family | None = None


@dataclass
class _Handlers:
    """What runs on split values where no compiler is; ``handle_with`` sets them."""

    function: Callable[..., Any] = lambda *_: NotImplemented
    operator: Callable[..., Any] = lambda *_: NotImplemented


_handlers = _Handlers()


def handle_with(function: Callable[..., Any], operator: Callable[..., Any]) -> None:
    """Have ``function`` run functions of torch (NotImplemented: as their operators), and ``operator`` those of ATen."""
    _handlers.function, _handlers.operator = function, operator


#: What leaves torch, and knows no subclasses: it is given the whole value.
_OF_WHOLE = (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.__reduce_ex__, Tensor.data_ptr)


class SplitTensor(Tensor):
    """This rank's rows of a value of global shape; see the module.

    Made by compiled graphs, never by users.  ``fxsp.whole(x)`` is the value as a plain tensor: a collective.
    """

    placed: Placed
    _rows: _Rows
    _kind: Kind | None

    @staticmethod
    def __new__(
        cls: type[SplitTensor],
        local: Tensor,
        placed: Placed,
        shape: Any,
        rows: _Rows | None = None,
        kind: Kind | None = None,
    ) -> SplitTensor:
        self: SplitTensor = Tensor._make_wrapper_subclass(
            cls, shape, dtype=local.dtype, device=local.device, requires_grad=False
        )
        self.placed, self._kind = placed, kind
        self._rows = _Rows(local) if rows is None else rows
        return self

    def kind(self) -> Kind:
        """What decides by which program it is run; its shape must be one of numbers."""
        if self._kind is None:
            self._kind = _kind_of(self.placed, self.shape, self.dtype, self.device)
        return self._kind

    @property
    def _local(self) -> Tensor:
        return self._rows.local

    def __tensor_flatten__(self) -> tuple[list[str], Placed]:
        return ["_local"], self.placed

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], placed: Placed, size: Any, stride: Any) -> SplitTensor:
        return SplitTensor(inner["_local"], placed, size)

    @classmethod
    def __metadata_guard__(cls, before: Placed, now: Placed) -> bool:
        return before.same_kind(now)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        where = f"{self.placed.type} on rank {self.placed.ranks.rank} of {self.placed.ranks.size}"
        return f"SplitTensor({list(self.shape)}, {self.dtype}, {where}; fxsp.whole(x) gathers it)"

    def __coerce_same_metadata_as_tangent__(self, expected: Any, expected_type: Any = None) -> Tensor | None:
        """As the gradient of what a compiled graph returned whole, it is made whole."""
        if expected_type in (None, Tensor) and expected is None:
            return self.gathered()
        return self if isinstance(expected, Placed) and expected.same_kind(self.placed) else None

    def alias(self) -> SplitTensor:
        """Another tensor with the same memory."""
        return SplitTensor(self._local, self.placed, self.shape, self._rows)

    def local(self) -> Tensor:
        """The rows of this rank, as they are now; without autograd."""
        self._check()
        if self._rows.shared:
            assert self._rows.whole is not None
            return sharded(self._rows.whole, self.placed.type, self.placed.ranks)
        return self._rows.local

    def will_be_written(self) -> None:
        """Raises UnsupportedError where a view of it, or what it is a view of, would not see that."""
        family = self._rows.family
        if family is not None and family.others(self):
            raise family.error(self)

    def view_of(self, base: SplitTensor) -> None:
        """On one device this would be a view of ``base``."""
        family = base._rows.family or Family([])
        self._rows.family = base._rows.family = family
        family.join(base, self)

    def _check(self) -> None:
        if self._rows.family is not None:
            self._rows.family.check(self)

    def gathered(self, op: str = "") -> Tensor:
        """The whole value, without autograd: a collective, unless it was gathered before.

        ``op`` is what needs it, where nobody asked for the whole.
        """
        self._check()
        rows = self._rows
        if rows.whole is None:
            mode = torch_internals.fake_mode_of(rows.local)
            if mode is not None:  # a compiler is tracing: what it makes of shapes must not depend on the ranks
                with mode:
                    return torch.empty(self.shape, dtype=self.dtype, device=self.device)
            type_ = self.placed.for_shape(self.shape)
            with gathering(self.placed.ranks, self.shape, (self.placed.ranks.size - 1) * rows.local.nbytes, op):
                rows.whole = dense(whole_of(rows.local, self.shape, type_, self.placed.ranks))
        return rows.whole

    def share(self, op: str = "") -> Tensor:
        """The whole value, for someone who may write to it, or to a view of it."""
        found = self.gathered(op)
        self._rows.shared = self._rows.whole is not None
        return found

    @classmethod
    @torch_internals.beside_dynamo
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch_internals.plain_functions():
            result = _handlers.function(func, args, kwargs or {})
            if result is not NotImplemented:
                return result
            kwargs = kwargs or {}
            if func in _OF_WHOLE:
                return func(args[0].share(f"Tensor.{func.__name__}"), *args[1:], **kwargs)
            if torch.is_grad_enabled():
                first, *rest = args or (None,)  # the first may be what is written to
                rest, kwargs = tree_map_only(Tensor, _with_whole_gradient, (rest, kwargs))
                args = (first, *rest) if args else args
            return func(*args, **kwargs)

    @classmethod
    @torch_internals.beside_dynamo
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _handlers.operator(func, args, kwargs or {})


class _WholeGradient(torch.autograd.Function):
    """``R -> R``: the same value, whose gradient is made whole."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.gathered() if isinstance(grad, SplitTensor) else grad


def _with_whole_gradient(x: Tensor) -> Tensor:
    """An operand beside split ones: nobody who knows nothing of these is given a split gradient."""
    return _WholeGradient.apply(x) if x.requires_grad and not isinstance(x, SplitTensor) else x
