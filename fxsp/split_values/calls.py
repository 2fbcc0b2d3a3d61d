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

import threading
from typing import Any
from weakref import WeakSet

from torch import nn

from fxsp import torch_internals
from fxsp.split_values.results import with_tensors
from fxsp.split_values.value import SplitTensor, whole

__all__ = ["is_under_way", "watch_calls"]


class _Thread(threading.local):
    def __init__(self) -> None:
        #: The calls of watched modules that are under way in this thread.
        self.calls: list[nn.Module] = []


_thread = _Thread()
_watched: WeakSet[nn.Module] = WeakSet()


def is_under_way() -> bool:
    """Whether a call is under way, in this thread, that makes whole what it returns."""
    return bool(_thread.calls)


def watch_calls() -> None:
    """Have the outermost module whose call is under way watched, from its next call on."""
    module = torch_internals.outermost_call()
    if module is not None and module not in _watched:
        _watched.add(module)
        module.register_forward_pre_hook(_enter, prepend=True)
        module.register_forward_hook(_leave, always_call=True)


def _enter(module: nn.Module, args: Any) -> None:
    _thread.calls.append(module)


def _leave(module: nn.Module, args: Any, output: Any) -> Any:
    if not _thread.calls or _thread.calls[-1] is not module:
        return output  # the call had begun before it was watched: what it returns is whole
    _thread.calls.pop()
    return output if _thread.calls else with_tensors(output, lambda x: isinstance(x, SplitTensor), whole)
