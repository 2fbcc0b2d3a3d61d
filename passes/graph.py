"""What passes know about a node, and how a graph is read.

What passes find out is one record for each node, :class:`Facts`, under a key of ours in ``node.meta``, beside the keys
that are torch's own: ``val`` (the fake value, the global one until the program is local), ``example_value`` (Dynamo's),
``nn_module_stack`` and ``stack_trace``, ``recompute`` and ``ac_graph_id``.  The record is read by :func:`facts` and
written by :func:`mark`, nowhere else.

A record never changes; :func:`mark` gives the node another one.  So two nodes may have the same: FX copies ``meta`` key
by key, and what is marked on a copied node afterwards says nothing about the node that it was copied from.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch.fx import Node

from fxsp.report import AttentionRecord
from fxsp.torch_internals import arguments_of, parameters
from fxsp.types import Length, Shard, Type, as_length

__all__ = [
    "Call",
    "Decision",
    "Facts",
    "decision_of",
    "facts",
    "global_value",
    "is_split",
    "local_value",
    "mark",
    "reachable",
    "shape_of",
    "tensor_nodes",
    "tensor_value",
    "type_of",
    "value_of",
]

_KEY = "fxsp"
_T = TypeVar("_T", bound=Hashable)


@dataclass(frozen=True)
class Decision:
    """How one call is partitioned."""

    #: Required type of each tensor operand, in schema order.
    operands: tuple[Type, ...]
    #: Type of each tensor result.
    results: tuple[Type, ...]
    #: The sentence that says why an operand that is sharded must be whole; empty if none must.
    reason: str = ""
    #: Operands (by position) whose pads must be zeroed first, because the call sums over the tokens.
    masked: tuple[int, ...] = ()
    #: Facts for the pass that rewrites the call (documented by the function that decided).
    detail: Any = None
    #: What would avoid the gather that ``reason`` speaks of, if that is known.
    remedy: str = ""
    #: Who writes the local call (a :class:`~fxsp.passes.special.special.Special`); None: it is the same call.
    special: Any = None


@dataclass(frozen=True, slots=True)
class Facts:
    """What passes know about one node; a field that no pass has written says so by its default."""

    # Of any graph of ATen operators, from *normalize* on.

    #: Why it is not opened, and runs whole; ``""`` if it is no island.
    island: str = ""
    #: Whether an operator on a tensor subclass treats every row alone.
    row_wise: bool = False
    #: Whether an input is a parameter.
    is_parameter: bool = False
    #: Whether an input is a parameter or buffer of a module.
    is_state: bool = False
    #: The nodes of Dynamo's graph whose value it is, while a plan is looked for.
    spelled: tuple[Node, ...] = ()

    # Of the global program, from *propagate* on; a node of the local program has the type of its value, too.

    #: Its type, one for each tensor where there are several results.
    type: Type | tuple[Type, ...] | None = None
    #: How the call is partitioned.
    decision: Decision | None = None
    #: Whether its whole value can be had without communication.
    free: bool = False

    # Of the local program, from *partition* on.

    #: The global fake value that it is a form of.
    whole: Any = None
    #: The name of that value in the global program.
    stands_for: str = ""
    #: The fake value on one rank; *verify* infers it.
    local: Any = None
    #: Bytes that each rank sends here, where the pass that wrote it has counted.
    sent: Any = None
    #: How an attention runs, until it is lowered (an ``AttentionChoice``).
    attention: Any = None
    #: The record, in the report, of the attention that it is part of.
    attention_record: AttentionRecord | None = None
    #: The attention, of those that are written out, that it is part of (as *unfused_report* has found it).
    written_attention: Any = None


_NOTHING = Facts()


def facts(node: Node) -> Facts:
    """What passes know about ``node``."""
    found: Facts = node.meta.get(_KEY, _NOTHING)
    return found


def mark(node: Node, **found: Any) -> None:
    """Write facts about ``node``, by the names of the fields of :class:`Facts`.  TypeError for any other name."""
    node.meta[_KEY] = replace(facts(node), **found)


def type_of(node: Node) -> Any:
    """The type of a node that has one; a tuple of them where it has several results."""
    type_ = facts(node).type
    assert type_ is not None, f"{node.format_node()} has no type"
    return type_


def is_split(node: Node) -> bool:
    """Whether a value, or one of several results, is split over the ranks."""
    type_ = facts(node).type
    return any(isinstance(t, Shard) for t in type_) if isinstance(type_, tuple) else isinstance(type_, Shard)


def decision_of(node: Node) -> Decision:
    """How a call is partitioned that was decided."""
    decision = facts(node).decision
    assert decision is not None, f"{node.format_node()} has no decision"
    return decision


def global_value(node: Node) -> Any:
    """The fake value that a node of the global or the local program stands for, with its global shape; or None."""
    whole = facts(node).whole
    return node.meta.get("val") if whole is None else whole


def local_value(node: Node) -> Any:
    """The fake value of a node of the local program on one rank; None before it is inferred."""
    return facts(node).local


def value_of(node: Node) -> Any:
    """A fake value with the dtype and device of the node's, and the shape of the local one where that is known."""
    for value in (facts(node).local, global_value(node)):
        if value is not None:
            return value
    return node.meta.get("example_value")


