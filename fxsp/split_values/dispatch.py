"""ATen operators on split values, where no compiler is: on this rank's rows, or on the whole value.

Operators that map elements run on the rows (the sum of two gradients, a copy, a cast).  Everything else runs on whole
values, the same on every rank: right, at the price of a gather.  Writes and views keep their meaning: once a view of
the whole value is out, that is the value, and this rank's rows are cut from it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from fxsp.passes.rules.families import family
from fxsp.split_values.convert import sharded
from fxsp.split_values.value import Placed, SplitTensor, dense
from fxsp.torch_internals import is_plain_tensor

__all__ = ["dispatch"]

aten = torch.ops.aten


def dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    """What ``func`` gives for these arguments, below autograd."""
    splits = [x for x in tree_leaves((args, kwargs)) if isinstance(x, SplitTensor)]
    if all(is_plain_tensor(x._local) for x in splits):  # else a compiler is tracing
        if func in family("same_memory"):
            return args[0].alias()
        result = _on_rows(func, args, kwargs, splits)
        if result is not NotImplemented:
            return result
    return _on_whole(func, args, kwargs)


def _on_rows(func: Any, args: Any, kwargs: Any, splits: list[SplitTensor]) -> Any:
    """Run on this rank's rows; NotImplemented where that is not enough."""
    writes = func._schema.is_mutable
    mapped = _functional(func) if writes else func
    if mapped not in family("elementwise"):
        return NotImplemented
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    try:
        shape = torch.broadcast_shapes(*(x.shape for x in tensors))
    except RuntimeError:
        return NotImplemented  # it says what is wrong itself
    first = splits[0]
    alike = all(x.placed.ranks == first.placed.ranks and x.placed.type.same_as(first.placed.type) for x in splits)
    type_ = first.placed.type
    if not alike or any(x.ndim != len(shape) for x in splits) or shape[type_.dim] != first.shape[type_.dim]:
        return NotImplemented
    target = args[0] if writes else None
    if writes and not (isinstance(target, SplitTensor) and target.shape == shape and not target._rows.shared):
        return NotImplemented
    dim = type_.dim - len(shape)

    def rows(x: Tensor) -> Tensor:
        if isinstance(x, SplitTensor):
            return x.local()
        if x.ndim < -dim or x.shape[dim] == 1:
            return x
        return sharded(x.expand(shape) if x.ndim < len(shape) else x, type_, first.placed.ranks)

    local_args, local_kwargs = tree_map_only(Tensor, rows, (args, kwargs))
    if target is not None:
        target.will_be_written()
        target._rows.whole = None
        func(*local_args, **local_kwargs)
        return target
    zero = mapped in family("linear", "joins", "detached") and all(
        isinstance(x, SplitTensor) and x.placed.zero_pads for x in tensors
    )
    local = func(*local_args, **local_kwargs)
    return SplitTensor(dense(local), Placed(type_, first.placed.ranks, zero), shape)


def _functional(func: Any) -> Any:
    """The operator that returns what an operator in place writes; None if there is none of that name."""
    name = func._schema.name.removeprefix("aten::")
    packet = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
    return getattr(packet, func._overloadname, None)


def _on_whole(func: Any, args: Any, kwargs: Any) -> Any:
    """Run on whole values; who may write to one, or returns a view of one, gets the value itself."""
    wrappers: dict[int, SplitTensor] = {}

    def value(x: SplitTensor, info: Any) -> Tensor:
        shared = info is not None and info.alias_info is not None
        if shared and info.alias_info.is_write:
            x.will_be_written()
        found = x.share(str(func)) if shared else x.gathered(str(func))
        wrappers[id(found)] = x
        return found

    def argument(x: Any, info: Any) -> Any:
        return tree_map_only(SplitTensor, lambda one: value(one, info), x)

    declared = func._schema.arguments
    by_name = {info.name: info for info in declared}
    args = [argument(x, declared[i] if i < len(declared) else None) for i, x in enumerate(args)]
    kwargs = {name: argument(x, by_name.get(name)) for name, x in kwargs.items()}
    result = func(*args, **kwargs)
    return tree_map_only(Tensor, lambda x: wrappers.get(id(x), x), result) if func._schema.is_mutable else result
