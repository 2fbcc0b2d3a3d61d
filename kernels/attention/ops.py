"""The attentions over split keys as operators: one node each, of three results, until *emit*; on real ranks in eager
mode too.

The gradient of each is an operator of its own.  The log-sum-exp, in two numbers, is a by-product for it and has no
gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fxsp.kernels.attention.merge import wide
from fxsp.kernels.attention.ring import ring_attention, ring_attention_backward
from fxsp.kernels.attention.ring_blocks import pairs_of
from fxsp.kernels.attention.split_kv import merged_attention, merged_attention_backward, packed_width
from fxsp.kernels.counts import attention_flops, bytes_of
from fxsp.kernels.op import Cost, Gradient, Op, Saved, Sent, Sizes
from fxsp.types import Length, as_length, ceil_div, product, quotient

__all__ = ["ATTENTIONS"]


def _like(x: Tensor, width: Any) -> Tensor:
    """``[B, H, L, width]`` that lies as ``[B, L, H, width]``."""
    return x.new_empty([x.shape[0], x.shape[2], x.shape[1], width]).transpose(1, 2)


def _fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    lse, rest = (q.new_empty(q.shape[:3], dtype=wide(q.dtype)) for _ in range(2))
    return _like(q, v.shape[3]), lse, rest


def _attention(
    name: str, run: Callable[..., Any], backward: Callable[..., Any], tokens: str, place: str, types: str, **more: Any
) -> tuple[Op, Op]:
    """``(q, k, v, mask, tokens, place) -> (out, lse, rest)``, and the operator that is its gradient.

    The results are the output, the log-sum-exp and what that leaves (:mod:`fxsp.kernels.attention.own_kernel`).
    """
    count = len(tokens.split(", "))

    def fake_backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, rest: Tensor,
        *others: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        like = mask.new_empty(mask.shape) if mask is not None and others[count] else q.new_empty([0])
        return _like(q, q.shape[3]), _like(k, k.shape[3]), _like(v, v.shape[3]), like

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        q, k, v, mask, *others = inputs
        ctx.tensors = [i for i, x in enumerate(others) if isinstance(x, Tensor)]  # the seed of dropout
        ctx.others = [None if isinstance(x, Tensor) else x for x in others]
        ctx.save_for_backward(q, k, v, mask, *output, *(others[i] for i in ctx.tensors))

    def gradients(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
        operands, others = ctx.saved_tensors, list(ctx.others)
        for i, x in zip(ctx.tensors, operands[7:], strict=True):
            others[i] = x
        mask_grad = bool(ctx.needs_input_grad[3])
        op = getattr(torch.ops.fxsp, f"{name}_backward")
        dq, dk, dv, dmask = op(grad, *operands[:7], *others[:count], mask_grad, *others[count:])
        return (dq, dk, dv, dmask if mask_grad else None, *(None for _ in others))

    forward = (
        f"(Tensor q, Tensor k, Tensor v, Tensor? mask, {tokens}, {place}) -> (Tensor out, Tensor lse, Tensor rest)"
    )
    back = (
        "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor lse, Tensor rest, "
        f"{tokens}, bool mask_grad, {place}) -> (Tensor, Tensor, Tensor, Tensor)"
    )
    return (
        Op(name, forward, run, types, Saved(setup, gradients), fake=_fake, saved=True, **more),
        Op(f"{name}_backward", back, backward, fake=fake_backward),
    )


# --- a ring


def _rotations(call: Sizes) -> Length:
    """The split rows of keys and values go once to each other place."""
    k, v, ulysses = call["k"], call["v"], call["ulysses"]
    if k is None or v is None:
        return 0
    rows: Length = 0
    lengths, whole = call["k_lengths"], call["k_whole"]
    kinds = call["k_head_tail"] or [False] * len(lengths), call["k_units"] or [1] * len(lengths)
    for length, entire, dealt, unit in zip(lengths, whole, *kinds, strict=True):
        units = None if entire or length is None else quotient(length, unit or 1)
        if units is not None:
            parts = 2 if dealt else 1
            rows = rows + (unit or 1) * parts * ulysses * ceil_div(units, parts * call.size)
    width = as_length(k.shape[3] + v.shape[3])
    return product((*k.shape[:2], as_length(rows), width, k.dtype.itemsize, call.size // ulysses - 1))


def _rotated_back(call: Gradient) -> Iterator[Sent]:
    """Keys and values once more, and their gradients one step behind, in fp32."""
    dtype = call.dtype("q")
    wider = wide(dtype).itemsize // dtype.itemsize
    for sent in call.forward:
        yield Sent("rotation", sent.bytes, "keys and values of an attention, once more", sent.tokens)
    for sent in call.forward:
        yield Sent("rotation", as_length(sent.bytes * wider), "gradients of keys and values", sent.tokens)


def _moved_by_ring(call: Sizes) -> Iterator[Cost]:
    """Each of ``r - 1`` steps k and v are laid in one message and travel, and the sum of two outputs is written."""
    steps, out = call["size"] // call["ulysses"] - 1, call.result[0]
    if steps == 0:
        return
    yield Cost(2 * steps, 2 * steps, 4 * steps * (bytes_of(call["k"]) + bytes_of(call["v"])), "kv", "local")
    # The sum is kept in fp32 until the last step; the first one reads two outputs as they are.
    item = out.element_size()
    moved = out.numel() * (item * (steps + 2) + 2 * max(item, 4) * (steps - 1))
    yield Cost(2 * steps, steps, moved, "o", "local")


def _flops_of_ring(call: Sizes, rank: int | None) -> int:
    """The blocks that a rank computes; a causal ring gives each rank others, and the last one most."""
    q, v = call["q"].shape, call["v"].shape
    queries, keys = (
        tuple(tuple(call[f"{x}_{what}"]) for what in ("lengths", "whole", "head_tail", "units")) for x in "qk"
    )
    ulysses, size = call["ulysses"], call["size"]
    place = (size - 1 if rank is None else rank) // ulysses
    pairs = pairs_of(queries, keys, bool(call["causal"]), ulysses, size // ulysses, place, call["window"])
    return int(2 * q[0] * q[1] * pairs * (q[-1] + v[-1]))


# --- whole queries


def _outputs_sent(call: Sizes) -> Length:
    """Outputs and log-sum-exps of the queries, to everyone."""
    q, v = call["q"], call["v"]
    width = as_length(packed_width(0 if v is None else v.shape[-1], q.dtype))
    return product((*q.shape[:-1], width, q.dtype.itemsize, call.size - 1))


def _moved_by_merge(call: Sizes) -> Iterator[Cost]:
    """The outputs of all ranks come in."""
    if call.size > 1:
        yield Cost(1, call.size, (1 + call.size) * bytes_of(call.result[0]), "o", "real")


def _flops_of_merge(call: Sizes, rank: int | None) -> int:
    """Whole queries, and the keys of a rank, pads too."""
    return attention_flops(*(tuple(call[name].shape) for name in "qkv"), causal=False)


ATTENTIONS: tuple[Op, ...] = (
    *_attention(
        "ring_attention", ring_attention, ring_attention_backward,
        "SymInt[] q_lengths, bool[] q_whole, SymInt[] k_lengths, bool[] k_whole, bool causal, float? scale",
        "int ulysses, int rank, int size, str group, bool[] q_head_tail=[], bool[] k_head_tail=[], "
        "SymInt? window=None, float dropout_p=0.0, Tensor? seed=None, SymInt[] q_units=[], SymInt[] k_units=[], "
        "bool exact=False",
        "S -> S", sends=_rotations, returns=_rotated_back, moves=_moved_by_ring, flops=_flops_of_ring,
    ),
    *_attention(
        "merged_attention", merged_attention, merged_attention_backward,
        "SymInt[] k_lengths, bool[] k_whole, bool causal, float? scale",
        "int rank, int size, str group, bool[] k_head_tail=[], SymInt[] k_units=[], bool exact=False",
        "U, S -> R", sends=_outputs_sent, moves=_moved_by_merge, flops=_flops_of_merge,
    ),
)  # fmt: skip
