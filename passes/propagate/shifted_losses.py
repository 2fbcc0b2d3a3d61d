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
all rows go through products, casts and views to a sum or mean, else they are cut, which is little.

After this pass no loss over classes is computed from a cut of split scores, if its rows are half of them or more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Node

from fxsp.lengths import hint
from fxsp.passes.base import Pass, Program
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


class ShiftedLosses(Pass):
    """After this pass a causal loss does not gather its scores."""

    def apply(self, program: Program) -> Program:
        found = [one for node in program.graph.nodes if (one := _shifted(node)) is not None]
        mode = next((m for m in (fake_mode_of(one.loss.meta["val"]) for one in found) if m is not None), None)
        if mode is None:
            return program
        for one in found:
            one.rewrite(Writer(program.graph, mode))
        # Also what was begun and given up is without a use, and without a type.
        erase_unused(program.graph)
        program.gm.recompile()
        program.unfused = None  # it speaks of nodes that may be gone
        Propagate().apply(program)
        return program


@dataclass
class _Shifted:
    """A loss of scores that were cut: ``x[start:end]`` along the tokens, and the steps from there to the loss.

    It writes the loss of all rows, and what becomes of it if it is not reduced: it is zero where a row was cut off.
    """

    loss: Node
    x: Node
    start: Length
    end: Length
    #: The steps, the cut first, each with the type that its result would have if the cut's tokens were split.
    steps: tuple[tuple[Node, Shard], ...]
    write: Writer = field(init=False)

    @property
    def length(self) -> Length:
        """The rows of all, cut or not."""
        return shape_of(self.x)[self.steps[0][1].dim]

    def rewrite(self, write: Writer) -> None:
        """The loss of all rows in its place; nothing where a size cannot be said."""
        self.write = write
        write.at(self.loss)
        old, new = self.steps[0][0], self.x
        for node, type_ in self.steps[1:]:
            with write.on_behalf_of(node):
                step = self._step(node, {old: new}, new, type_)
            if step is None:
                return
            old, new = node, step
        # The tokens lie in the targets as in the scores, without the classes.
        call, rows = Call(self.loss), replace(self.steps[-1][1], dim=max(self.steps[-1][1].dim - 1, 0))
        target = self._padded(call.operands[1], rows, call["ignore_index"])
        if target is None:
            return
        loss = write.same(call, {**call.arguments, "self": new, "target": target})
        if call["reduction"] == _NONE:
            self._replace(self.loss, loss, rows)
        else:
            self.loss.replace_all_uses_with(loss)

    def _step(self, node: Node, given: dict[Node, Node], x: Node, type_: Shard) -> Node | None:
        """A step with all rows: of ``given`` operands, of which ``x`` has the tokens."""
        if node.target in family("reshape", "expand"):
            shape = list(shape_of(node))
            shape[type_.dim] = product((type_.outer, self.length))
            sizes = self._sizes(shape)
            op = aten.reshape.default if node.target in family("reshape") else aten.expand.default
            return None if sizes is None else self.write.call(op, x, sizes)
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: given.get(n, n))
        return self.write.call(node.target, *args, **kwargs)  # type: ignore[arg-type]

    def _sizes(self, lengths: list[Length]) -> list[Any] | None:
        """Lengths as arguments, of symbolic ones those that the scores have; one of them, a product say, as ``-1``."""
        sizes: list[Any] = []
        for length in lengths:
            at = next((d for d, n in enumerate(shape_of(self.x)) if same_length(n, length)), None)
            if isinstance(length, int):
                sizes.append(length)
            else:
                sizes.append(-1 if at is None else self.write.call(aten.sym_size.int, self.x, at))
        return sizes if sizes.count(-1) < 2 else None

    def _padded(self, x: Node, rows: Shard, value: Any) -> Node | None:
        """A tensor by rows, ``value`` in those that were cut off."""
        after = len(shape_of(x)) - 1 - rows.dim
        pads = [*(0 for _ in range(2 * after)), self.start, as_length(self.length - self.end)]
        pad = lambda y, _: self.write.call(aten.constant_pad_nd.default, y, pads, value)  # noqa: E731
        return self._along_tokens(pad, x, rows, as_length(self.end - self.start), self.length)

    def _cut(self, x: Node, rows: Shard) -> Node | None:
        """The rows that the program has."""
        rest = as_length(self.length - self.end)
        end = -rest if rest else 2**63 - 1
        cut = lambda y, dim: self.write.call(aten.slice.Tensor, y, dim, self.start, end)  # noqa: E731
        return self._along_tokens(cut, x, rows, self.length, as_length(self.end - self.start))

    def _along_tokens(
        self, change: Callable[[Node, int], Node], x: Node, rows: Shard, before: Length, after: Length
    ) -> Node | None:
        """``change(x, dim)``, which makes ``after`` tokens of ``before``; None where a size cannot be said."""
        lead, last = shape_of(x)[: rows.dim], shape_of(x)[rows.dim + 1 :]
        if rows.plain:
            return change(x, rows.dim)
        apart = self._sizes([*lead, rows.outer, before, *last])
        joined = self._sizes([*lead, product((rows.outer, after)), *last])
        if apart is None or joined is None:
            return None
        new = change(self.write.call(aten.reshape.default, x, apart), rows.dim + 1)
        return self.write.call(aten.reshape.default, new, joined)

    def _replace(self, old: Node, new: Node, rows: Shard) -> None:
        """Have the users of ``old`` use ``new``, which has all rows."""
        cut: Node | None = None
        for user in list(old.users):
            self.write.at(user)
            if not self._passed_on(old, user, new, rows):
                self.write.at(new.next)
                cut = self._cut(new, rows) if cut is None else cut
                assert cut is not None
                user.replace_input_with(old, cut)

    def _passed_on(self, old: Node, user: Node, new: Node, rows: Shard) -> bool:
        if not isinstance(user.target, torch._ops.OpOverload) or tensor_value(user) is None:
            return False
        call = Call(user)
        if user.target in family("total"):
            return self._reduced(call, new, rows)
        passed = _passed(user, old, rows, alone=False) if user.target in _KEEP_ZERO else None
        if passed is None:
            return False
        given = {old: new}
        for x in call.operands if user.target not in family("reshape") else ():
            at = len(shape_of(x)) - len(shape_of(user)) + passed.dim
            if x is old or at < 0 or same_length(shape_of(x)[at], 1):
                continue
            padded = self._padded(x, replace(passed, dim=at), 0)
            if padded is None:
                return False
            given[x] = padded
        result = self._step(user, given, new, passed)
        if result is not None:
            self._replace(user, result, passed)
        return result is not None

    def _reduced(self, call: Call, new: Node, rows: Shard) -> bool:
        """A sum over all rows is the same; a mean is their sum by the number of those that the program has."""
        shape = shape_of(call.operands[0])
        dims = reduced_dims(call, len(shape))
        count = product(shape[d] for d in dims)
        if rows.dim not in dims or (call.op in family("mean") and not isinstance(count, int)):
            return False
        dtype = call.node.meta["val"].dtype
        result = self.write.call(aten.sum.dim_IntList, new, dims, bool(call.get("keepdim", False)), dtype=dtype)
        if call.op in family("mean"):
            result = self.write.call(aten.div.Scalar, result, count)
        call.node.replace_all_uses_with(result)
        return True


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
        passed = _passed(node, *steps[-1], alone=True)
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


def _passed(node: Node, before: Node, type_: Shard, *, alone: bool) -> Shard | None:
    """The type of a step's result; ``alone``: if its other operands have nothing to do with tokens."""
    call = Call(node)
    if call.operands.count(before) != 1:
        return None
    types: list[Type] = [type_ if x is before else Replicate() for x in call.operands]
    decision = decide(call, rule_of(node), types, [1 for _ in types], [False for _ in types])
    (result, *more) = decision.results
    if more or not isinstance(result, Shard) or any(n != 1 for n in result.sequence.units):
        return None
    others = (t for x, t in zip(call.operands, decision.operands, strict=True) if x is not before)
    return None if alone and any(isinstance(t, Shard) for t in others) else result
