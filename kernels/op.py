"""One operator of ours, and what everybody has to know of it: its record.

Who differentiates a graph, prices it, prints it or lowers it reads the operator's :class:`Op`; no other file tells one
operator from another.  The records are in :mod:`fxsp.kernels.ops`.

Arguments name a sequence of tokens by parallel lists: ``lengths``, ``whole``, and where they are not the default
``head_tail`` and ``units``.  One text for the kinds (``"whole|head-tail"``) beside the lengths would be three arguments
fewer in a ring; but lengths and units may be symbols, which only a list of ``SymInt`` can hold, so that each of the
kernels, the oracle (apart on purpose) and the printer would need a parser of texts with holes.  The lists need none:
they are walked once, by :func:`fxsp.kernels.tokens.placed`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves, tree_map_only

from fxsp.torch_internals import arguments_of
from fxsp.types import Length, Sequence, Shard

__all__ = [
    "Cost",
    "Gradient",
    "Local",
    "Op",
    "Saved",
    "Sent",
    "Sizes",
    "define",
    "same_memory",
    "sizes_of",
    "unchanged",
]


@dataclass(frozen=True)
class Local:
    """A tensor of a call as each rank has it."""

    shape: tuple[Length, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Sizes:
    """A call as a count sees it: arguments by name, tensors as anything with a shape and a dtype, lengths as numbers or
    expressions (None: nobody described it)."""

    arguments: Mapping[str, Any]
    #: The number of ranks.
    size: int
    result: Any = None

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]


def sizes_of(node: Node, size: int, of: Callable[[Node], Any], result: Any = None) -> Sizes:
    """The call that a node is; ``of`` says what a node among its arguments stands for."""
    return Sizes({name: torch.fx.map_arg(given, of) for name, given in arguments_of(node).items()}, size, result)


@dataclass(frozen=True)
class Sent:
    """What each rank sends in one collective, and why."""

    kind: str
    bytes: Length
    why: str
    tokens: Sequence | None = None
    members: int = 0


class Gradient(Protocol):
    """A call that a gradient goes through, as a count of the backward pass sees it."""

    #: The number of ranks.
    size: int

    @property
    def forward(self) -> Iterable[Sent]:
        """What the call sends itself."""

    def argument(self, name: str) -> Any:
        """As it stands in the graph."""

    def value(self) -> Local:
        """The result, of an operator that neither splits nor gathers: the same on every rank."""

    def dtype(self, name: str = "") -> torch.dtype:
        """Of the result, or of an operand: of data that is moved, that of the first operand that has a value."""

    def is_parameter(self, name: str) -> bool:
        """Whether an operand is a parameter of the model."""

    def shard(self) -> tuple[Shard, Local]:
        """The type of a result that is split, and the global value."""


@dataclass(frozen=True)
class Cost:
    """What a call reads and writes in device memory: passes for each tensor moved, and bytes of all of them together.

    A *pass* is one read, or one write, of all elements of one of q, k, v and the output o on a rank.
    """

    reads: int
    writes: int
    bytes: int
    #: The tensors, of ``"qkvo"``; empty: all that pass through the node.
    tensors: str = ""
    #: What the bytes grow with: ``"local"`` rows, pads included, or ``"real"`` ones; empty: as the node's result tells.
    rows: str = ""


@dataclass(frozen=True)
class Saved:
    """A gradient that needs more of a call than its arguments: what is kept, and what is made of it (see
    ``torch.library.register_autograd``)."""

    setup: Callable[..., None]
    backward: Callable[..., tuple[Any, ...]]


@dataclass(frozen=True)
class Op:
    """An operator of ours."""

    name: str
    schema: str
    #: What it means, in ATen and ``_c10d_functional`` operators: run eagerly, on fakes, and traced by *emit*.  It may
    #: return its argument or a view of it.
    lowering: Callable[..., Any]
    #: How a value lies on the ranks before and after, in the notation of :mod:`fxsp.types`.
    types: str = ""
    #: The operator with the same other arguments that takes the gradient of the result to that of the first argument;
    #: or a formula ``(gradient, *other arguments)``, or all that autograd asks.
    adjoint: str | Callable[..., Tensor] | Saved | None = None
    #: The results on fakes, where they are not those of the lowering.
    fake: Callable[..., Any] | None = None
    #: Bytes that each rank sends; None if it does not communicate.
    sends: Callable[[Sizes], Length] | None = None
    #: What the gradients of its operands send.
    returns: Callable[[Gradient], Iterator[Sent]] | None = None
    #: What it moves in device memory; None: its result, if that has memory of its own.
    moves: Callable[[Sizes], Iterator[Cost]] | None = None
    #: Floating-point operations of a rank (None: of the busiest), of an operator that attends.
    flops: Callable[[Sizes, int | None], int] | None = None
    #: Whether an activation checkpoint keeps its results: to have them again, ranks would have to communicate again.
    saved: bool = False
    namespace: str = "fxsp"

    @property
    def is_identity(self) -> bool:
        """Whether it is there for its gradient, or for who reads the graph, and does nothing forward."""
        return self.lowering is unchanged

    @property
    def target(self) -> Any:
        """What calls it in a graph."""
        return getattr(getattr(torch.ops, self.namespace), self.name).default

    def gradient(self, grad: Tensor, *others: Any) -> Tensor:
        """The gradient of the first argument, from that of the result and the other arguments."""
        formula = getattr(torch.ops.fxsp, self.adjoint) if isinstance(self.adjoint, str) else self.adjoint
        return formula(grad, *others)  # type: ignore[operator, misc]


def unchanged(x: Tensor, *_: Any) -> Tensor:
    """The lowering of an operator that is nothing forward."""
    return x


def same_memory(x: Tensor) -> Tensor:
    """A copy that lies in memory as ``x`` does, gaps and expanded dimensions included."""
    if x.numel() == 0:
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=x.device)
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((span,), (1,)).clone().as_strided(x.size(), x.stride(), 0)


def define(library: torch.library.Library, ops: Iterable[Op]) -> None:
    """Register operators; those of another namespace than ``fxsp`` are the operators that they consist of."""
    ops = list(ops)
    for op in ops:
        library.define(f"{op.name}{op.schema}", tags=(torch.Tag.pt2_compliant_tag,))
        if op.namespace != "fxsp":
            library.impl(op.name, op.lowering, "CompositeImplicitAutograd")
            continue
        library.impl(op.name, _copying(op.lowering), "CompositeExplicitAutograd")
        torch.library.register_fake(f"fxsp::{op.name}", op.fake or _fake(op.lowering), lib=library)
    for op in ops:
        if op.adjoint is not None:
            saved = op.adjoint if isinstance(op.adjoint, Saved) else Saved(_keep_arguments, _backward(op))
            torch.library.register_autograd(f"fxsp::{op.name}", saved.backward, setup_context=saved.setup, lib=library)


def _copying(lowering: Callable[..., Any]) -> Callable[..., Any]:
    """An operator may return neither an argument nor a view of one."""

    def run(*args: Any) -> Any:
        given = {a.untyped_storage().data_ptr() for a in tree_leaves(args) if isinstance(a, Tensor)}
        own = lambda y: same_memory(y) if y.untyped_storage().data_ptr() in given else y  # noqa: E731
        return tree_map_only(Tensor, own, lowering(*args))

    return run


def _fake(lowering: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*args: Any) -> Tensor:
        y = lowering(*args)
        # Not the lowering's result itself: it may be a view of the argument.
        return torch.empty_strided(y.size(), y.stride(), dtype=y.dtype, device=y.device)

    return run


def _keep_arguments(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.args = inputs[1:]


def _backward(op: Op) -> Callable[..., tuple[Any, ...]]:
    def run(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return (op.gradient(grad, *ctx.args), *(None for _ in ctx.args))

    return run
