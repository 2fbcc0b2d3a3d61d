"""A cost model of the local program: when each value would be computed, and when each collective would travel.

An estimate, to see what is large and what waits for what; it decides nothing.  For each value on one rank

    time = launch + max(operations / peak, bytes read and written / bandwidth)

where a chain of elementwise operators counts as one kernel (a compiler fuses it): its inner values cost nothing.  For
each collective

    time = latency + bytes sent per rank / link

Computing goes in the order of the graph; a collective starts once its operand is there and the wire is free, beside the
computing, and the first value that needs it waits.  The link is the one that ways to attend are chosen with, where the
options describe it (:mod:`fxsp.device`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from fxsp.cost.flops import bytes_of, node_flops, shapes
from fxsp.device import H100, Device
from fxsp.kernels.ops import op_of
from fxsp.passes.graph import facts, local_value
from fxsp.torch_internals import is_operator, is_pointwise, storage_key

__all__ = ["Span", "timeline"]


@dataclass(frozen=True)
class Span:
    """One bar of the timeline, in seconds from the start; ``communicates`` says in which lane."""

    node: Node
    start: float
    end: float
    communicates: bool


def timeline(
    gm: torch.fx.GraphModule, sent: dict[str, int], number: Callable[[Any], int], device: Device = H100
) -> list[Span]:
    """The bars of a local graph; ``sent`` are the bytes of its collectives by name, ``number`` reads a size."""
    spans: list[Span] = []
    ready: dict[Node, float] = {}
    compute = wire = 0.0
    for node in gm.graph.nodes:
        begin = max((ready[n] for n in node.all_input_nodes), default=0.0)
        if node.op != "call_function":
            ready[node] = begin
        elif node.name in sent:
            start = max(begin, wire)
            wire = ready[node] = start + device.link.seconds(1, sent[node.name])
            spans.append(Span(node, start, wire, True))
            op = op_of(node)
            if op is not None and op.flops is not None:  # blocks are computed while others travel
                start = max(begin, compute)
                compute = start + _seconds(node, number, device)
                ready[node] = max(wire, compute)
                spans.append(Span(node, start, compute, False))
        else:
            cost = _seconds(node, number, device)
            if cost == 0:
                ready[node] = begin
                continue
            start = max(begin, compute)
            compute = ready[node] = start + cost
            spans.append(Span(node, start, compute, False))
    return spans


def _seconds(node: Node, number: Callable[[Any], int], device: Device) -> float:
    own = _bytes(node, number)
    op = op_of(node)
    if own == 0 or _is_view(node) or (op is not None and op.is_identity):
        return 0.0
    fused = _pointwise(node)
    if fused and node.users and all(_pointwise(user) for user in node.users):
        return 0.0
    moved = own + sum(_bytes(n, number) for n in node.all_input_nodes if not (fused and _pointwise(n)))
    return device.seconds(node_flops(node, shapes(local_value, number)), moved)


def _bytes(node: Node, number: Callable[[Any], int]) -> int:
    return sum(bytes_of(value, number) for value in _tensors(node))


def _tensors(node: Node) -> list[torch.Tensor]:
    return [value for value in tree_leaves(facts(node).local) if isinstance(value, torch.Tensor)]


def _pointwise(node: Node) -> bool:
    return is_operator(node.target) and is_pointwise(node.target)


def _is_view(node: Node) -> bool:
    """Whether the node's memory is that of an operand."""
    values = _tensors(node)
    keys = {storage_key(v) for n in node.all_input_nodes for v in _tensors(n)}
    return bool(values) and all(storage_key(v) in keys for v in values)
