"""Checks between passes: the graph is valid, every value has a type, and local shapes are those that the types say."""

from __future__ import annotations

import contextlib
import operator
from typing import Any

import torch
from torch.fx import Node

from fxsp.errors import VerificationError
from fxsp.passes.attention.decide import distributed_attention
from fxsp.passes.base import Program
from fxsp.passes.graph import Call, facts, global_value, mark
from fxsp.passes.rules.decide import Decision
from fxsp.source import module_path, node_source
from fxsp.torch_internals import depends_on_data, fake_mode_of
from fxsp.types import Length, Shard, as_length, same_length, shape_on_rank

__all__ = ["infer_local", "verify_graph", "verify_local", "verify_types"]


def _where(node: Node) -> str:
    return f"{node.format_node()} [{module_path(node) or 'root'}, {node_source(node) or 'no source line'}]"


def verify_graph(program: Program) -> None:
    """The graph is valid FX, and every operand is computed before it is used."""
    program.graph.lint()


def verify_types(program: Program) -> None:
    """After *propagate*: every tensor has a type that fits its dimensions, every decision fits its call."""
    program.graph.lint()
    for node in program.graph.nodes:
        value, type_ = node.meta.get("val"), facts(node).type
        if isinstance(value, torch.Tensor) and type_ is None:
            raise VerificationError(f"no type: {_where(node)}")
        if isinstance(type_, Shard) and isinstance(value, torch.Tensor):
            size = as_length(value.shape[type_.dim]) if type_.dim < value.dim() else None
            if size is None or not same_length(size, type_.global_size()):
                raise VerificationError(f"type {type_} does not fit shape {list(value.shape)}: {_where(node)}")
        decision = facts(node).decision
        if isinstance(decision, Decision) and len(decision.operands) != len(Call(node).operands):
            raise VerificationError(f"{len(decision.operands)} operand types for {_where(node)}")


def infer_local(program: Program) -> None:
    """Give every node of a local graph its ``local`` fake value; adds no guard."""
    fakes = [global_value(n) for n in program.graph.nodes if n.op == "placeholder"]
    mode = next((m for m in map(fake_mode_of, fakes) if m is not None), None)
    if mode is None:
        return
    quiet = contextlib.nullcontext() if mode.shape_env is None else mode.shape_env.suppress_guards()
    with mode, quiet:
        for node in program.graph.nodes:
            if facts(node).local is not None:
                continue
            if node.op == "placeholder":
                mark(node, local=_on_rank(node, program.ranks.size))
            elif node.op == "get_attr":
                value = node.meta.get("val")
                mark(node, local=mode.from_tensor(value) if isinstance(value, torch.Tensor) else value)
            elif node.op == "call_function":
                mark(node, local=_run(node))


def _on_rank(node: Node, size: int) -> Any:
    """An input: whole, or the rows of one rank."""
    value, type_ = global_value(node), facts(node).type
    return value.new_empty(shape_on_rank(value.shape, type_, size)) if isinstance(type_, Shard) else value


def _run(node: Node) -> Any:
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: facts(n).local)
    if node.target is distributed_attention:
        op = facts(node).attention.op
        q: Any = kwargs[op.query]
        v: Any = kwargs[op.value]
        return q.new_empty(*q.shape[:-1], v.shape[-1])
    plain = isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem
    if not plain and isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
        return node.meta["val"]  # an island: whole operands, whole results
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _agree(got: Length, expected: Length) -> bool:
    """Whether two sizes are equal; one that depends on data has another name in each run."""
    return same_length(got, expected) or (depends_on_data(got) and depends_on_data(expected))


def verify_local(program: Program) -> None:
    """After *partition*: running the local graph on local sizes gives the shapes that the types say."""
    program.graph.lint()
    infer_local(program)
    size = program.ranks.size
    for node in program.graph.nodes:
        known = facts(node)
        value, whole, type_ = known.local, known.whole, known.type
        if not isinstance(value, torch.Tensor) or not isinstance(whole, torch.Tensor):
            continue
        expected = shape_on_rank(whole.shape, type_, size)
        got = [as_length(n) for n in value.shape]
        if len(got) != len(expected) or not all(_agree(a, b) for a, b in zip(got, expected, strict=True)):
            raise VerificationError(
                f"local shape {got}, but {type_} of {list(whole.shape)} is {expected}: {_where(node)}"
            )
