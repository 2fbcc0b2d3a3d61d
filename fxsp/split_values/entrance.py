"""The way into a block that is compiled by itself: its values come in split, however they are given.

Block by block, the first block of a model is given whole values, and the next ones what those before them left.  Dynamo
would compile the block once for each way.  So a kind of block has one way in: what comes in split, or what its program
splits as it enters, is known when it is compiled first, and from then on whole values are cut before, which sends
nothing.  Values that are split otherwise stay so: to convert them in every call costs more than one more program.

The first time, the backend has the graph for whole values at hand.  It raises :class:`SplitFirst` instead of compiling
it, before anything ran; the entrance catches that, and calls the block again with split values.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fxsp import torch_internals
from fxsp.errors import FxspError, StrictError, UnshardedWarning
from fxsp.source import warn
from fxsp.split_values.calls import as_outermost, watch_roots
from fxsp.split_values.conversions import split_as
from fxsp.split_values.forward import recording
from fxsp.split_values.value import Placed
from fxsp.telling import end

__all__ = ["Offer", "SplitFirst", "offered", "watch_entrances"]


class SplitFirst(FxspError):  # noqa: N818  (nothing went wrong)
    """The block is to be called again, as its offer says; the message is the same on all ranks."""


@dataclass(eq=False)
class Offer:
    """What a block is called with, if it may be called again with split values."""

    leaves: Sequence[Any]
    #: What is to be split, by position among the leaves.
    wanted: dict[int, Placed] = field(default_factory=dict)
    #: What the report of the graph for whole values says of the plan.
    plan: list[Any] = field(default_factory=list)
    inferred: list[Any] | None = None

    def position(self, x: Any) -> int | None:
        """Where a tensor stands among the leaves."""
        return next((at for at, leaf in enumerate(self.leaves) if leaf is x), None)

    def taken(self) -> SplitFirst:
        """What to raise."""
        return SplitFirst(", ".join(f"{at}: {placed.type}" for at, placed in self.wanted.items()))


class _Thread(threading.local):
    offer: Offer | None = None


_thread = _Thread()
#: Structure and shapes of a call, as far as they matter -> what is split on its way in.
_Known = dict[Any, Mapping[int, Placed]]


@dataclass(eq=False)
class _Kind:
    """What is known of the calls of a class of blocks, and of one compiler of them (these are compared)."""

    #: None: of a function.
    block: type | None
    compiler: Any
    known: _Known = field(default_factory=dict)
    #: Whether one of them has been called.
    ran: bool = False


_kinds: weakref.WeakKeyDictionary[type, list[_Kind]] = weakref.WeakKeyDictionary()


def offered() -> Offer | None:
    """What the block that is being compiled is called with; None: it cannot be called again."""
    return _thread.offer


def watch_entrances(backend: Any) -> None:
    """Have everything that is compiled with ``backend`` take its values so."""
    torch_internals.wrap_compiled(backend, _entrance)


def _entrance(module: nn.Module | None, compiler: Any, compiled: Callable[..., Any]) -> Callable[..., Any]:
    kind = _Kind(None, compiler)
    if module is not None:
        watch_roots(module)
        kind = _table(type(module), compiler)

    def entrance(*args: Any, **kwargs: Any) -> Any:
        return _call(module, kind, compiled, args, kwargs)

    return entrance


def _table(block: type, compiler: Any) -> _Kind:
    kinds = _kinds.setdefault(block, [])
    for kind in kinds:
        if kind.compiler == compiler:
            return kind
    kinds.append(_Kind(block, compiler))
    return kinds[-1]


@torch.compiler.disable
def _call(module: nn.Module | None, kind: _Kind, compiled: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    before, _thread.offer = _thread.offer, None
    try:
        return as_outermost(module, partial(_split, kind, compiled, args, kwargs))
    finally:
        _thread.offer = before
        end()  # a frame that was traced, and did not become a graph


def _split(kind: _Kind, compiled: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    leaves, spec = tree_flatten((args, kwargs))
    if kind.ran:
        return _enter(kind.known, compiled, leaves, spec, args, kwargs)
    forward = recording()
    runs = 0 if forward is None else forward.runs
    result = _enter(kind.known, compiled, leaves, spec, args, kwargs)
    if forward is not None:
        kind.ran = True
        if forward.runs == runs and kind.block is not None:
            _say_untraced(kind.block, kind.compiler, leaves, result)
    return result


def _say_untraced(block: type, compiler: Any, leaves: Sequence[Any], result: Any) -> None:
    """Nothing of a block's first call is a graph: unless it has computed nothing, it is whole on every rank."""
    had = {id(leaf) for leaf in leaves}
    made = [x for x in tree_flatten(result)[0] if isinstance(x, Tensor) and id(x) not in had]
    if not made or _ranks() == 1 or torch_internals.is_compiling_off():
        return
    text = (
        f"{block.__name__} is compiled, but nothing of its call was traced, and it runs as it is, whole on every rank: "
        "its forward, or a hook on it, is one that Dynamo was told to leave alone (torch.compiler.disable), as the "
        "hooks of some step caches are.\n  Compile modules in it, or the model without that hook"
    )
    if (getattr(compiler, "kwargs", {}).get("options") or {}).get("strict"):
        raise StrictError(f"{text}.  With strict=True this is an error")
    warn(UnshardedWarning(f"{text}; strict=True refuses it"), first=not dist.is_initialized() or dist.get_rank() == 0)


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _enter(
    known: _Known, compiled: Callable[..., Any], leaves: Sequence[Any], spec: Any, args: Any, kwargs: Any
) -> Any:
    few = _ranks()
    key = spec, tuple(_described(x, few) for x in leaves)
    try:
        wanted = known.get(key)
    except TypeError:  # a container of somebody's, without a hash
        return compiled(*args, **kwargs)
    if wanted is not None:
        return _call_split(wanted, leaves, spec, compiled)
    _thread.offer = offer = Offer(leaves)
    try:
        result = compiled(*args, **kwargs)
    except SplitFirst:
        result = _call_split(offer.wanted, leaves, spec, compiled)
    if offer.wanted:
        known[key] = offer.wanted
    return result


def _call_split(wanted: Mapping[int, Placed], leaves: Sequence[Any], spec: Any, compiled: Callable[..., Any]) -> Any:
    split = [split_as(x, wanted[at]) if at in wanted else x for at, x in enumerate(leaves)]
    args, kwargs = tree_unflatten(split, spec)
    return compiled(*args, **kwargs)


def _described(leaf: Any, few: int) -> Any:
    """What says whether two calls are of one kind.

    A length below ``few``, the number of ranks, is one of its own (a step of decoding): what pays there is another
    question.
    """
    return tuple(min(n, few) for n in leaf.shape) if isinstance(leaf, Tensor) else type(leaf)
