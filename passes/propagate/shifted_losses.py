"""shifted losses: scores that are cut before a loss are not; the targets of the rows that were cut off are ignored.

A causal language model compares ``logits[:, :-1]`` with ``labels[:, 1:]``.  A cut that is not at the end of a segment
would gather the logits, the largest tensor of all; the same loss over all rows, the last of them with a target that is
ignored, needs nothing but whole targets, which are small.

Input, where ``%logits`` is split along its tokens::

    %slice    = slice(%logits, 1, 0, -1)              [2, 8, 7]
    %reshape  = reshape(%slice, [-1, 7])              [16, 7]
    %targets  = reshape(%labels, [-1])                [16]
    %loss     = cross_entropy_loss(%reshape, %targets)

Output::

    %reshape  = reshape(%logits, [18, 7])             the steps between cut and loss, with all rows
    %view     = reshape(%targets, [2, 8])
    %pad      = constant_pad_nd(%view, [0, 1], -100)  [2, 9]
    %targets  = reshape(%pad, [18])
    %loss     = cross_entropy_loss(%reshape, %targets)

The loss of an ignored row is zero, its gradient too, and the mean counts the others.  Without a reduction the losses of
all rows go through products, casts and views to a sum or mean (:class:`_Rest`), else they are cut, which is little.

After this pass no loss over classes is computed from a cut of split scores, if its rows are half of them or more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from fxsp.lengths import hint
from fxsp.passes.base import Program
from fxsp.passes.builder import Writer, erase_unused
from fxsp.passes.graph import Call, facts, shape_of, tensor_value, type_of
from fxsp.passes.propagate.propagate import Propagate
from fxsp.passes.rules.decide import decide
from fxsp.passes.rules.dims import cut_bounds
from fxsp.passes.rules.families import family
from fxsp.passes.rules.reduce import reduced_dims
from fxsp.passes.rules.table import rule_of
from fxsp.torch_internals import fake_mode_of
from fxsp.types import Length, Replicate, Sequence, Shard, Type, as_length, product, same_length

__all__ = ["ShiftedLosses"]

aten = torch.ops.aten
#: So many steps may be between a cut and its loss.
_DEPTH = 24
_NONE = 0
#: Of zero they make zero.
_KEEP_ZERO = family("keeps_zero", "scale", "reshape")


@dataclass(frozen=True)
class ShiftedLosses:
    """After this pass a causal loss does not gather its scores."""

    name: str = "shifted_losses"

    def apply(self, program: Program) -> Program:
        found = [one for node in program.graph.nodes if (one := _shifted(node)) is not None]
        mode = next((m for m in (fake_mode_of(one.loss.meta["val"]) for one in found) if m is not None), None)
        if mode is None:
            return program
        for one in found:
            _rewrite(Writer(program.graph, mode), one)
        # Also what was begun and given up is without a use, and without a type.
        erase_unused(program.graph)
        program.gm.recompile()
        program.unfused = None  # it speaks of nodes that may be gone
        Propagate().apply(program)
        return program


@dataclass(frozen=True)
class _Shifted:
    """A loss of scores that were cut: ``x[start:end]`` along the tokens, and the steps from there to the loss."""

    loss: Node
    x: Node
    start: Length
    end: Length
    #: The steps, the cut first, each with the type that its result would have if the cut's tokens were split.
    steps: tuple[tuple[Node, Shard], ...]

    @property
    def length(self) -> Length:
        """The rows of all, cut or not."""
        return shape_of(self.x)[self.steps[0][1].dim]


def _shifted(loss: Node) -> _Shifted | None:
    if loss.target not in family("class_loss"):
        return None
    scores, target = Call(loss).operands[:2]
    if target.meta["val"].dtype.is_floating_point or len(shape_of(scores)) != len(shape_of(target)) + 1:
        return None
    chain = _to_cut(scores, _DEPTH)
    if chain is None:
        return None
    cut, *others = chain
    call, (x,) = Call(cut), Call(cut).operands
    dim = call.dim("dim", len(shape_of(x)))
    type_ = type_of(x)
    if not isinstance(type_, Shard) or type_.dim != dim or not type_.plain or facts(x).free:
        return None
    bounds = cut_bounds(call, shape_of(x)[dim], dim)
    if bounds is None or isinstance(type_of(cut), Shard):
        return None
    ((start, end),) = bounds
    total, count = shape_of(x)[dim], as_length(end - start)
    if 2 * hint(count) < hint(total) or not all(isinstance(n, int) for n in (start, as_length(total - end))):
        return None
    steps = [(cut, Shard(dim, Sequence.of(count)))]
    for node in others:
        passed = _passed(node, *steps[-1])
        if passed is None:
            return None
        steps.append((node, passed))
    last = steps[-1][1]
    if last.dim == (1 if len(shape_of(scores)) > 1 else 0):  # the classes
        return None
    return _Shifted(loss, x, start, end, tuple(steps))


def _to_cut(node: Node, depth: int) -> list[Node] | None:
    """The steps from a cut to ``node``, by operators that have a rule; the cut is one that a gather would be for."""
    if node.target in family("slice"):
        (x,) = Call(node).operands
        if isinstance(facts(x).type, Shard) and not isinstance(type_of(node), Shard):
            return [node]
    if depth == 0 or tensor_value(node) is None or node.op != "call_function" or rule_of(node) is None:
        return None
    for operand in Call(node).operands:
        found = _to_cut(operand, depth - 1)
        if found is not None:
            return [*found, node]
    return None


def _passed(node: Node, before: Node, type_: Shard) -> Shard | None:
    """The type of a step's result, if its other operands have nothing to do with tokens."""
    call = Call(node)
    if call.operands.count(before) != 1:
        return None
    types: list[Type] = [type_ if x is before else Replicate() for x in call.operands]
    decision = decide(call, rule_of(node), types, [1 for _ in types], [False for _ in types])
    (result, *more) = decision.results
    alone = all(x is before or not isinstance(t, Shard) for x, t in zip(call.operands, decision.operands, strict=True))
    kept = alone and not more and isinstance(result, Shard) and all(n == 1 for n in result.sequence.units)
    return result if kept else None  # type: ignore[return-value]


