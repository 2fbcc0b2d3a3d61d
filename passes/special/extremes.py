"""Reductions over split tokens that are no sums: maxima and minima, any and all, positions of them, norms.

Each rank reduces its own rows, and a small all-reduce combines the results; no token is gathered::

    amax, amin, max, min, any, all    the same of the rank's rows; all_reduce (max or min)
    max(dim), argmax, ...             the same, and the first position that has it: all_reduce (min) of positions
    logsumexp                         the maximum, as above; all_reduce of the sums of exponentials
    norm (of order 0, 1, 2)           all_reduce of sums of powers; of infinite order: the maximum of absolute values

Pads, and what another rank counts, are replaced by what changes nothing (``-inf`` for a maximum).  What is not a number
stays so, as torch has it.  Gradients are those of one device: that of ``amax`` goes in equal parts to all elements that
are the maximum, on whatever rank (``fxsp.at_extreme``), that of ``max(dim)`` to the first.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch.fx import Node

from fxsp.kernels.counts import reduced_bytes
from fxsp.kernels.extremes import travels_as
from fxsp.passes.base import Program
from fxsp.passes.builder import Builder
from fxsp.passes.graph import Call, Decision, facts, shape_of
from fxsp.passes.rules.decide import locate
from fxsp.passes.rules.families import family
from fxsp.passes.rules.reduce import reduced_dims
from fxsp.passes.rules.table import rule_of
from fxsp.passes.special.special import Local, Special
from fxsp.types import Length, Replicate, Shard, Type, product

__all__ = ["Extremes"]

aten = torch.ops.aten
#: No position.
_NOWHERE = 2**62
_WORD = {"max": "maximum", "min": "minimum"}


class Extremes(Special):
    """Reductions of tokens that are not free which combine what the ranks find; the result is on every rank."""

    ops = family("combined")

    def decide(self, call: Call, types: list[Type], program: Program) -> Decision | None:
        if len(types) != 1 or facts(call.operands[0]).free:
            return None
        (type_,), rule = types, rule_of(call.node)
        dtype = call.operands[0].meta["val"].dtype
        numbers = call.op in family("norm") or call.op is aten.logsumexp.default
        refused = dtype.is_complex or (numbers and not dtype.is_floating_point)
        if not isinstance(type_, Shard) or rule is None or refused:
            return None
        placement = locate(type_, rule.operands[0], rule.sizes)
        if placement is None or placement.factor not in rule.combined:
            return None
        results = tuple(Replicate(origin=f"{call.op} of all ranks' tokens") for _ in rule.results)
        return Decision((type_,), results, special=self)

    def write(self, local: Local, call: Call, decision: Decision) -> Node | list[Any]:
        (source,), (x, *_) = decision.operands, local.arguments(call, decision).values()
        assert isinstance(source, Shard)
        return _Written(local.build, call, x, source).result()


class _Written:
    """The calls that stand for one reduction."""

    def __init__(self, build: Builder, call: Call, x: Node, type_: Shard) -> None:
        self.build, self.call, self.op, self.type = build, call.node, call.op, type_
        self.arguments = call.arguments
        value = call.operands[0].meta["val"]
        self.shape, self.dtype, self.device = shape_of(call.operands[0]), value.dtype, value.device
        self.dims = reduced_dims(call, len(self.shape))
        self.keep = bool(call.get("keepdim", False))
        self.x, self._do = x, build.call
        #: The values alone: gradients go through ``at_extreme`` only.
        self.data = self._do(aten.detach.default, x) if self._differentiable() else x
        self.real = self._real()
        results = call.node.meta["val"]
        self.result_dtype = (results[0] if isinstance(results, (tuple, list)) else results).dtype

    def _differentiable(self) -> bool:
        return self.build.training and self.dtype.is_floating_point

    def result(self) -> Node | list[Node]:
        if self.op in family("logical"):
            return self._logical()
        if self.op is aten.aminmax.default:
            return [self._extreme(self.x, self.data, op) for op in ("min", "max")]
        if self.op in family("with_index"):
            return list(self._with_index())
        if self.op in family("position"):
            return self._index()
        if self.op is aten.logsumexp.default:
            return self._logsumexp()
        if self.op in family("norm"):
            return self._norm()
        return self._extreme(self.x, self.data, self._word())

    def _word(self) -> str:
        return "max" if self.op in family("largest") else "min"

    # What counts on this rank.

    def _along(self, x: Node) -> Node:
        """What has the tokens' dimension only, to broadcast to the local operand."""
        rows, at = self.type.local_size(self.build.ranks.size), self.type.dim
        sizes: list[Length] = [rows if d == at else 1 for d in range(len(self.shape))]
        return self._do(aten.reshape.default, x, self.build.sizes(sizes))

    def _real(self) -> Node | None:
        """Which local rows count, broadcastable; None: all.  Rows that every rank has count on one of them."""
        sequence = self.type.sequence
        if not sequence.has_pads(self.build.ranks.size) and not any(sequence.whole):
            return None
        sizes = self.build.sizes([self.type.outer, sequence.local_length(self.build.ranks.size)])
        ones = self._do(aten.ones.default, sizes, dtype=torch.bool, device=self.device)
        return self._along(self.build.mask_pads(ones, 1, sequence))

    def _only_real(self, x: Node, fill: float | bool) -> Node:
        return x if self.real is None else self._do(aten.where.ScalarOther, self.real, x, fill)

    def _candidates(self, x: Node, op: str, dtype: torch.dtype) -> Node:
        """``x`` with what changes nothing where a row does not count."""
        if dtype == torch.bool:
            return self._only_real(x, op == "min")
        if dtype.is_floating_point:
            return self._only_real(x, -math.inf if op == "max" else math.inf)
        return self._only_real(x, torch.iinfo(dtype).min if op == "max" else torch.iinfo(dtype).max)

    # Pieces.

    def _combined(self, x: Node, op: str, dtype: torch.dtype, what: str = "") -> Node:
        """The maximum, or minimum, over the ranks of one value for each."""
        new = self.build.all_reduce_extreme(x, op)
        return self._recorded(new, travels_as(dtype), what or f"the {_WORD[op]} over the ranks")

    def _recorded(self, new: Node, dtype: torch.dtype, what: str) -> Node:
        elements = product(n for d, n in enumerate(self.shape) if d not in self.dims)
        self.build.record("all_reduce", new, reduced_bytes(elements, dtype, self.build.ranks.size), what)
        return new

    def _kept(self, x: Node) -> Node:
        """A result with the reduced dimensions, of size one."""
        for dim in () if self.keep else self.dims:
            x = self._do(aten.unsqueeze.default, x, dim)
        return x

    def _same(self, x: Node, y: Node, *, nan: bool) -> Node:
        found = self._do(aten.eq.Tensor, x, y)
        if not nan or not self.dtype.is_floating_point:
            return found
        both = self._do(aten.logical_and.default, *(self._do(aten.isnan.default, z) for z in (x, y)))
        return self._do(aten.logical_or.default, found, both)

    def _hit(self, found: Node) -> Node:
        return found if self.real is None else self._do(aten.logical_and.default, found, self.real)

    def _extreme(self, x: Node, data: Node, op: str) -> Node:
        """The maximum or minimum of ``data``, as a function of ``x``."""
        masked = self._candidates(data, op, self.dtype)
        local = self._do(aten.amax.default if op == "max" else aten.amin.default, masked, self.dims, self.keep)
        value = self._combined(local, op, self.dtype)
        if not self._differentiable():
            return value
        hit = self._hit(self._same(data, self._kept(value), nan=self.op in family("whole_gradient")))
        return self.build.at_extreme(x, value, hit, self.dims, self.keep, ties=True)

    # The families.

    def _logical(self) -> Node:
        word = self._word()
        x = self.data if self.dtype == torch.bool else self._do(aten.ne.Scalar, self.data, 0)
        masked = self._candidates(x, word, torch.bool)
        op = aten.any.dims if word == "max" else aten.all.dims
        value = self._combined(
            self._do(op, masked, self.dims, self.keep), word, torch.bool,
            "whether any rank has one" if word == "max" else "whether all ranks have it",
        )  # fmt: skip
        return value if self.result_dtype == torch.bool else self._do(aten.to.dtype, value, self.result_dtype)

    def _places(self) -> Node:
        """The global index of each local row along the dimension of the tokens, ``[n]``."""
        rows = self.build.positions(self.type.sequence, self.device)
        if self.type.plain:
            return rows
        length, outer = self.build.size(self.type.sequence.length), self.build.size(self.type.outer)
        first = self._do(aten.mul.Tensor, self._do(aten.arange.default, outer, device=self.device), length)
        both = self._do(aten.add.Tensor, self._do(aten.reshape.default, first, [-1, 1]), rows)
        return self._do(aten.reshape.default, both, [-1])

    def _own(self, x: Node, *how: Any) -> tuple[Node, Node]:
        """This rank's extreme, and where it is."""
        both = self._do(aten.max.dim if self._word() == "max" else aten.min.dim, x, *how)
        return self._do(operator.getitem, both, 0), self._do(operator.getitem, both, 1)

    def _first(self, local: Node, value: Node, places: Node) -> Node:
        """The first of the places of those ranks that have the value."""
        here = self._do(aten.where.ScalarOther, self._same(local, value, nan=True), places, _NOWHERE)
        return self._combined(here, "min", torch.int64, "the first position that has it")

    def _with_index(self) -> tuple[Node, Node]:
        word, (dim,) = self._word(), self.dims or [0]
        local, at = self._own(self._candidates(self.data, word, self.dtype), dim, self.keep)
        value = self._combined(local, word, self.dtype)
        places = self._places()
        index = self._first(local, value, self._do(aten.index.Tensor, places, [at]))
        if self._differentiable():
            hit = self._hit(self._do(aten.eq.Tensor, self._along(places), self._kept(index)))
            value = self.build.at_extreme(self.x, value, hit, self.dims, self.keep, ties=False)
        return value, index

    def _index(self) -> Node:
        word = self._word()
        masked = self._candidates(self.data, word, self.dtype)
        if self.arguments.get("dim") is not None:
            local, at = self._own(masked, *self.dims, self.keep)
            places = self._do(aten.index.Tensor, self._places(), [at])
            return self._first(local, self._combined(local, word, self.dtype), places)
        # Of all elements: the place in the flattened value.
        dim, inner = self.type.dim, product(self.shape[self.type.dim + 1 :])
        flat = self._do(aten.reshape.default, masked, [-1])
        local, at = self._own(flat, 0)
        size = self.build.size
        rest = self._do(aten.remainder.Scalar, at, size(inner))
        row = self._do(aten.floor_divide.default, at, size(inner))
        lines = self.type.local_size(self.build.ranks.size)
        along = self._do(aten.index.Tensor, self._places(), [self._do(aten.remainder.Scalar, row, size(lines))])
        before = self._do(aten.floor_divide.default, row, size(lines))
        place = self._do(aten.mul.Tensor, before, size(product((self.shape[dim], inner))))
        place = self._do(aten.add.Tensor, place, self._do(aten.mul.Tensor, along, size(inner)))
        place = self._do(aten.add.Tensor, place, rest)
        index = self._first(local, self._combined(local, word, self.dtype), place)
        return self._do(aten.reshape.default, index, [1] * len(self.shape)) if self.keep else index

    def _wide(self, x: Node) -> tuple[Node, torch.dtype]:
        """``x`` as sums of it accumulate: of halves in fp32."""
        wide = torch.promote_types(self.result_dtype, torch.promote_types(self.dtype, torch.float32))
        return (x if wide == self.dtype else self._do(aten.to.dtype, x, wide)), wide

    def _narrow(self, x: Node, wide: torch.dtype) -> Node:
        return x if wide == self.result_dtype else self._do(aten.to.dtype, x, self.result_dtype)

    def _logsumexp(self) -> Node:
        masked = self._only_real(self.x, -math.inf)
        data = self._do(aten.detach.default, masked) if self._differentiable() else masked
        local = self._do(aten.amax.default, data, self.dims, True)
        most = self._combined(local, "max", self.dtype)
        most = self._do(aten.where.ScalarSelf, self._do(aten.isinf.default, most), 0.0, most)
        (x, wide), (most, _) = self._wide(masked), self._wide(most)
        summed = self._do(aten.exp.default, self._do(aten.sub.Tensor, x, most))
        summed = self._do(aten.sum.dim_IntList, summed, self.dims, self.keep)
        summed = self._recorded(self.build.all_reduce(summed), wide, "a sum of exponentials over the ranks")
        total = self._do(aten.log.default, summed)
        most = most if self.keep else self._do(aten.squeeze.dims, most, self.dims)
        return self._narrow(self._do(aten.add.Tensor, total, most), wide)

    def _norm(self) -> Node:
        order = self.arguments.get("ord", self.arguments.get("p", 2))
        order = 2 if order is None else order
        if math.isinf(order):
            x = self._do(aten.abs.default, self.x)
            data = self._do(aten.detach.default, x) if self._differentiable() else x
            result = self._extreme(x, data, "max" if order > 0 else "min")
            return self._narrow(result, self.dtype)
        x, wide = self._wide(self.x)
        x = self._only_real(x, 0.0)
        if order == 0:
            power = self._do(aten.to.dtype, self._do(aten.ne.Scalar, x, 0), wide)
        else:
            power = self._do(aten.abs.default, x) if order == 1 else self._do(aten.mul.Tensor, x, x)
        total = self._do(aten.sum.dim_IntList, power, self.dims, self.keep)
        total = self._recorded(self.build.all_reduce(total), wide, "a sum of powers over the ranks")
        if order == 2:
            # The gradient of a norm of zero is zero, that of a root is not.
            none = self._do(aten.eq.Scalar, total, 0)
            root = self._do(aten.sqrt.default, self._do(aten.where.ScalarSelf, none, 1.0, total))
            total = self._do(aten.where.ScalarSelf, none, 0.0, root)
        return self._narrow(total, wide)
