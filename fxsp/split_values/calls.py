"""When a graph may return split values: inside of a module call that is under way, and that will make them whole.

A block that is compiled by itself is called by its model.  When it is compiled (``torch.compile``), the outermost
modules that it is a part of get two hooks: one says that a call has begun, the other that it has ended, by an
exception, too, and makes whole what it returns.  While such a call is under way in this thread, graphs return split
values; else they return whole ones, always.  No code outside of the model's call is given a split value.

Where a block is compiled before it is put into its model, or the model into another module, the outermost module whose
call is under way (as Python sees it) gets the hooks the first time one of the block's graphs runs: that call is as any
before, and from the next one on nothing is gathered between the blocks.

A function that is compiled, as a whole model most often is, makes whole what it returns itself: so the graphs that it
is cut into exchange split values.

A checkpoint calls a block once more in the backward pass, when no call is under way: a graph then returns what it
returned in the forward pass.
"""

from __future__ import annotations

import gc
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

from fxsp import torch_internals
from fxsp.split_values.conversions import made_whole
from fxsp.split_values.forward import OUTPUT, Forward, record_to, recording
from fxsp.split_values.results import with_tensors
from fxsp.split_values.value import SplitTensor
from fxsp.summands import look_again

__all__ = ["as_outermost", "is_under_way", "last_forward", "models_around", "watch_calls", "watch_roots"]


class _Thread(threading.local):
    def __init__(self) -> None:
        #: The calls that are under way in this thread: of watched modules, and :class:`_Compiled`.
        self.calls: list[Any] = []


#: The last forward pass of each watched module that was the outermost one.
_forwards: WeakKeyDictionary[nn.Module, Forward] = WeakKeyDictionary()


_thread = _Thread()
_watched: WeakSet[nn.Module] = WeakSet()
#: All modules in those that are watched -> these.
_models: WeakKeyDictionary[nn.Module, WeakSet[nn.Module]] = WeakKeyDictionary()


def is_under_way() -> bool:
    """Whether a call is under way, in this thread, that makes whole what it returns."""
    return bool(_thread.calls)


def last_forward(module: nn.Module) -> Forward | None:
    """What the last call of a watched module did, or of one that it is a part of; None: there was none."""
    if module in _forwards:
        return _forwards[module]
    around = (forward for other, forward in _forwards.items() if any(part is module for part in other.modules()))
    return next(around, None)


def models_around(module: nn.Module) -> list[nn.Module]:
    """The outermost modules that a module is a part of, as far as they are watched."""
    return list(_models.get(module, ()))


def watch_calls() -> None:
    """Have the outermost module whose call is under way watched, from its next call on."""
    module = torch_internals.outermost_call()
    if module is not None:
        _watch(module)


def watch_roots(part: nn.Module) -> None:
    """Have the outermost modules that ``part`` is in watched, unless it is in none.  All modules there are are looked
    at, once for each model."""
    if part in _models:
        return
    kinds = _kinds(nn.Module)
    parents: dict[int, list[nn.Module]] = {}
    for module in [one for one in gc.get_objects() if type(one) in kinds]:
        for child in vars(module).get("_modules", {}).values():
            parents.setdefault(id(child), []).append(module)
    seen: set[int] = set()
    pending = [part]
    while pending:
        module = pending.pop()
        if id(module) not in seen:
            seen.add(id(module))
            above = parents.get(id(module), [])
            pending += above
            calls = type(module) not in _CONTAINERS and not torch_internals.is_stand_in(module)
            if not above and module is not part and calls:
                _watch(module)
                _belong(module)


def _kinds(base: type) -> set[type]:
    """A class and all that are derived from it."""
    found, pending = {base}, [base]
    while pending:
        derived: list[type] = pending.pop().__subclasses__()
        pending += [kind for kind in derived if kind not in found]
        found.update(derived)
    return found


#: These call nothing: what they will be put into does.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def _watch(module: nn.Module) -> None:
    if module not in _watched:
        _watched.add(module)
        _belong(module)
        module.register_forward_pre_hook(_enter, prepend=True)
        module.register_forward_hook(_leave, always_call=True)


def _belong(model: nn.Module) -> None:
    """All modules in a model, as it is now, are parts of it."""
    for part in model.modules():
        _models.setdefault(part, WeakSet()).add(model)
    look_again()


@dataclass(frozen=True)
class _Compiled:
    """The call of a compiled function, or of a module that is compiled as a whole."""

    function: Any


def as_outermost(function: Any, run: Callable[[], Any]) -> Any:
    """``run()``, the call of a compiled function: it makes whole what it returns, if no other call is under way."""
    _forget_ended()
    if _thread.calls or torch_internals.in_backward():
        return run()
    watch_calls()
    _begin(_Compiled(function))
    try:
        output = run()
    except BaseException:
        _end(0, None)
        raise
    return _end(0, output)


def _forget_ended(entering: nn.Module | None = None) -> None:
    """Drop the calls of modules that ended by what hooks do not see (an interrupt)."""
    if not _thread.calls:
        return
    running = Counter(id(module) for module in torch_internals.calls_under_way())
    running[id(entering)] -= 1  # this one is to be begun
    kept = []
    for call in _thread.calls:
        running[id(call)] -= 1
        if isinstance(call, _Compiled) or running[id(call)] >= 0:
            kept.append(call)
    _thread.calls[:] = kept


def _begin(call: Any) -> None:
    if not _thread.calls:
        record_to(Forward())
    _thread.calls.append(call)


def _end(depth: int, output: Any) -> Any:
    """The call that was begun at this depth has ended, and so have those in it."""
    call = _thread.calls[depth]
    del _thread.calls[depth:]
    if _thread.calls:
        return output
    forward = recording()
    try:
        if forward is not None and forward.keeps_split:
            return output
        return with_tensors(output, lambda x: isinstance(x, SplitTensor), partial(made_whole, op=OUTPUT))
    finally:
        record_to(None)
        module = call.function if isinstance(call, _Compiled) else call
        if forward is not None and isinstance(module, nn.Module):
            _forwards[module] = forward


def _enter(module: nn.Module, args: Any) -> None:
    if not torch.compiler.is_compiling():  # else it is a part of a graph
        _forget_ended(module)
        _begin(module)


def _leave(module: nn.Module, args: Any, output: Any) -> Any:
    if torch.compiler.is_compiling():
        return output
    depth = next((at for at in reversed(range(len(_thread.calls))) if _thread.calls[at] is module), None)
    return output if depth is None else _end(depth, output)  # None: the call had begun before it was watched
