"""What ``torch.compile`` makes of functions, and of the calls of modules."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch

from fxsp.torch_internals.recompiles import backend_layers
from fxsp.torch_internals.versions import missing

#: ``wrap(module, compiler, compiled) -> what is called instead of compiled``; the module is None for other functions.
Wrap = Callable[[torch.nn.Module | None, Any, Callable[..., Any]], Callable[..., Any]]


def wrap_compiled(backend: Any, wrap: Wrap) -> None:
    """From now on, have ``wrap`` around the calls of functions and modules that are compiled with ``backend``
    (``module.compile``, ``torch.compile(module)``); its ``compiler`` is what ``torch.compile`` made of the backend and
    its options.
    """
    try:
        from torch._dynamo.eval_frame import _TorchDynamoContext

        original = _TorchDynamoContext.__call__
    except (ImportError, AttributeError) as error:
        raise missing("torch._dynamo.eval_frame._TorchDynamoContext.__call__", error) from error

    @functools.wraps(original)
    def __call__(self: Any, fn: Any) -> Any:  # noqa: N807  (it takes the place of one)
        compiled = original(self, fn)
        if not isinstance(fn, (types.FunctionType, types.MethodType)):
            return compiled  # of a module, whose call is compiled in turn
        module = getattr(fn, "__self__", None)
        layers = backend_layers(getattr(self, "callback", None))
        compiler = next((layer for layer in layers if getattr(layer, "compiler_fn", None) is backend), None)
        if compiler is None:
            return compiled
        wrapped: Any = functools.update_wrapper(
            wrap(module if isinstance(module, torch.nn.Module) else None, compiler, compiled), compiled
        )
        wrapped._torchdynamo_wrapper_id = id(wrapped)  # by which torch.compile knows its own functions
        return wrapped

    _TorchDynamoContext.__call__ = __call__  # type: ignore[method-assign]


def suppresses_errors() -> bool:
    """Whether Dynamo runs what a backend refuses as it is, instead of raising."""
    from torch._dynamo import config

    return bool(config.suppress_errors)


def is_compiling_off() -> bool:
    """Whether somebody has switched compiling off (``torch.compiler.set_stance``, ``TORCHDYNAMO_DISABLE``)."""
    from torch._dynamo import config, eval_frame

    stance = getattr(getattr(eval_frame, "_stance", None), "stance", "default")
    return bool(config.disable) or stance in ("force_eager", "eager_on_recompile")