def tensor_value(node: Any) -> torch.Tensor | None:
    """The (global, fake) tensor that ``node`` stands for; None for anything else."""
    if not isinstance(node, Node):
        return None
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def shape_of(node: Node) -> tuple[Length, ...]:
    """The global shape of the tensor that a node of the global or the local program stands for."""
    value = global_value(node)
    assert isinstance(value, torch.Tensor)
    return tuple(as_length(n) for n in value.shape)


def tensor_nodes(value: Any) -> list[Node]:
    """Tensor-valued nodes inside one argument (a node, or nested lists of them)."""
    found: list[Node] = []
    torch.fx.map_arg(value, found.append)
    return [node for node in found if tensor_value(node) is not None]


def reachable(
    start: Iterable[_T], step: Callable[[_T], Iterable[_T]], stop: Callable[[_T], bool] = lambda _: False
) -> Iterator[_T]:
    """``start`` and all that ``step`` leads to from there, each once, the nearest first.

    What ``stop`` holds of is reached, and led no further from.
    """
    queue = list(dict.fromkeys(start))
    seen = set(queue)
    for one in queue:
        yield one
        if not stop(one):
            new = [other for other in dict.fromkeys(step(one)) if other not in seen]
            seen.update(new)
            queue += new


class Call:
    """One operator call with its arguments bound by the schema's names, and global shapes at hand."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.op: torch._ops.OpOverload = node.target  # type: ignore[assignment]
        #: All arguments in schema order, defaults included (None where there is no default).
        self.arguments = arguments_of(node)

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.arguments.get(name, default)

    @property
    def given(self) -> dict[str, Any]:
        """The arguments that the call spells, by name."""
        spelled = len(self.node.args)
        return {n: v for i, (n, v) in enumerate(self.arguments.items()) if i < spelled or n in self.node.kwargs}

    def is_default(self, name: str) -> bool:
        """Whether an argument is what it is if it is left out."""
        parameter = next(p for p in parameters(self.op) if p.name == name)
        return parameter.has_default and bool(self.arguments[name] == parameter.default)

    @property
    def written(self) -> list[Node]:
        """The arguments that the operator writes to, by its schema; lists are flattened."""
        found: list[Node] = []
        torch.fx.map_arg([self.arguments[p.name] for p in parameters(self.op) if p.is_written], found.append)
        return found

    @property
    def operands(self) -> list[Node]:
        """All tensor operands, in schema order; lists of tensors are flattened."""
        return tensor_nodes(list(self.arguments.values()))

    def shape(self, name: str) -> tuple[Length, ...]:
        return shape_of(self.arguments[name])

    def operand_shapes(self) -> list[tuple[Length, ...]]:
        return [shape_of(n) for n in self.operands]

    def result_shapes(self) -> list[tuple[Length, ...]]:
        value = self.node.meta["val"]
        values = value if isinstance(value, (tuple, list)) else (value,)
        return [tuple(as_length(n) for n in v.shape) for v in values if isinstance(v, torch.Tensor)]

    def dim(self, name: str, rank: int) -> int:
        """The argument ``name``, a dimension, counted from the front."""
        value = int(self.arguments[name])
        return value + rank if value < 0 else value

    def bound_to(self, arguments: dict[str, Any]) -> Call:
        """The same call with other arguments (local ones, say)."""
        other = Call(self.node)
        other.arguments = arguments
        return other

    def rebuild(self, **changes: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` of the call with some arguments replaced."""
        values = {**self.arguments, **changes}
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        positional = len(self.node.args)
        for i, parameter in enumerate(parameters(self.op)):
            name = parameter.name
            given = i < positional or name in self.node.kwargs or name in changes
            if parameter.kwarg_only or len(args) < i:
                if given:
                    kwargs[name] = values[name]
            elif given:
                args.append(values[name])
        return tuple(args), kwargs
