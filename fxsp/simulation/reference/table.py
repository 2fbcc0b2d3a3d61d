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
from fxsp.simulation.reference import extremes, ops, ring, split_kv
from fxsp.simulation.reference import zigzag as oracle_deal
from fxsp.simulation.reference.lanes import Lanes, poison

__all__ = ["Call", "Lanes", "bind"]


@dataclass(frozen=True)
class Call:
    """An fxsp operator with its operands."""

    name: str
    function: Callable[..., Lanes]
    arguments: dict[str, Any]

    def run(self, *, poison_pads: bool = False) -> Lanes:
        """Execute it; ``poison_pads`` overwrites the pads it makes, unless they are promised to be zero."""
        result = self.function(**self.arguments)
        if not poison_pads or self.arguments.get("zero_pads", True):
            return result
        if self.name == "shard":
            return poison(result, **self.arguments)
        if self.name == "pack_heads":
            length = self.arguments["xs"][0][0].shape[2]
            return Lanes([torch.cat([y[:, :length], 0.75 * y[:, :1].expand_as(y[:, length:])], 1) for y in result])
        x, lengths, size = (self.arguments[name] for name in ("x", "lengths", "size"))
        if self.name == "deal":
            how = self.arguments["dim"], lengths, self.arguments["head_tail"], size, self.arguments.get("units", ())
            return Lanes([oracle_deal.poisoned(y, lane, *how) for y, lane in zip(result, x, strict=True)])
        # pack: for each receiver
        split = [False] * len(lengths)
        return Lanes(
            [
                torch.stack(poison(Lanes(y), Lanes([lane] * size), 0, lengths, split, size))
                for y, lane in zip(result, x, strict=True)
            ]
        )


def bind(name: str, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Call:
    """The call of operator ``name``; tensor operands are :class:`Lanes`.  The rank and the group are dropped.

    Raises ``VerificationError`` if the call is for another number of ranks, ``UnsupportedError`` if the operator is
    unknown.
    """
    function = _OPERATORS.get(name)
    if function is None:
        raise UnsupportedError(f"the simulator does not know fxsp::{name}; it knows {', '.join(sorted(_OPERATORS))}")
    arguments = dict(inspect.signature(function).bind(*args, **kwargs).arguments)
    if name in _LOCAL and size % arguments["size"] == 0:
        # Among some consecutive ranks.
        return Call(name, function, arguments)
    if arguments.get("size", size) != size:
        raise VerificationError(f"fxsp::{name} is for {arguments['size']} ranks, the simulation has {size}")
    arguments["size"] = size
    return Call(name, function, arguments)


def _lanes(function: Callable[..., Any]) -> Callable[..., Lanes]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Lanes:
        return Lanes(function(*args, **kwargs))

    return run


#: Operators without communication: their size may be that of a part of the ranks.
_LOCAL = frozenset({"deal", "pack", "pack_heads", "put", "take", "undeal", "unpack"})

#: What each file defines, by the name of the function.
_OPERATORS = {
    function.__name__: _lanes(function) for module in (ops, ring, split_kv, extremes) for function in module.OPERATORS
}
# Forward they mean what others do.
_OPERATORS.update(gather_used=_OPERATORS["gather"], reduce_grad=_OPERATORS["all_reduce"])
