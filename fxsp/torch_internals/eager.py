"""Eager execution: functions on tensors of ours, and who is looking."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch

from fxsp.torch_internals.versions import missing

_F = TypeVar("_F", bound=Callable[..., Any])


#: A context in which functions take all tensors as plain ones, and no mode sees them.  Dynamo knows the class itself.
plain_functions: Callable[[], AbstractContextManager[Any]]
try:
    plain_functions = torch._C.DisableTorchFunction
except AttributeError as _error:
    raise missing("torch._C.DisableTorchFunction", _error) from _error


try:
    _set_eval_frame = torch._C._dynamo.eval_frame.set_eval_frame
except AttributeError as _error:
    raise missing("torch._C._dynamo.eval_frame.set_eval_frame", _error) from _error


def set_compiler(compiler: Any) -> Any:
    """What Dynamo does with the frames of this thread (None: nothing); returns what it did before."""
    return _set_eval_frame(compiler)


def only_inlined(function: _F) -> _F:
    """Have Dynamo trace ``function`` as a part of its callers, but never compile it for itself."""
    from torch._dynamo.eval_frame import skip_code

    skip_code(function.__code__)
    return function


def beside_dynamo(function: _F) -> _F:
    """Have Dynamo leave ``function``, and all that it calls, to Python.  Dynamo does not know it: ``function`` must be
    one that Dynamo never finds in what it traces.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        before = _set_eval_frame(None)
        if before is None:
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        finally:
            _set_eval_frame(before)

    return only_inlined(run)  # type: ignore[return-value]


def custom_function(node: Any) -> str:
    """The name of the custom ``autograd.Function`` that a node of the autograd graph is; nothing for those of torch
    (checkpoints) and ours, and for any other node."""
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        return ""
    function: Any = type(node)._forward_cls  # type: ignore[attr-defined]
    known = function.__module__.partition(".")[0] in ("torch", "fxsp")
    return "" if known else f"{function.__qualname__}.apply"


def checkpoint_looks() -> bool:
    """Whether a checkpoint asks for the shape of a tensor, to compare what it recomputed with what it had."""
    from torch.utils.checkpoint import _default_meta_extractor

    frame = sys._getframe(1)
    for _ in range(8):  # the frames of a `__torch_function__`
        if frame is None or frame.f_code is _default_meta_extractor.__code__:
            return frame is not None
        frame = frame.f_back  # type: ignore[assignment]
    return False


def calls_under_way() -> list[torch.nn.Module]:
    """The modules whose calls are under way in this thread, as Python runs them, the outermost first.

    What Dynamo has compiled is not Python's any more, and the module that ``torch.compile`` returns only stands for
    another.
    """
    found = []
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL and not is_stand_in(module := frame.f_locals.get("self")):
            found.append(module)
        frame = frame.f_back
    return found[::-1]


def is_stand_in(module: Any) -> bool:
    """Whether it is what ``torch.compile`` returned for a module."""
    from torch._dynamo.eval_frame import OptimizedModule

    return isinstance(module, OptimizedModule)


def outermost_call() -> torch.nn.Module | None:
    """The first of the modules whose calls are under way in this thread; None: there is none."""
    return next(iter(calls_under_way()), None)


try:
    _CALL = torch.nn.Module._call_impl.__code__
except AttributeError as _error:
    raise missing("torch.nn.Module._call_impl", _error) from _error


def is_called_by_module() -> bool:
    """While Dynamo traces: whether Python runs the call of a module that called the compiled function."""
    from fxsp.torch_internals.dynamo import Translation

    outer, translation = outermost_call(), Translation.current()
    if outer is None or translation is None:
        return False
    return all(module is not outer for module, _ in translation.callers())
