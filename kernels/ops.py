"""The fxsp ops: what *partition* writes into a graph, differentiable, and opaque until *emit*.

``lengths`` and ``whole`` describe a :class:`fxsp.types.Sequence`: global lengths per segment, and whether a segment is
entire on every rank.  A split segment of ``n`` rows has ``L = ceil(n / size)`` rows on each rank; rank ``r`` holds rows
``r*L .. (r+1)*L``, and those from ``n`` on are pads.  Rank, size and group are plain arguments: what differs by rank
must be part of the graph, or a cached artifact of one rank would be loaded by another.

Segments split into heads and tails (see :mod:`fxsp.kernels.exchange.zigzag`) are dealt before they are split, and
gathered before they are undealt, and so are segments of units (frames, say, whose tokens stay together);
``head_tail`` says which are the former, ``units`` the tokens of a unit, where the place of a row matters (empty: none).

Adjoints, in the notation of ``fxsp.types`` (``S+`` is a shard whose pads are zero and whose whole segments hold
summands).  The gradient of ``R`` is ``R``, of ``S`` is ``S+``, of ``U`` is ``P``, and the other way round::

    op              forward    backward
    shard           R -> S     gather_sum
    gather          S -> R     shard(zero_pads=True), whole segments divided by size (scale_whole)
    gather_used     S -> U     reduce_scatter
    reduce_scatter  P -> S+    gather_used
    gather_sum      S+ -> R    shard(zero_pads=True)
    all_reduce      P -> R     use
    use             R -> U     reduce_grad
    reduce_grad     P -> R     use          (all_reduce of a gradient: emit may put several into one bucket)
    all_to_all      S -> S     all_to_all
    mask_pads       S -> S+    mask_pads
    scale_whole     S -> S+    scale_whole
    deal            R -> R     undeal       (of U and P too: the rows of each rank, one rank after the other)
    undeal          R -> R     deal(zero_pads=True)
    take            U -> S     put
    put             S -> P     take
    pack            U -> S     unpack       (see fxsp.kernels.exchange.exchange)
    unpack          S -> U     pack(zero_pads=True)
    pack_heads      S -> S     unpack_heads (see fxsp.kernels.exchange.head_ops)
    unpack_heads    S -> S     pack_heads(zero_pads=True)
    ring_attention  S -> S     ring_attention_backward (see fxsp.kernels.attention.ring_ops)
    merged_attention  U, S -> R  merged_attention_backward (see fxsp.kernels.attention.split_kv)
    all_reduce_extreme, at_extreme            (see fxsp.kernels.extremes)
    all_to_all_within          all_to_all_within       (of the first dimension's size of consecutive ranks)
    scale_grad      U -> U     a product    (see fxsp.kernels.deferred_ops)

With ``size == 1`` (or ``group == ""`` where an op has no size) no process group is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxsp.kernels import deferred_ops, extremes
from fxsp.kernels.attention import ring_ops
from fxsp.kernels.attention import split_kv_ops as merged_ops
from fxsp.kernels.exchange import exchange, head_ops
from fxsp.kernels.lowering import LOWERINGS

__all__ = ["INTERNAL", "OPS", "same_memory"]

_SEQ = "int dim, SymInt[] lengths, bool[] whole"

#: Name of an op -> its arguments.
OPS: dict[str, str] = {
    "annotate": "Tensor x, str kind, int dim, SymInt text_len, str entry",
    "shard": f"Tensor x, {_SEQ}, bool zero_pads, int rank, int size, str group",
    "gather": f"Tensor x, {_SEQ}, int rank, int size, str group",
    "gather_used": f"Tensor x, {_SEQ}, int rank, int size, str group",
    "reduce_scatter": f"Tensor x, {_SEQ}, int rank, int size, str group",
    "all_reduce": "Tensor x, str group",
    "use": "Tensor x, str group",
    "all_to_all": "Tensor x, str group",
    "all_to_all_within": "Tensor x, int rank, int size, str group",
    "mask_pads": f"Tensor x, {_SEQ}, int rank, int size, bool[] head_tail=[], SymInt[] units=[]",
    "positions": "SymInt[] lengths, bool[] whole, int rank, int size, Device device, "
    "bool[] head_tail=[], SymInt[] units=[]",
    "place_positions": "SymInt[] lengths, bool[] whole, int ulysses, int rank, int size, Device device, "
    "bool[] head_tail=[], SymInt[] units=[]",
    "deal": "Tensor x, int dim, SymInt[] lengths, bool[] head_tail, bool zero_pads, int size, SymInt[] units=[]",
    "undeal": "Tensor x, int dim, SymInt[] lengths, bool[] head_tail, int size, SymInt[] units=[]",
    "take": "Tensor x, int dim, int rank, int size",
    "pack": "Tensor x, SymInt[] lengths, int size, bool zero_pads",
    "unpack": "Tensor x, SymInt[] lengths, int size",
}

#: Ops that only backward graphs contain.
INTERNAL: dict[str, str] = {
    "gather_sum": f"Tensor x, {_SEQ}, int rank, int size, str group",
    "scale_whole": f"Tensor x, {_SEQ}, int size",
    "reduce_grad": "Tensor x, str group",
    "put": "Tensor x, int dim, int rank, int size",
}

_library = torch.library.Library("fxsp", "DEF")
_fxsp = torch.ops.fxsp


def same_memory(x: Tensor) -> Tensor:
    """A copy that lies in memory as ``x`` does, gaps and expanded dimensions included."""
    if x.numel() == 0:
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=x.device)
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((span,), (1,)).clone().as_strided(x.size(), x.stride(), 0)


def _real(name: str) -> Callable[..., Tensor]:
    lowering = LOWERINGS[name]
    if name in ("positions", "place_positions"):
        return lowering
    if name in _EAGER:
        return _EAGER[name]

    def run(x: Tensor, *args: Any) -> Tensor:
        y = lowering(x, *args)
        aliases = y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        return same_memory(y) if aliases else y

    return run


def _fake(name: str) -> Callable[..., Tensor]:
    lowering = LOWERINGS[name]

    def run(*args: Any) -> Tensor:
        y = lowering(*args)
        # Not the lowering's result itself: it may be a view of the argument.
        return torch.empty_strided(y.size(), y.stride(), dtype=y.dtype, device=y.device)

    def like(x: Tensor, *args: Any) -> Tensor:
        """The same, said directly, for the ops that graphs are full of."""
        if name in ("all_reduce", "reduce_grad", "all_to_all") and args[0]:
            return torch.empty(x.shape, dtype=x.dtype, device=x.device)
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=x.device)

    return like if name in ("annotate", "use", "all_reduce", "reduce_grad", "all_to_all") else run


def _args_of(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.args = inputs[1:]


def _grad_gather(g: Tensor, dim: int, lengths: Any, whole: Any, rank: int, size: int, group: str) -> Tensor:
    g = _fxsp.shard(g, dim, lengths, whole, True, rank, size, group)
    return _fxsp.scale_whole(g, dim, lengths, whole, size) if size > 1 and any(whole) else g


#: Name of an op -> the op, with the same other arguments, that takes the gradient of its result to that of ``x``.
_ADJOINT = {
    "gather_used": "reduce_scatter",
    "reduce_scatter": "gather_used",
    "all_reduce": "use",
    "reduce_grad": "use",
    "all_to_all": "all_to_all",
    "all_to_all_within": "all_to_all_within",
    "mask_pads": "mask_pads",
    "scale_whole": "scale_whole",
    "take": "put",
    "put": "take",
}

#: The adjoints that take other arguments.
_FORMULA: dict[str, Callable[..., Tensor]] = {
    "annotate": lambda g, *_: g,
    "shard": lambda g, dim, lengths, whole, zero_pads, *at: _fxsp.gather_sum(g, dim, lengths, whole, *at),
    "gather": _grad_gather,
    "gather_sum": lambda g, dim, lengths, whole, *at: _fxsp.shard(g, dim, lengths, whole, True, *at),
    "use": lambda g, group: _fxsp.reduce_grad(g, group) if group else g,
    "deal": lambda g, dim, lengths, dealt, _, size, units: _fxsp.undeal(g, dim, lengths, dealt, size, units),
    "undeal": lambda g, dim, lengths, dealt, size, units: _fxsp.deal(g, dim, lengths, dealt, True, size, units),
    "pack": lambda g, lengths, size, zero_pads: _fxsp.unpack(g, lengths, size),
    "unpack": lambda g, lengths, size: _fxsp.pack(g, lengths, size, True),
}

#: Ops whose eager form is not their lowering.
_EAGER: dict[str, Callable[..., Tensor]] = {"pack": exchange.pack_eager, "unpack": exchange.unpack_eager}


def _backward(name: str) -> Callable[..., tuple[Any, ...]]:
    formula = _FORMULA[name] if name in _FORMULA else getattr(_fxsp, _ADJOINT[name]).default

    def run(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return (formula(grad, *ctx.args), *(None for _ in ctx.args))

    return run


def _register(name: str, arguments: str) -> None:
    _library.define(f"{name}({arguments}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, _real(name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fxsp::{name}", _fake(name), lib=_library)


for _name, _arguments in {**OPS, **INTERNAL}.items():
    _register(_name, _arguments)
for _name in {**_ADJOINT, **_FORMULA}:
    torch.library.register_autograd(f"fxsp::{_name}", _backward(_name), setup_context=_args_of, lib=_library)
deferred_ops.register(_library)
head_ops.register(_library)
ring_ops.register(_library)
merged_ops.register(_library)
extremes.register(_library)
