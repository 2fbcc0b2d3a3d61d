"""What the operators of fxsp send: which ones communicate, on which local shapes, and how many bytes."""

from __future__ import annotations

from typing import Any

import torch

from fxsp.kernels.op import Local, sizes_of
from fxsp.kernels.ops import op_of
from fxsp.passes.graph import facts, value_of
from fxsp.types import Length, Ranks, as_length, shape_on_rank

__all__ = ["bytes_sent", "format_bytes", "length_of", "local_shape"]


def local_shape(node: torch.fx.Node, ranks: Ranks) -> tuple[Length, ...] | None:
    """The shape of the node's tensor on each rank; None if it is no tensor.

    From the ``local`` value where it is known, else from the global value and the type.
    """
    val = value_of(node)
    if not isinstance(val, torch.Tensor):
        return None
    type_ = facts(node).type if facts(node).local is None else None
    return tuple(shape_on_rank(val.shape, type_, ranks.size))


def bytes_sent(node: torch.fx.Node, ranks: Ranks) -> Length | None:
    """Bytes that each rank sends in this node; None if it is no collective (or its operand's shape is unknown: 0).

    all-to-all: ``(P-1)/P`` of the operand; gather: the rank's rows of split segments to ``P-1`` others;
    reduce-scatter: everyone else's rows; all-reduce: ``2 (P-1)/P`` of the operand.  Sums of half precision travel as
    float32.  Pads are counted: they travel.
    """
    op = op_of(node)
    if op is None or op.sends is None:
        return None
    if facts(node).sent is not None:  # the pass that made it has counted
        return as_length(facts(node).sent)

    def described(arg: torch.fx.Node) -> Any:
        shape = local_shape(arg, ranks)
        return length_of(arg) if shape is None else Local(shape, value_of(arg).dtype)

    operand = node.args[0]
    if not isinstance(operand, torch.fx.Node) or local_shape(operand, ranks) is None:
        return 0
    return as_length(op.sends(sizes_of(node, ranks.size, described)))


def length_of(arg: Any) -> Length | None:
    """The length that an argument stands for; None if nobody described it."""
    value = value_of(arg) if isinstance(arg, torch.fx.Node) else arg
    return None if value is None else as_length(value)


def format_bytes(n: Any) -> str:
    """``"96 B"``, ``"1.5 KiB"``, ``"3.0 MiB"``; a symbolic number stays a formula."""
    if not isinstance(n, int | float):
        return f"{n} B"
    if n < 1024:
        return f"{n:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        n = n / 1024
        if n < 1024 or unit == "GiB":
            break
    return f"{n:.1f} {unit}"
