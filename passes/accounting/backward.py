"""backward: what the backward pass of a local graph will send, read off the forward graph before it is differentiated.

The gradient of a value in one form comes in the adjoint form, so every operator of ours that a gradient goes through
says in its record what its adjoint sends (``Op.returns`` in :mod:`fxsp.kernels.op`).

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

from fxsp.kernels.op import Local, Sent
from fxsp.kernels.ops import op_of
from fxsp.passes.base import Pass, Program
from fxsp.passes.graph import Call, facts, global_value, reachable, value_of
from fxsp.passes.rules.families import family, names_of
from fxsp.passes.verify import infer_local
from fxsp.report import CollectiveRecord
from fxsp.source import module_path, node_source
from fxsp.torch_internals import is_operator, is_recomputed, schema
from fxsp.types import Shard, as_length

__all__ = ["Backward", "backward_collectives"]

aten = torch.ops.aten


class Backward(Pass):
    """After this pass the report says what gradients will send."""

    def apply(self, program: Program) -> Program:
        program.report.backward.extend(backward_collectives(program))
        return program


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
        # What is saved, or whose operands are, is outside.
        inside = reachable(node.users, lambda n: n.users, stop=lambda n: not is_recomputed(n))
        if any(is_recomputed(user) and user in with_gradients and not _passes_on(user) for user in inside):
            yield replace(made[node.name], reason="computed again, in an activation checkpoint")


def _passes_on(node: Node) -> bool:
    """Whether the gradients of an operator's operands do not depend on their values."""
    if not is_operator(node.target):
        return node.target is operator.getitem
    if (op := op_of(node)) is not None:
        return op.flops is None
    return schema(node.target).name.partition("::")[2] in names_of("affine")


def _with_gradients(program: Program) -> list[Node]:
    """The nodes that a gradient goes through."""
    nodes = list(program.graph.nodes)
    needs: set[Node] = set()
    for node in nodes:
        if node.op == "placeholder":
            if getattr(global_value(node), "requires_grad", False):
                needs.add(node)
        elif node.op != "output" and not needs.isdisjoint(node.all_input_nodes):
            if node.target not in family("detached") and _floating(node):
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
    op = op_of(node)
    if op is None or op.returns is None:
        return
    place, source = module_path(node) or program.report.root, node_source(node)
    for sent in op.returns(_Gradient(node, program)):
        yield CollectiveRecord(sent.kind, node.name, place, sent.bytes, sent.why, source, sent.tokens, sent.members)


class _Gradient:
    """A node that a gradient goes through (:class:`fxsp.kernels.op.Gradient`)."""

    def __init__(self, node: Node, program: Program) -> None:
        self.node, self.program, self.size = node, program, program.ranks.size

    @property
    def forward(self) -> list[Sent]:
        made = [r for r in self.program.report.collectives if r.value == self.node.name]
        return [Sent(r.kind, r.bytes, r.reason, r.tokens, r.members) for r in made]

    def argument(self, name: str) -> Any:
        return Call(self.node)[name]

    def value(self) -> Local:
        return self._of(self.node)

    def dtype(self, name: str = "") -> torch.dtype:
        node = self.argument(name) if name else self.node
        while not isinstance(value_of(node), torch.Tensor) and node.all_input_nodes:
            node = node.all_input_nodes[0]
        return self._of(node).dtype

    def _of(self, node: Node) -> Local:
        value = value_of(node)
        if not isinstance(value, torch.Tensor):
            infer_local(self.program)
            value = facts(node).local
        return _described(value)

    def is_parameter(self, name: str) -> bool:
        source = self.argument(name)
        return isinstance(source, Node) and facts(source).is_parameter

    def shard(self) -> tuple[Shard, Local]:
        # The shard of a dimension that holds more than tokens is reshaped afterwards, and that has the type.
        typed = next(facts(n) for n in (self.node, *self.node.users) if isinstance(facts(n).type, Shard))
        assert isinstance(typed.type, Shard)
        return typed.type, _described(typed.whole)


def _described(value: torch.Tensor) -> Local:
    return Local(tuple(map(as_length, value.shape)), value.dtype)
