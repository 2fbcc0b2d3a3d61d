"""What each fxsp operator means, on a list with one tensor per rank.

This is the reference that the operators and everything made of them are tested against.  It is written apart from
``fxsp.kernels``, for clarity and not for speed, and must stay so: a mistake in one has to show against the other.
Each file lists the operators that it defines, as ``OPERATORS``; the name of a function is that of the operator.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxsp.errors import UnsupportedError, VerificationError
from fxsp.simulation.reference import ops, ring, split_kv
from fxsp.simulation.reference.lanes import Lanes
from fxsp.torch_internals import parameters

__all__ = ["Lanes", "bind"]


def bind(
    name: str, args: Sequence[Any], kwargs: dict[str, Any], size: int
) -> tuple[Callable[..., Lanes], dict[str, Any]]:
    """What operator ``name`` means, and its arguments by name; tensor operands are :class:`Lanes`.

    Dropped is what its meaning does not ask for.  Raises ``VerificationError`` if the call is for another number of
    ranks, ``UnsupportedError`` if the operator is unknown.
    """
    function = _OPERATORS.get(name)
    if function is None:
        raise UnsupportedError(f"the simulator does not know fxsp::{name}; it knows {', '.join(sorted(_OPERATORS))}")
    names = [known.name for known in parameters(getattr(torch.ops.fxsp, name).default)]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    asked = inspect.signature(function).parameters
    arguments = {key: value for key, value in given.items() if key in asked}
    of = given.get("size", size)
    if of != size and not (name in _LOCAL and size % of == 0):  # of some consecutive ranks
        raise VerificationError(f"fxsp::{name} is for {of} ranks, the simulation has {size}")
    if "size" in asked:
        arguments["size"] = of
    return function, arguments


def _lanes(function: Callable[..., Any]) -> Callable[..., Lanes]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Lanes:
        return Lanes(function(*args, **kwargs))

    return run


#: Operators without communication: their size may be that of a part of the ranks.
_LOCAL = frozenset({"deal", "pack", "pack_heads", "put", "take", "undeal", "unpack"})

#: What each file defines, by the name of the function.
_OPERATORS = {function.__name__: _lanes(function) for module in (ops, ring, split_kv) for function in module.OPERATORS}
# Forward they mean what others do.
_OPERATORS.update(gather_used=_OPERATORS["gather"], reduce_grad=_OPERATORS["all_reduce"])