def _rewrite(write: Writer, it: _Shifted) -> None:
    """The loss of all rows in its place; nothing where a size cannot be said."""
    write.at(it.loss)
    new = it.x
    for node, type_ in it.steps[1:]:
        sizes = _all_rows(write, it, node, type_)
        previous = it.steps[[n for n, _ in it.steps].index(node) - 1][0]
        if node.target in family("reshape", "expand"):
            if sizes is None:
                return
            op = aten.reshape.default if node.target in family("reshape") else aten.expand.default
            with write.on_behalf_of(node):
                new = write.call(op, new, sizes)
            continue
        given = {previous: new}
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n, given=given: given.get(n, n))  # type: ignore[misc]
        with write.on_behalf_of(node):
            new = write.call(node.target, *args, **kwargs)  # type: ignore[arg-type]
    call, rows = Call(it.loss), _rows_type(it)
    target = _padded(write, it, call.operands[1], rows, call["ignore_index"])
    if target is None:
        return
    args, kwargs = call.bound_to({**call.arguments, "self": new, "target": target}).rebuild()
    loss = write.call(it.loss.target, *args, **kwargs)  # type: ignore[arg-type]
    if call["reduction"] == _NONE:
        _Rest(write, it).replace(it.loss, loss, rows)
    else:
        it.loss.replace_all_uses_with(loss)


def _rows_type(it: _Shifted) -> Shard:
    """How the tokens lie in the targets: as in the scores, without the classes."""
    last = it.steps[-1][1]
    return replace(last, dim=last.dim if last.dim == 0 else last.dim - 1)


def _size(write: Writer, it: _Shifted, length: Length) -> Any:
    """A length as an argument; None where no dimension of the scores has it."""
    if isinstance(length, int):
        return length
    sizes = zip(shape_of(it.x), range(len(shape_of(it.x))), strict=True)
    at = next((d for n, d in sizes if same_length(n, length)), None)
    return None if at is None else write.call(aten.sym_size.int, it.x, at)


def _sizes(write: Writer, it: _Shifted, lengths: list[Length]) -> list[Any] | None:
    """Lengths as arguments, one of them, that of a product of symbols say, as ``-1``."""
    sizes = [_size(write, it, n) for n in lengths]
    if sizes.count(None) > 1:
        return None
    return [-1 if n is None else n for n in sizes]


def _all_rows(write: Writer, it: _Shifted, node: Node, type_: Shard) -> list[Any] | None:
    """The sizes of a step's result with all rows."""
    shape = list(shape_of(node))
    shape[type_.dim] = product((type_.outer, it.length))
    return _sizes(write, it, shape)


