"""What each fxsp operator means, on a list with one tensor per rank.

This is the reference that the operators and everything made of them are tested against.  It is written apart from
``fxsp.kernels``, for clarity and not for speed, and must stay so: a mistake in one has to show against the other.
Each file lists the operators that it defines, as ``OPERATORS``; the name of a function is that of the operator.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxsp.errors import UnsupportedError, VerificationError
from fxsp.simulation.reference import ops, ring, split_kv
from fxsp.simulation.reference.lanes import Lanes, pieces, poisoned
from fxsp.torch_internals import parameters

__all__ = ["Call", "Lanes", "bind"]


@dataclass(frozen=True)
class Call:
    """An fxsp operator with its operands."""

    name: str
    function: Callable[..., Lanes]
    arguments: dict[str, Any]

    def run(self, *, poison_pads: bool = False) -> Lanes:
        """Execute it; ``poison_pads`` overwrites the pads it makes, unless they are promised to be zero."""
        given = self.arguments
        result = self.function(**given)
        if not poison_pads or given.get("zero_pads", True):
            return result
        if self.name == "pack_heads":
            length = given["xs"][0][0].shape[2]
            return Lanes([poisoned(y, y, 1, torch.arange(y.shape[1]) >= length) for y in result])
        x, lengths, size, dim = given["x"], given["lengths"], given["size"], given.get("dim", 0)
        whole = given.get("whole", [False] * len(lengths))
        found = list(pieces(lengths, whole, size, given.get("head_tail", ()), given.get("units", ())))
        if self.name == "deal":
            pads = torch.cat([piece.dealt() >= piece.length for piece in found])
            return Lanes([poisoned(y, lane, dim, pads) for y, lane in zip(result, x, strict=True)])
        of_rank = [torch.cat([piece.rows(r) >= piece.length for piece in found]) for r in range(size)]
        if self.name == "shard":
            return Lanes([poisoned(y, lane, dim, pads) for y, lane, pads in zip(result, x, of_rank, strict=True)])
        # pack: for each receiver
        return Lanes(
            [
                torch.stack([poisoned(block, lane, 0, pads) for block, pads in zip(y, of_rank, strict=True)])
                for y, lane in zip(result, x, strict=True)
            ]
        )


def bind(name: str, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Call:
    """The call of operator ``name``; tensor operands are :class:`Lanes`.  Dropped is what its meaning does not ask for.

    Raises ``VerificationError`` if the call is for another number of ranks, ``UnsupportedError`` if the operator is
    unknown.
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
    return Call(name, function, arguments)


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
