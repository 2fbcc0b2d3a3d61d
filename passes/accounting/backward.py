"""What the backward pass of a local graph will send, read off the forward graph before anyone differentiates it.

The gradient of a value in one form comes in the adjoint form (the table in :mod:`fxsp.kernels.ops`), so every operator
that a gradient goes through says what its adjoint sends::

    use             all_reduce        a parameter, or another whole value, that is used with shards
    shard           all_gather        a whole value of which each rank uses its rows (all_reduce of whole segments)
    gather_used     reduce_scatter    a gathered value that is used with shards
    all_to_all      all_to_all
    at_extreme      all_reduce        how many elements are the maximum
    ring_attention  rotation          keys and values once more, and their gradients one step behind, in fp32
    gather, all_reduce, ...           nothing

In an activation checkpoint a collective that is not saved is repeated where a gradient needs what came of it.

A gradient goes through an operator if an input that requires grad leads to it and it leads to an output, both along
floating values that nobody detached.  Gradients of parameters travel in buckets: their bytes are those counted here,
their messages are fewer.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from fxsp.kernels.collectives import summand_dtype
from fxsp.passes.base import Program
from fxsp.passes.builder import reduced_bytes, split_bytes
from fxsp.passes.graph import facts, global_value, type_of, value_of
from fxsp.passes.verify import infer_local
from fxsp.report import CollectiveRecord
from fxsp.source import module_path, node_source
from fxsp.torch_internals import is_operator, is_recomputed, schema
from fxsp.types import Length, Sequence, Shard, as_length, product

__all__ = ["backward_collectives"]

aten = torch.ops.aten
#: Their results are values without history.
_CONSTANT = (aten.detach.default, aten.ones_like.default, aten.zeros_like.default, aten.empty_like.default)
#: The gradients of their operands do not need the operands.
_LINEAR = frozenset(
    "add sub neg sum mean cumsum flip roll cat stack split split_with_sizes chunk unbind narrow slice select view "
    "reshape expand unsqueeze squeeze flatten unflatten permute transpose movedim clone contiguous to alias "
    "constant_pad_nd".split()
)
_ATTENTION = "gradients of tokens and heads of an attention"


def backward_collectives(program: Program) -> list[CollectiveRecord]:
    """What each rank sends in the backward pass, for a partitioned program, in the order of the forward pass.

    Nothing if it is not for training.  A record's ``value`` is that of the forward pass whose gradient travels.
    """
    if not program.training:
        return []
    with_gradients = _with_gradients(program)
    records = [record for node in with_gradients for record in _adjoint(node, program)]
    return [*_once_more(program, frozenset(with_gradients)), *records]


def _once_more(program: Program, with_gradients: frozenset[Node]) -> Iterator[CollectiveRecord]:
    """Collectives of activation checkpoints that are repeated, because a gradient needs what comes of them."""
    made = {record.value: record for record in program.report.collectives}
    for node in program.graph.nodes:
        if node.name not in made or not is_recomputed(node):
            continue
        queue, seen = list(node.users), set(node.users)
        for user in queue:
            if not is_recomputed(user):
                continue  # it is saved, or its operands are: it is outside
            if user in with_gradients and not _passes_on(user):
                yield replace(made[node.name], reason="computed again, in an activation checkpoint")
                break
            queue += [n for n in user.users if n not in seen]
            seen.update(user.users)


def _passes_on(node: Node) -> bool:
    """Whether the gradients of an operator's operands do not depend on their values."""
    if not is_operator(node.target):
        return node.target is operator.getitem
    namespace, name = schema(node.target).name.split("::")
    return name in _LINEAR or (namespace == "fxsp" and name not in ("ring_attention", "merged_attention"))


def _with_gradients(program: Program) -> list[Node]:
    """The nodes that a gradient goes through."""
    nodes = list(program.graph.nodes)
    needs: set[Node] = set()
    for node in nodes:
        if node.op == "placeholder":
            if getattr(global_value(node), "requires_grad", False):
                needs.add(node)
        elif node.op != "output" and node.target not in _CONSTANT and not needs.isdisjoint(node.all_input_nodes):
            if _floating(node):
                needs.add(node)
    wanted: set[Node] = set()
    for node in reversed(nodes):
        written = node.target is aten.copy_.default  # an input, and so a result
        if node.op == "output" or (node in needs and (written or node in wanted)):
            wanted.update(node.all_input_nodes)
    return [node for node in nodes if node in needs and node in wanted and node.op != "placeholder"]


