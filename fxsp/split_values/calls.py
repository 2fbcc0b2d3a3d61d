"""When a graph may return split values: inside of a module call that is under way, and that will make them whole.

A block that is compiled by itself is called by its model.  The first time one of its graphs runs, the outermost module
whose call is under way (as Python sees it) gets two hooks: one says that its call has begun, the other that it has
ended, by an exception, too, and makes whole what it returns.  While such a call is under way in this thread, graphs
return split values; else they return whole ones, always.  So the first call of a model is like any before, and from the
second on nothing is gathered between its blocks; no code outside of the model's call is given a split value.

A checkpoint calls a block once more in the backward pass, when no call is under way: a graph then returns what it
returned in the forward pass.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from fxsp import torch_internals
from fxsp.split_values.value import SplitTensor, whole

__all__ = ["is_under_way", "made_whole", "watch_calls"]


class _Thread(threading.local):
    """The calls of watched modules that are under way in this thread."""

    depth = 0


_thread = _Thread()
_watched: WeakIdKeyDictionary = WeakIdKeyDictionary()


def is_under_way() -> bool:
    """Whether a call is under way, in this thread, that makes whole what it returns."""
    return _thread.depth > 0


def watch_calls() -> None:
    """Have the outermost module whose call is under way watched, from its next call on."""
    module = torch_internals.outermost_call()
    if module is not None and module not in _watched:
        _watched[module] = (
            module.register_forward_pre_hook(_enter, prepend=True),
            module.register_forward_hook(_leave, always_call=True),
        )


def _enter(module: nn.Module, args: Any) -> None:
    _thread.depth += 1


def _leave(module: nn.Module, args: Any, output: Any) -> Any:
    _thread.depth -= 1
    return made_whole(output) if _thread.depth == 0 else output


def made_whole(value: Any) -> Any:
    """A result with whole tensors for split ones, in nested containers, too: dictionaries, lists, dataclasses."""
    found = tree_map_only(Tensor, whole, value)
    if isinstance(found, Mapping) or not dataclasses.is_dataclass(found) or isinstance(found, type):
        return found
    for field in dataclasses.fields(found):
        old = getattr(found, field.name, None)
        if _holds_split(old):
            object.__setattr__(found, field.name, made_whole(old))
    return found


def _holds_split(value: Any) -> bool:
    found: list[Any] = []
    tree_map_only(SplitTensor, found.append, value)
    return bool(found)
