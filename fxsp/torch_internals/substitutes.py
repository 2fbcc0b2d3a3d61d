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
