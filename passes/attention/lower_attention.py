"""lower_attention: every marked attention becomes local attention and collectives, as its method writes it.

::

    %marked: distributed_attention(query=%q, key=%k, value=%v, ...)    [B, 4, 3, 8] on each of two ranks

becomes what :mod:`fxsp.passes.attention.exchange` (Ulysses) and the files of ``methods`` show.
After this pass no ``distributed_attention`` remains.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from fxsp.kernels.ops import op_of
from fxsp.passes.attention.attend import Attend
from fxsp.passes.attention.decide import distributed_attention
from fxsp.passes.attention.methods import METHODS
from fxsp.passes.attention.operators import ATTENTION_OPS, BANDED
from fxsp.passes.attention.repeat_kv import chain_of
from fxsp.passes.base import Pass, Program
from fxsp.passes.builder import Builder
from fxsp.passes.graph import facts, global_value, mark, type_of
from fxsp.torch_internals import saved_tag

__all__ = ["LowerAttention"]

aten = torch.ops.aten


class LowerAttention(Pass):
    """After this pass attention is local, and its collectives are nodes of the graph."""

    def apply(self, program: Program) -> Program:
        graph = program.graph
        build = Builder(graph, program.ranks, program.report, training=program.training)
        inputs = graph.find_nodes(op="placeholder")
        if inputs:
            with graph.inserting_after(inputs[-1]):
                for node in inputs:
                    build.learn(node, global_value(node))
        cache: dict[Any, Node] = {}
        for node in list(graph.nodes):
            if isinstance(node.meta.get("val"), torch.SymInt):
                build.learn(node, node.meta["val"])
            if node.target is not distributed_attention:
                continue
            build.at(node)
            before = node.prev
            with graph.inserting_before(node):
                x = Attend(build, node, cache)
                new = x.turned(METHODS[x.choice.method].lower(x))
            for written in _between(before, node):
                mark(written, attention_record=facts(node).attention_record)
                # In an activation checkpoint, what was exchanged is saved: else it would be exchanged once more.
                if "recompute" in node.meta and _is_saved(written):
                    written.meta.update(saved_tag())
            mark(new, type=type_of(node), whole=facts(node).whole)
            node.replace_all_uses_with(new)
            repeats = [old for given in x.given[1:] for old in chain_of(given)[:-1]]
            graph.erase_node(node)
            for old in dict.fromkeys(repeats):
                if not old.users:
                    graph.erase_node(old)
        program.gm.recompile()
        return program


def _is_saved(node: Node) -> bool:
    op = op_of(node)
    if op is not None:
        return op.saved
    # The seed of a dropout: another one would drop other elements.  A banded attention is several operators, masks
    # among them: those are computed again.
    return node.target is aten.randint.default or (node.target in ATTENTION_OPS and node.target is not BANDED)


def _between(before: Node, after: Node) -> Iterator[Node]:
    node = before.next
    while node is not after:
        yield node
        node = node.next
