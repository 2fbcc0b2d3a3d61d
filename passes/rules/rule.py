"""Sharding rules: how the dimensions of an operator's operands and results decompose into factors.

A rule is data.  ``linear`` on ``[b, s, i]`` prints as ``([b, s, i], [o, i]) -> ([b, s, o]) reduction={i}``: a factor
shared by an operand and a result passes a shard through; sharding a *reduction* factor gives a summand (Partial); a
*whole* factor must not be sharded.  A dimension may be a product of factors: ``flatten`` of ``[b, s, c]`` is ``([b, s,
c]) -> ([b s, c])``.  After Shardy's ``OpShardingRule``; the same rule serves typing, reports and costs.

Rules are built per node, because operators are polymorphic in rank: a *rule function* takes :class:`Call` and returns
an :class:`OpRule`, or None when this use of the operator has no rule (then all operands are made whole).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from fxsp.types import Length, as_length

__all__ = ["Call", "Dims", "Factors", "OpRule", "RuleFunction", "draws", "rows", "tensor_value"]

#: Factors of one dimension, outermost first.
Factors = tuple[str, ...]
#: The dimensions of one tensor.
Dims = tuple[Factors, ...]


def tensor_value(node: Any) -> torch.Tensor | None:
    """The (global, fake) tensor that ``node`` stands for; None for anything else."""
    if not isinstance(node, Node):
        return None
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def shape_of(node: Node) -> tuple[Length, ...]:
    value = tensor_value(node)
    assert value is not None
    return tuple(as_length(n) for n in value.shape)


@dataclass(frozen=True)
class OpRule:
    """Factors of every tensor operand (in schema order) and result; see the module's docstring for the notation.

    An operand None lends no data, only its dtype or sizes (``type_as``): any type will do.
    """

    operands: tuple[Dims | None, ...]
    results: tuple[Dims, ...]
    #: Of factors that share a dimension, and of those of products.
    sizes: dict[str, Length] = field(default_factory=dict, hash=False, compare=False)
    reduction: frozenset[str] = frozenset()
    whole: frozenset[str] = frozenset()
    #: Reduced, by something else than a sum (a maximum): the ranks' results are combined; see
    #: fxsp.passes.special.extremes.
    combined: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        known = {f for dims in (*self.operands, *self.results) for dim in dims or () for f in dim}
        stray = (self.reduction | self.whole | self.combined) - known
        if stray:
            raise ValueError(f"factors {sorted(stray)} are in no dimension of {self}")
        results = {f for dims in self.results for dim in dims for f in dim}
        reduced = (self.reduction | self.combined) & results
        if reduced:
            raise ValueError(f"reduction factors {sorted(reduced)} appear in a result of {self}")

    def __str__(self) -> str:
        def side(tensors: tuple[Dims | None, ...]) -> str:
            texts = ["-" if t is None else "[" + ", ".join(" ".join(d) or "1" for d in t) + "]" for t in tensors]
            return f"({', '.join(texts)})"

        text = f"{side(self.operands)} -> {side(self.results)}"
        for kind in ("reduction", "combined", "whole"):
            factors = getattr(self, kind)
            if factors:
                text += f" {kind}={{{', '.join(sorted(factors))}}}"
        return text


class Call:
    """One operator call with its arguments bound by the schema's names, and global shapes at hand."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.op: torch._ops.OpOverload = node.target  # type: ignore[assignment]
        self.arguments: dict[str, Any] = {}
        schema = self.op._schema.arguments
        for i, arg in enumerate(schema):
            if i < len(node.args):
                self.arguments[arg.name] = node.args[i]
            elif arg.name in node.kwargs:
                self.arguments[arg.name] = node.kwargs[arg.name]
            else:
                self.arguments[arg.name] = arg.default_value if arg.has_default_value() else None

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.arguments.get(name, default)

    @property
    def operands(self) -> list[Node]:
        """All tensor operands, in schema order; lists of tensors are flattened."""
        return [n for value in self.arguments.values() for n in tensor_nodes(value)]

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
        for i, arg in enumerate(self.op._schema.arguments):
            given = i < positional or arg.name in self.node.kwargs or arg.name in changes
            if arg.kwarg_only or len(args) < i:
                if given:
                    kwargs[arg.name] = values[arg.name]
            elif given:
                args.append(values[arg.name])
        return tuple(args), kwargs


def tensor_nodes(value: Any) -> Iterator[Node]:
    """Tensor-valued nodes inside one argument (a node, or nested lists of them)."""
    if isinstance(value, Node):
        if isinstance(value.meta.get("val"), torch.Tensor):
            yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensor_nodes(item)


RuleFunction = Callable[[Call], "OpRule | None"]


def draws(call: Call) -> bool:
    """Whether this call draws random numbers: dropout does not at p = 0, nor outside training (None is training)."""
    if torch.Tag.nondeterministic_seeded not in call.op.tags:
        return False
    if "dropout_p" in call.arguments:  # attention
        return bool(call["dropout_p"])
    return not ("p" in call.arguments and "train" in call.arguments) or bool(call["train"] is not False and call["p"])


def rows(count: int, prefix: str = "d") -> list[Factors]:
    """``count`` dimensions, each one factor: ``d0``, ``d1``, ..."""
    return [(f"{prefix}{i}",) for i in range(count)]
