"""The simulator with other values in pads than the copies that they are: a result that changes depends on pads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxsp.simulation import machine
from fxsp.simulation.reference import table
from fxsp.simulation.reference.lanes import Lanes, along, pieces

__all__ = ["Lanes", "bind", "run", "simulate"]


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
    """The call of operator ``name``; tensor operands are :class:`Lanes`."""
    return Call(name, *table.bind(name, args, kwargs, size))


def poisoning(name: str, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """As :func:`table.bind`: the meaning of an operator, but that the pads it makes are other values."""
    call = bind(name, args, kwargs, size)
    return lambda **_: call.run(poison_pads=True), call.arguments


def run(gm: torch.fx.GraphModule, size: int, inputs: Sequence[Any], *, poison_pads: bool = False) -> machine.Simulation:
    return machine.run(gm, size, inputs, bind=poisoning if poison_pads else table.bind)


def simulate(
    gm: torch.fx.GraphModule, size: int, inputs: Sequence[Any], *, poison_pads: bool = False
) -> list[list[Any]]:
    return run(gm, size, inputs, poison_pads=poison_pads).outputs


def poisoned(lane: torch.Tensor, x: torch.Tensor, dim: int, pads: torch.Tensor) -> torch.Tensor:
    """``lane`` with other values in its pads: those of the first row of ``x``, three quarters where numbers are real.

    Values that the program might have, because pads, being copies of rows, promise just that: nothing new overflows or
    leaves a domain, so zero times a pad is zero, and an index of a pad is in range.
    """
    if not pads.any():
        return lane
    return torch.where(along(pads, lane, dim), smaller(x.narrow(dim, 0, 1)), lane)


def smaller(x: torch.Tensor) -> torch.Tensor:
    """Three quarters of ``x`` where numbers are real or complex; those of 8 bits have no products of their own."""
    if not (x.dtype.is_floating_point or x.dtype.is_complex):
        return x
    return (x.float() * 0.75).to(x.dtype) if x.element_size() == 1 else x * 0.75
