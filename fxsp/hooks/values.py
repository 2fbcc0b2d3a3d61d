"""What goes into a module and what comes out of it: arguments by name, outputs by place, whole again at the end."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxsp.hooks.dispatch import gather
from fxsp.hooks.layout import layout_of
from fxsp.plan import did_you_mean, listing
from fxsp.split_values.results import with_tensors

__all__ = ["ModuleForwardMetadata", "made_whole", "put_back", "token_count", "values_of"]


@dataclass
class ModuleForwardMetadata:
    """Where the arguments of a class's ``forward`` stand, by name; looked up once."""

    cached_parameter_indices: dict[str, int] | None = None
    _cls: type | None = None
    _takes_any: bool = False

    def _get_parameter_from_args_kwargs(
        self, identifier: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> tuple[Any, bool, int | None]:
        """``(value, is it in kwargs, place in args)``; the value of an argument that was left out is None.

        Raises ``ValueError`` for a name that forward does not have.
        """
        if kwargs and identifier in kwargs:
            return kwargs[identifier], True, None
        if self.cached_parameter_indices is None:
            self._look_up()
        known = self.cached_parameter_indices or {}
        index = known.get(identifier)
        if index is None:
            if self._takes_any:
                return None, False, None
            raise ValueError(
                f'forward has no argument "{identifier}".\n  It has: {listing(known)}.{did_you_mean(identifier, known)}'
            )
        return (args[index] if index < len(args) else None), False, index

    def _look_up(self) -> None:
        if self._cls is None:
            raise ValueError("the class whose forward is meant is not set")
        parameters = list(inspect.signature(self._cls.forward).parameters.values())[1:]  # type: ignore[attr-defined]
        self._takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.cached_parameter_indices = {
            p.name: i for i, p in enumerate(parameters) if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        }


def token_count(value: Any) -> Any:
    """What the argument that ``text_len_source`` names tells: a number, or the tokens of a tensor; None: nothing."""
    if isinstance(value, Tensor) and value.dim():
        dim = 0 if value.dim() <= 2 else 1
        layout = layout_of(value)
        return sum(layout.lengths) if layout is not None and layout.dim == dim else value.shape[dim]
    return value if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool) else None


def made_whole(output: Any) -> Any:
    """A value, or what a module returned, with everything in it that is split gathered."""
    return with_tensors(output, lambda x: layout_of(x) is not None, _gathered)


def _gathered(x: Tensor) -> Tensor:
    layout = layout_of(x)
    assert layout is not None
    return gather(x, layout, used=False)


def values_of(output: Any) -> list[Any]:
    """The values of a module's output."""
    if isinstance(output, Mapping):
        return list(output.values())
    return list(output) if isinstance(output, (list, tuple)) else [output]


def put_back(output: Any, values: list[Any]) -> Any:
    """An output like ``output`` with other values; a dictionary is changed itself."""
    if isinstance(output, Mapping):
        for key, value in zip(list(output), values, strict=True):
            output[key] = value  # type: ignore[index]
        return output
    if not isinstance(output, (list, tuple)):
        return values[0]
    return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)