def _padded(write: Writer, it: _Shifted, x: Node, rows: Shard, value: Any) -> Node | None:
    """A tensor by rows, ``value`` in those that were cut off."""
    shape, dim = list(shape_of(x)), rows.dim
    count = as_length(it.end - it.start)
    apart = _sizes(write, it, [*shape[:dim], rows.outer, count, *shape[dim + 1 :]])
    joined = _sizes(write, it, [*shape[:dim], product((rows.outer, it.length)), *shape[dim + 1 :]])
    if apart is None or joined is None:
        return None
    if not rows.plain:
        x = write.call(aten.reshape.default, x, apart)
    after = len(shape) - 1 - dim
    pads = [*(0 for _ in range(2 * after)), it.start, as_length(it.length - it.end)]
    x = write.call(aten.constant_pad_nd.default, x, pads, value)
    return x if rows.plain else write.call(aten.reshape.default, x, joined)


class _Rest:
    """What becomes of losses without a reduction: of those of all rows, which are zero where a row was cut off."""

    def __init__(self, write: Writer, it: _Shifted) -> None:
        self.write, self.it = write, it

    def replace(self, old: Node, new: Node, rows: Shard) -> None:
        """Have the users of ``old`` use ``new``, which has all rows."""
        cut: Node | None = None
        for user in list(old.users):
            self.write.at(user)
            if not self._passed_on(old, user, new, rows):
                cut = self._cut(old, new, rows) if cut is None else cut
                user.replace_input_with(old, cut)

    def _cut(self, old: Node, new: Node, rows: Shard) -> Node:
        """The rows that the program has."""
        self.write.at(new.next)
        shape, dim = list(shape_of(old)), rows.dim
        if not rows.plain:
            apart = _sizes(self.write, self.it, [*shape[:dim], rows.outer, self.it.length, *shape[dim + 1 :]])
            new = self.write.call(aten.reshape.default, new, apart)
            dim += 1
        rest = as_length(self.it.length - self.it.end)
        new = self.write.call(aten.slice.Tensor, new, dim, self.it.start, -rest if rest else 2**63 - 1)
        sizes = _sizes(self.write, self.it, shape)
        return new if rows.plain else self.write.call(aten.reshape.default, new, sizes)

    def _passed_on(self, old: Node, user: Node, new: Node, rows: Shard) -> bool:
        call, write = Call(user) if isinstance(user.target, torch._ops.OpOverload) else None, self.write
        if call is None or tensor_value(user) is None:
            return False
        if user.target in family("total"):
            return self._reduced(call, user, new, rows)
        if user.target not in _KEEP_ZERO:
            return False
        passed = self._type(call, old, rows)
        if passed is None or call.operands.count(old) != 1:
            return False
        if user.target in family("reshape"):
            sizes = _all_rows(write, self.it, user, passed)
            if sizes is None:
                return False
            result = write.call(aten.reshape.default, new, sizes)
        else:
            given: dict[Node, Node] = {old: new}
            for x in call.operands:
                if x is old:
                    continue
                at = len(shape_of(x)) - len(shape_of(user)) + passed.dim
                if at < 0 or same_length(shape_of(x)[at], 1):
                    continue
                padded = _padded(write, self.it, x, replace(passed, dim=at), 0)
                if padded is None:
                    return False
                given[x] = padded
            args, kwargs = torch.fx.map_arg((user.args, user.kwargs), lambda n: given.get(n, n))
            result = write.call(user.target, *args, **kwargs)  # type: ignore[arg-type]
        self.replace(user, result, passed)
        return True

    def _type(self, call: Call, old: Node, rows: Shard) -> Shard | None:
        types: list[Type] = [rows if x is old else Replicate() for x in call.operands]
        free = [x is not old for x in call.operands]
        decision = decide(call, rule_of(call.node), types, [1 for _ in types], free)
        (result,) = decision.results
        fits = isinstance(result, Shard) and all(n == 1 for n in result.sequence.units)
        return result if fits else None  # type: ignore[return-value]

    def _reduced(self, call: Call, user: Node, new: Node, rows: Shard) -> bool:
        """A sum over all rows is the same; a mean is their sum by the number of those that the program has."""
        shape = shape_of(call.operands[0])
        dims = reduced_dims(call, len(shape))
        count = product(shape[d] for d in dims)
        if rows.dim not in dims or (user.target in family("mean") and not isinstance(count, int)):
            return False
        dtype = user.meta["val"].dtype
        result = self.write.call(aten.sum.dim_IntList, new, dims, bool(call.get("keepdim", False)), dtype=dtype)
        if user.target in family("mean"):
            result = self.write.call(aten.div.Scalar, result, count)
        user.replace_all_uses_with(result)
        return True
