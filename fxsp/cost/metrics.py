"""What one partitioned graph costs, as numbers: operations, memory, pads, and bytes with their formulas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

from fxsp.cost.flops import bytes_of, node_flops, shapes
from fxsp.cost.formula import Formula, Names, Sent, formula_of, memory_formulas, rows_of
from fxsp.kernels.ops import op_of
from fxsp.passes.base import Program
from fxsp.passes.graph import facts, global_value, local_value
from fxsp.passes.verify import infer_local
from fxsp.torch_internals import storage_key
from fxsp.types import Shard

__all__ = ["Measures", "measure"]


@dataclass
class Measures:
    """All for one forward pass; flops, bytes and tokens as numbers, for the inputs that were traced."""

    #: Of the unsplit graph, and of each rank.
    flops_total: int = 0
    flops_per_rank: list[int] = field(default_factory=list)
    #: Peak of the activations, of the unsplit graph and of a rank; see :func:`peak_bytes`.
    memory_one: int = 0
    memory_rank: int = 0
    #: What is split -> its tokens, those of each rank, and the pads of all ranks together.
    padding: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    #: The collectives of the report, and those of its backward pass.
    forward: list[Sent] = field(default_factory=list)
    backward: list[Sent] = field(default_factory=list)
    names: Names = field(default_factory=Names)
    #: For each attention the formulas of what it moves through device memory, and the bytes that have none.
    memory: list[tuple[list[Formula], int] | None] = field(default_factory=list)
    #: Reads a size as a number.
    number: Callable[[Any], int] = int


def measure(program: Program) -> Measures:
    """Measure a partitioned program."""
    infer_local(program)
    whole: Graph = program.whole.graph
    number = program.number
    found = Measures(number=number)
    found.flops_total = _flops(whole, global_value, number)
    found.flops_per_rank = _flops_of_ranks(program, number)
    found.memory_one = peak_bytes(whole, global_value, number, training=program.training)
    found.memory_rank = peak_bytes(program.graph, local_value, number, training=program.training)
    found.padding = _padding(program, number)
    for records, sent in ((program.report.collectives, found.forward), (program.report.backward, found.backward)):
        for record in records:
            size = number(record.bytes)
            formula = formula_of(record, size, program.ranks.size, number)
            sent.append(Sent(record, size, formula))
            found.names.add(formula)
    for attention in program.report.attentions:
        known = attention.memory
        found.memory.append(None if known is None else memory_formulas(known, number, program.ranks.size))
        found.names.add(*(found.memory[-1] or ([], 0))[0])
    return found


def _flops_of_ranks(program: Program, number: Callable[[Any], int]) -> list[int]:
    """All ranks do the same but for rings, in which each place meets other blocks."""
    shape_of, size = shapes(local_value, number), program.ranks.size
    ours = [node for node in program.graph.nodes if op_of(node) is not None]
    alike = _flops(program.graph, local_value, number) - sum(node_flops(node, shape_of) for node in ours)
    return [alike + sum(node_flops(node, shape_of, rank) for node in ours) for rank in range(size)]


def _flops(graph: Graph, value_of: Callable[[Node], Any], number: Callable[[Any], int]) -> int:
    shape_of = shapes(value_of, number)
    return sum(node_flops(node, shape_of) for node in graph.nodes)


def _padding(program: Program, number: Callable[[Any], int]) -> dict[str, tuple[int, int, int]]:
    found = {}
    size = program.ranks.size
    for node in program.graph.nodes:
        type_ = facts(node).type
        for segment in type_.sequence.segments if isinstance(type_, Shard) else ():
            if segment.sharded and segment.name:
                tokens = number(segment.length)
                rows = rows_of(tokens, segment.parts, size)
                found[segment.name] = (tokens, rows, rows * size - tokens)
    return found


def peak_bytes(graph: Graph, value_of: Callable[[Node], Any], number: Callable[[Any], int], *, training: bool) -> int:
    """The largest sum of bytes that live at once; ``value_of`` has a node's fake value, ``number`` reads a size.

    An estimate, the same way for one device and a rank.  Counted are the values that the graph computes (inputs and
    parameters are not), in the order of the graph; a view shares the memory of what it looks at, and a value dies with
    its last use.  In training every value that is no view is kept for the backward pass: an upper bound, since what
    autograd saves, and what a compiler computes again, is decided later.
    """
    nodes: list[Node] = list(graph.nodes)
    index = {node: i for i, node in enumerate(nodes)}
    inputs: set[int] = set()
    size_of: dict[int, int] = {}
    last: dict[int, int] = {}
    keys: list[list[int]] = []
    for i, node in enumerate(nodes):
        own = []
        for value in tree_leaves(value_of(node)) if node.op != "output" else ():
            if isinstance(value, torch.Tensor):
                storage = storage_key(value)
                own.append(storage)
                if node.op in ("placeholder", "get_attr"):
                    inputs.add(storage)
                size_of[storage] = max(size_of.get(storage, 0), bytes_of(value, number))
                last[storage] = i
        keys.append(own)
        for used in node.all_input_nodes:
            for storage in keys[index[used]]:
                last[storage] = i
    alive = peak = 0
    born: set[int] = set()
    dying: dict[int, list[int]] = {}
    for storage, i in last.items():
        dying.setdefault(i, []).append(storage)
    for i, own in enumerate(keys):
        for storage in own:
            if storage not in born and storage not in inputs:
                born.add(storage)
                alive += size_of[storage]
        peak = max(peak, alive)
        if not training:
            alive -= sum(size_of[storage] for storage in dying.get(i, ()) if storage in born)
    return peak
