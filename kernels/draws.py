"""Dropout whose draw depends on where an element is, not on who draws it.

With ``options={"rng": "per_rank"}`` every rank draws for its own elements only.  The generators of the ranks are in the
same state, so a plain draw would repeat one mask on every rank.  Here one number, the *seed*, is drawn from them, and
whether an element stays is a hash of the seed and of the element's place in the whole value: different on all ranks,
and the same for every number of ranks and every method of attention.

The operators are local, and made of ATen operators: compilers see through them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fxsp.kernels.counts import local_attention_flops
from fxsp.kernels.op import Op

__all__ = ["DRAWS", "kept"]

_BITS = 0xFFFFFFFF


def _mixed(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers (held as int64) that scatters them; the constants are of C. Wellons's search.

    The factors have 31 bits, so that no product leaves 63.
    """
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _BITS
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _BITS
    return x ^ (x >> 15)


def _settled(x: Tensor) -> Tensor:
    """``x``, int64, in memory: a compiler that inlines evaluates a value as often as it is used.

    Each step of :func:`_mixed` uses its operand twice, so a few of them inlined in each other are thousands of
    operations (minutes of compiling).  Inductor ends such a chain where strides are named; eagerly nothing moves.
    """
    return x.as_strided(x.shape, x.stride())


def kept(seed: Tensor, places: list[Tensor], p: float) -> Tensor:
    """Which elements stay, each with probability ``1 - p``: booleans of the shape that ``places`` have together.

    ``seed`` is one int64; ``places`` are indices below 2**32 along different dimensions, which broadcast.
    """
    # Two keys of 32 bits: lines that agree in one of them still differ in the other.
    first, second = _settled(_mixed(seed & _BITS)), _settled(_mixed(((seed >> 32) & _BITS) ^ 0x5BD1E995))
    for place in places[:-1]:
        first = _settled(_mixed(first ^ place))
        second = _settled(_mixed(_mixed(second ^ place) ^ 0x9E3779B9))
    # The middle of a product uses its operand once: see _settled.
    return ((_mixed(first ^ places[-1]) ^ second) * 0x735A2D97 >> 15) & _BITS >= round(p * 2**32)


def _scaled(x: Tensor, keep: Tensor, p: float) -> Tensor:
    return torch.where(keep, x * (1 / (1 - p) if p < 1 else 0.0), 0.0)


def dropout(x: Tensor, seed: Tensor, rows: Tensor, dim: int, p: float) -> Tensor:
    """``x`` with elements dropped; ``rows [x.shape[dim]]`` are the places of its rows in the whole value."""
    moved = x.movedim(dim, 0)
    flat = moved.reshape([moved.shape[0], -1])
    keep = kept(seed, [rows.unsqueeze(1), torch.arange(flat.shape[1], device=x.device)], p)
    return _scaled(flat, keep, p).view(moved.shape).movedim(0, dim)


def dropped_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool,
    scale: float | None, enable_gqa: bool, seed: Tensor, rows: Tensor, heads: Tensor,
) -> Tensor:  # fmt: skip
    """``scaled_dot_product_attention`` with dropout, written out: the probabilities are held, ``[B, H, m, n]``.

    ``rows [m]`` and ``heads [H]`` are the places of queries and query heads in the whole attention.
    """
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    width = query.shape[-1]
    scores = query @ key.mT * (width**-0.5 if scale is None else scale)
    columns = torch.arange(key.shape[-2], device=query.device)
    if is_causal:
        scores = scores.masked_fill(
            columns > torch.arange(query.shape[-2], device=query.device).unsqueeze(1), -torch.inf
        )
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    p = torch.ops.aten._safe_softmax(scores, -1)
    places: list[Any] = [rows.unsqueeze(1), columns]
    if query.dim() > 2:
        places.insert(0, heads.view(-1, 1, 1))
    if query.dim() > 3:
        batch = query.shape[:-3]
        places.insert(0, torch.arange(math.prod(batch), device=query.device).view(*batch, 1, 1, 1))
    return _scaled(p, kept(seed, places, dropout_p), dropout_p) @ value


DRAWS = (
    Op("dropout", "(Tensor x, Tensor seed, Tensor rows, int dim, float p) -> Tensor", dropout, namespace="fxsp_local"),
    Op(
        "dropped_attention",
        "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, float dropout_p, bool is_causal, float? scale, "
        "bool enable_gqa, Tensor seed, Tensor rows, Tensor heads) -> Tensor",
        dropped_attention, flops=local_attention_flops, namespace="fxsp_local",
    ),
)  # fmt: skip
