"""Autocast as explicit casts, for the time of a re-trace.

Autocast acts below the level at which *normalize* records operators: what is recorded is ``linear`` of float32 values
that gives bfloat16.  Such a graph has its meaning only inside a context.  :class:`ExplicitAutocast` is a decomposition
table that runs the autocast kernel of each operator while the tracer listens: recorded are the casts, and then the
operator on their results, at a level where autocast has done its work.  A composite operator without a kernel of its
own (``einsum``) is opened only if autocast changes something inside it.

The resulting graph must be compiled and run with autocast off (``torch_internals.without_autocast``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from fxsp import torch_internals

__all__ = ["AutocastState", "ExplicitAutocast"]


class ExplicitAutocast(Mapping[Any, Any]):
    """Operator -> a function that traces it with the casts of the autocast context it is called in."""

    def __init__(self) -> None:
        self._changed: dict[tuple[Any, ...], bool] = {}

    def __contains__(self, op: object) -> bool:
        return torch_internals.any_autocast() and torch_internals.is_operator(op)

    def __getitem__(self, op: Any) -> Callable[..., Any]:
        if op not in self:
            raise KeyError(op)
        return functools.partial(self._trace, op)

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __len__(self) -> int:
        return 1  # a mapping without entries would count as "no table"

    def _trace(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        leaves = tree_leaves((args, kwargs))
        devices = {leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor)}
        keys = [key for key in map(torch_internals.autocast_key, sorted(devices)) if key is not None]
        for key in keys:
            if torch_internals.has_kernel(op, key):
                return torch_internals.call_at(op, key, args, kwargs)
        schema = torch_internals.schema(op)
        if (
            keys
            and not schema.is_mutable
            and torch_internals.is_composite(op)
            and self._changes(op, args, kwargs, leaves)
        ):
            return op.decompose(*args, **kwargs)
        return NotImplemented

    def _changes(self, op: Any, args: Any, kwargs: Any, leaves: list[Any]) -> bool:
        """Whether a composite operator does something else inside autocast than outside."""
        autocast = tuple((d, torch.get_autocast_dtype(d)) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d))
        signature = (op, autocast, tuple(map(_signature, leaves)))
        if signature not in self._changed:
            with torch_internals.untraced():
                inside = _calls(op, args, kwargs)
                with torch_internals.without_autocast():
                    outside = _calls(op, args, kwargs)
            self._changed[signature] = inside != outside
        return self._changed[signature]


def _signature(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return (leaf.dtype, leaf.device.type, leaf.ndim, leaf.requires_grad)
    return leaf if isinstance(leaf, (str, bool, torch.dtype, type(None))) else type(leaf)


def _calls(op: Any, args: Any, kwargs: Any) -> list[tuple[Any, ...]] | None:
    """The operators, with the dtypes of their arguments, that a composite operator calls.

    None if it fails, on dtypes that only autocast lets it mix.
    """
    calls: list[tuple[Any, ...]] = []

    def called(inner: Any, args: Any, kwargs: Any, _: Any) -> None:
        calls.append((inner, *(leaf.dtype for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))))

    try:
        with torch_internals.quiet_fakes(), torch_internals.listen(called):
            op(*args, **kwargs)
    except RuntimeError:
        return None
    return calls


class AutocastState:
    """Follows the autocast markers of a graph: ``enter`` and ``leave`` change the state of this thread.

    As a context manager it puts back the state that it found.
    """

    def __init__(self) -> None:
        self._found: dict[str, tuple[bool, torch.dtype]] = {}

    def __enter__(self) -> AutocastState:
        return self

    def __exit__(self, *_: object) -> None:
        for device, state in self._found.items():
            _set(device, state)
        self._found.clear()

    def enter(
        self, device: str, dtype: torch.dtype | None = None, enabled: bool = True, _cache: bool | None = None
    ) -> tuple[str, tuple[bool, torch.dtype]]:
        """Begin a region; returns what :meth:`leave` wants."""
        before = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        self._found.setdefault(device, before)
        _set(device, (enabled, dtype or before[1]))
        return device, before

    def leave(self, token: tuple[str, tuple[bool, torch.dtype]]) -> None:
        """End the region that :meth:`enter` began."""
        _set(*token)

    def active(self) -> list[tuple[str, torch.dtype]]:
        """The devices for which autocast is on, with its dtype."""
        devices = sorted({"cpu", "cuda", *self._found})
        return [(d, torch.get_autocast_dtype(d)) for d in devices if torch.is_autocast_enabled(d)]


def _set(device: str, state: tuple[bool, torch.dtype]) -> None:
    torch.set_autocast_enabled(device, state[0])
    torch.set_autocast_dtype(device, state[1])
