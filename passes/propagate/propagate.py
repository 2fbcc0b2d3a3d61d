"""propagate: give every value a type.

Types flow forward from the plan's annotations through the rule table; where an operator cannot run on shards its
operands are made whole (the partitioner reports it).  Nothing is rewritten: each tensor node gets, as
:class:`~fxsp.passes.graph.Facts`, its ``type``, its ``decision``, and whether its whole value is ``free``.

Output (one line per value)::

    %x        R
    %annotate S(1, [5])
    %linear   S(1, [5])
    %mean     P
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from fxsp.errors import PlanError, UnsupportedError
from fxsp.kernels.ops import fxsp_ops
from fxsp.passes.attention.decide import Attention
from fxsp.passes.attention.unfused import UnfusedProducts
from fxsp.passes.base import Pass, Program
from fxsp.passes.graph import Call, facts, is_split, mark, shape_of, tensor_nodes, tensor_value, type_of
from fxsp.passes.rules.decide import Decision, decide_by_rule, replicate_all
from fxsp.passes.rules.families import family
from fxsp.passes.special.cat_and_cut import Cats, Cuts, Select, SliceScatter
from fxsp.passes.special.dropout import Dropout
from fxsp.passes.special.extremes import Extremes
from fxsp.passes.special.likes import Likes, is_constant
from fxsp.passes.special.losses import Losses
from fxsp.passes.special.special import Special
from fxsp.passes.special.sums import Sized, Summands, Sums
from fxsp.source import place
from fxsp.types import Length, Partial, Replicate, Segment, Sequence, Shard, Type, as_length, same_length

__all__ = ["SPECIALS", "Propagate", "is_annotate"]


#: Who is asked before the rules, in this order: the first that decides has decided.
SPECIALS: tuple[Special, ...] = (
    Likes(), Summands(), Cats(), Cuts(), SliceScatter(), Losses(), Attention(), Select(), Extremes(), Dropout(),
    Sums(), Sized(), UnfusedProducts(),
)  # fmt: skip


def is_annotate(node: Node) -> bool:
    """Whether a node is a plan entry waiting to be carried out."""
    return node.op == "call_function" and node.target is fxsp_ops.annotate.default


class Propagate(Pass):
    """After this pass every tensor node has a type, and every call on tensors a decision."""

    def apply(self, program: Program) -> Program:
        for position, node in enumerate(program.graph.find_nodes(op="placeholder")):
            if (type_ := program.arrivals.get(position)) is not None:
                mark(node, type=type_, free=False)
        for node in program.graph.nodes:
            self._visit(node, program)
        return program

    def _visit(self, node: Node, program: Program) -> None:
        if node.op == "output" or (node.op == "placeholder" and is_split(node)):
            return
        value = node.meta.get("val")
        if is_annotate(node):
            source = node.args[0]
            assert isinstance(source, Node)
            type_ = _annotated(node, type_of(source), program.head_tail)
            mark(node, type=type_, free=facts(source).free)
        elif node.target is operator.getitem and isinstance(node.args[0], Node):
            types = facts(node.args[0]).type
            if isinstance(types, tuple) and tensor_value(node) is not None:
                type_ = types[_tensor_index(node)]
                mark(node, type=type_, free=isinstance(type_, Replicate))
        elif isinstance(node.target, torch._ops.OpOverload) and _holds_tensor(value) and not facts(node).island:
            decision = self._decide(node, program)
            results = decision.results if isinstance(value, (tuple, list)) else decision.results[0]
            mark(node, decision=decision, type=results, free=_is_free(node, results))
        elif isinstance(value, torch.Tensor):
            mark(node, type=Replicate(origin="an input of the graph" if node.op == "placeholder" else ""), free=True)
        elif isinstance(value, (tuple, list)) and _holds_tensor(value):
            mark(node, type=tuple(Replicate() for v in value if isinstance(v, torch.Tensor)), free=True)

    def _decide(self, node: Node, program: Program) -> Decision:
        call = Call(node)
        operands = call.operands
        _refuse_writes(call)
        given = [type_of(n) for n in operands]
        if all(isinstance(t, Replicate) for t in given) and call.op not in Likes.ops:
            return replicate_all(call, given, "all operands are whole")
        # A summand is summed before it is used, unless what uses it is linear.
        types: list[Type] = [Replicate() if isinstance(t, Partial) else t for t in given]
        rows = isinstance(types[0], Shard) and types[0].dim < len(shape_of(operands[0])) - 1
        if facts(node).row_wise and not rows and any(isinstance(t, Shard) for t in types):
            return replicate_all(call, types, f"{call.op} on a tensor subclass treats rows alone, not columns")
        for special in SPECIALS:
            if call.op in special.ops and (decision := special.decide(call, types, program)) is not None:
                return decision
        return decide_by_rule(call, types)


def _refuse_writes(call: Call) -> None:
    """Writes are allowed to inputs of the graph only: a conversion of anything else would lose them."""
    for target in call.written:
        if target.op != "placeholder":
            raise UnsupportedError(
                f"{call.op} in {place(call.node)} "
                f"writes to {target}, no input of the graph: functionalize in-place operators first"
            )


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(isinstance(v, torch.Tensor) for v in value)
    return isinstance(value, torch.Tensor)


def _tensor_index(node: Node) -> int:
    """Position of this result among the tensor results of its producer."""
    producer, index = node.args
    assert isinstance(producer, Node)
    assert isinstance(index, int)
    return sum(isinstance(v, torch.Tensor) for v in producer.meta["val"][:index])


def _is_free(node: Node, type_: Any) -> bool:
    if isinstance(type_, Replicate):
        return True
    if not isinstance(type_, Shard):
        return False
    if is_constant(node):
        return True
    cheap = node.target in family("cheap", "cat", "slice", "split")
    return cheap and all(facts(n).free for n in tensor_nodes((node.args, node.kwargs)))


def _annotated(node: Node, source: Type, head_tail: Iterable[Length]) -> Type:
    """The type that a plan entry asks for; tokens of the lengths ``head_tail`` are split into heads and tails."""
    _, kind, dim, text_len, entry, *unit = node.args
    if kind == "gather":
        return Replicate(origin=str(entry))
    assert isinstance(dim, int)
    if isinstance(source, Shard) and source.dim == dim and source.plain:
        return replace(source, origin=source.origin or str(entry))
    shape = shape_of(node)
    if not 0 <= dim < len(shape):
        raise PlanError(f"{entry}: dimension {dim} is out of range for a tensor of shape {list(shape)}")
    length, name = shape[dim], str(entry).partition(":")[0]
    if same_length(length, 0):
        return source
    text = as_length(text_len.meta["val"] if isinstance(text_len, Node) else text_len)
    if isinstance(text, int) and text < 0:
        segment = _segment(length, name, head_tail)
        segment = replace(segment, unit=as_length(unit[0]), layout="contiguous") if unit else segment
        return Shard(dim, Sequence((segment,)), origin=str(entry))
    rest = as_length(length - text)
    if isinstance(rest, int) and rest <= 0:
        raise PlanError(
            f"{entry}: the text part has {text} tokens, but the tensor has only {length} along dimension {dim}"
        )
    split = _segment(rest, name, head_tail)
    segments = (split,) if same_length(text, 0) else (Segment(text, False, f"{name} (text)"), split)
    return Shard(dim, Sequence(segments), origin=str(entry))


def _segment(length: Length, name: str, head_tail: Iterable[Length]) -> Segment:
    dealt = any(same_length(length, n) for n in head_tail)
    return Segment(length, name=name, layout="head-tail" if dealt else "contiguous")