def _floating(node: Node) -> bool:
    """Whether a gradient of the node's value can be; a value of unknown kind may have one."""
    values = [v for v in tree_leaves(value_of(node)) if isinstance(v, torch.Tensor)]
    return not values or any(v.is_floating_point() or v.is_complex() for v in values)


def _adjoint(node: Node, program: Program) -> Iterator[CollectiveRecord]:
    if not is_operator(node.target) or not schema(node.target).name.startswith("fxsp::"):
        return
    name = schema(node.target).name.removeprefix("fxsp::")
    size = program.ranks.size
    forward = [r for r in program.report.collectives if r.value == node.name]

    def record(kind: str, sent: Length, reason: str, tokens: Sequence | None = None) -> CollectiveRecord:
        place = module_path(node) or program.report.root
        return CollectiveRecord(kind, node.name, place, sent, reason, node_source(node), tokens)

    if name == "use" and node.args[1]:
        source = node.args[0]
        value = _whole_value(node, program)
        parameter = isinstance(source, Node) and facts(source).is_parameter
        what = "gradients of parameters" if parameter else "the gradient of a whole value that is used with shards"
        yield record("all_reduce", reduced_bytes(product(map(as_length, value.shape)), value.dtype, size), what)
    elif name == "shard":
        yield from _gathered_rows(node, program, record)
    elif name == "at_extreme" and node.args[5]:
        value = _whole_value(node, program)
        sent = reduced_bytes(product(map(as_length, value.shape)), torch.int32, size)
        yield record("all_reduce", sent, "how many elements on all ranks share a gradient")
    elif name in ("gather_used", "all_to_all", "all_to_all_within"):
        for made in forward:
            if name != "gather_used":
                yield replace(made, reason=_ATTENTION)
                continue
            dtype = _dtype(node, program)
            sent = as_length(made.bytes * (summand_dtype(dtype).itemsize // dtype.itemsize))
            yield record("reduce_scatter", sent, "gradients of gathered tokens", made.tokens)
    elif name == "ring_attention":
        dtype = _dtype(node.args[0], program)
        wide = torch.promote_types(dtype, torch.float32).itemsize // dtype.itemsize
        for made in forward:
            yield record("rotation", made.bytes, "keys and values of an attention, once more", made.tokens)
        for made in forward:
            yield record("rotation", as_length(made.bytes * wide), "gradients of keys and values", made.tokens)


def _whole_value(node: Node, program: Program) -> torch.Tensor:
    """The value of an operator that neither splits nor gathers, which is the same on every rank."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        infer_local(program)
        value = facts(node).local
    assert isinstance(value, torch.Tensor)
    return value


def _dtype(node: Any, program: Program) -> torch.dtype:
    """Of data that is moved: that of the first operand that has a value."""
    while not isinstance(value_of(node), torch.Tensor) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return _whole_value(node, program).dtype


def _gathered_rows(node: Node, program: Program, record: Any) -> Iterator[CollectiveRecord]:
    """The adjoint of a shard: rows of split segments are gathered, those of whole ones are summed."""
    size = program.ranks.size
    # The shard of a dimension that holds more than tokens is reshaped afterwards, and that has the type.
    typed = next(n for n in (node, *node.users) if isinstance(facts(n).type, Shard))
    type_: Shard = type_of(typed)
    value: torch.Tensor = facts(typed).whole
    shape = [as_length(n) for n in value.shape]
    why = "the gradient of a whole value, of which each rank uses its rows"
    rows = split_bytes(shape, type_, value.element_size(), size)
    if any(s.sharded for s in type_.sequence.segments):
        yield record("all_gather", as_length(rows * (size - 1)), why, type_.sequence)
    for segment in type_.sequence.segments:
        if not segment.sharded:
            tokens = product((type_.outer, segment.length))
            elements = product(tokens if i == type_.dim else n for i, n in enumerate(shape))
            yield record("all_reduce", reduced_bytes(elements, value.dtype, size), why)
