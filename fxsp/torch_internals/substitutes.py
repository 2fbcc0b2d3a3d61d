"""Functions in whose place Dynamo traces others."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from fxsp.torch_internals.dynamo import Translation

_F = TypeVar("_F", bound=Callable[..., Any])


def keep_lengths_symbolic(is_ours: Callable[[Translation], bool]) -> None:
    """Have Dynamo trace ``torch.as_tensor(length)`` as ``torch.tensor(length)`` where the translation is ours.

    The former makes a symbolic length the number that it happens to be, and so costs a compilation per length; Dynamo
    has a remedy for the latter only.
    """
    try:
        from torch._dynamo.variables import SymNodeVariable, TorchInGraphFunctionVariable

        handlers = TorchInGraphFunctionVariable._get_handlers()
    except (ImportError, AttributeError):
        return  # another compilation per length, and nothing else

    def as_tensor(self: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
        data = args[0] if args else kwargs.get("data")
        if not isinstance(data, SymNodeVariable) or not is_ours(Translation(tx.output)):
            return None
        return TorchInGraphFunctionVariable(torch.tensor).call_function(tx, [*args], kwargs)

    handlers.setdefault(torch.as_tensor, as_tensor)


def make_meta_tensors(is_ours: Callable[[Translation], bool]) -> None:
    """Have Dynamo trace ``torch.tensor(values, device="meta")`` as ``torch.empty`` where the translation is ours.

    Of the former torch makes no fake, and the first operator on it fails: a cache begins with ``torch.tensor([])``.
    """
    try:
        from torch._dynamo.variables import ConstantVariable, TorchInGraphFunctionVariable

        handlers = TorchInGraphFunctionVariable._get_handlers()
    except (ImportError, AttributeError):
        return  # such a model cannot be explained on the meta device, and nothing else
    original = handlers.get(torch.tensor)
    if hasattr(original, "_fxsp_original"):
        return

    def tensor(self: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and _on_meta(kwargs.get("device")) and is_ours(Translation(tx.output)):
            shape = _literal_shape(args[0])
            if shape and ("dtype" in kwargs or 0 in shape):
                sizes = [ConstantVariable.create(n) for n in shape]
                return TorchInGraphFunctionVariable(torch.empty).call_function(tx, sizes, kwargs)
        return None if original is None else original(self, tx, *args, **kwargs)

    tensor._fxsp_original = original  # type: ignore[attr-defined]
    handlers[torch.tensor] = tensor


def _on_meta(device: Any) -> bool:
    return device is not None and device.is_python_constant() and str(device.as_python_constant()) == "meta"


def _literal_shape(data: Any) -> tuple[int, ...]:
    """The shape of what ``torch.tensor`` makes of nested lists of numbers; () for anything else."""
    value = data.as_python_constant() if data.is_python_constant() else None
    shape: list[int] = []
    while isinstance(value, list | tuple):
        shape.append(len(value))
        value = value[0] if value else None
    return tuple(shape)


def substitute_functions(
    table: Mapping[Callable[..., Any], Callable[..., Any]], is_ours: Callable[[Translation], bool]
) -> None:
    """Have Dynamo trace, for each function that is a key of ``table``, the other one, where the translation is ours."""
    try:
        from torch._dynamo.variables import UserFunctionVariable

        original = UserFunctionVariable.call_function
    except (ImportError, AttributeError):
        return  # a graph break more, and nothing else
    if hasattr(original, "_fxsp_original"):
        return

    @functools.wraps(original)
    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        function = getattr(self, "fn", None)
        new = table.get(function) if isinstance(function, types.FunctionType) else None
        if new is None or not is_ours(Translation(tx.output)):
            return original(self, tx, args, kwargs)
        return UserFunctionVariable(new).call_function(  # type: ignore[arg-type]
            tx, [*self.self_args(), *args], kwargs
        )

    call_function._fxsp_original = original  # type: ignore[attr-defined]
    UserFunctionVariable.call_function = call_function  # type: ignore[method-assign]


def mask_helpers(canonical: _F, causal: _F) -> dict[Callable[..., Any], Callable[..., Any]]:
    """The functions of torch's transformer modules that make masks alike, and that ask whether one is causal, with what
    stands for them; without those that this version lacks.
    """
    from torch.nn import functional
    from torch.nn.modules import transformer

    found = {
        getattr(functional, "_canonical_mask", None): canonical,
        getattr(transformer, "_detect_is_causal_mask", None): causal,
    }
    return {old: new for old, new in found.items() if old is not None}
