"""Attention under a mask that is known by positions: causal, with a window, and a mask of keys.

``scaled_dot_product_attention`` takes a causal flag or a mask, not both: what is causal and has padding would need a
mask ``[B, 1, S, S]``.  Here queries are taken in blocks: each sees the keys that its rows may see at all, under the
mask of this block alone.  The operator is local, and made of ATen operators: compilers see through it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxsp.kernels.counts import local_attention_flops
from fxsp.kernels.op import Op
from fxsp.kernels.rows import joined

__all__ = ["BANDED", "allowed", "banded_attention", "blocks"]

#: Rows of a block at least, and blocks at most: a graph must not grow with the number of tokens.
_ROWS, _BLOCKS = 1024, 8


def allowed(rows: Tensor, columns: Tensor, causal: bool, window: Any, keys: Tensor | None) -> Tensor:
    """``[m, n]``, or what ``keys [..., 1, n]`` makes of it: which keys queries at positions ``rows`` may look at.

    ``causal``: none behind the query; ``window``: none that is more than so many tokens before it.
    """
    distance = rows.unsqueeze(1) - columns
    found = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        found = found & (distance <= window)
    return found if keys is None else found & keys


def blocks(m: int, n: int, is_causal: bool, window: Any) -> Iterator[tuple[int, int, int, int]]:
    """The rows of each block, from and to, and the keys that it is computed with."""
    step = max(_ROWS, -(-m // _BLOCKS))
    for start in range(0, m, step):
        stop = min(start + step, m)
        if step >= m:
            yield start, stop, 0, n
            return
        first = 0 if window is None else min(max(start - window, 0), n - 1)
        yield start, stop, first, max(min(stop, n), first + 1) if is_causal else n


def banded_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, window: Any,
    scale: float | None, enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """``query [..., H, m, d]``, ``key``, ``value`` as SDPA has them; ``attn_mask`` is boolean, and of one row."""
    m, n = query.shape[-2], key.shape[-2]
    known = isinstance(m, int) and isinstance(n, int)
    outs = []
    for start, stop, first, last in blocks(m, n, is_causal, window) if known else [(0, m, 0, n)]:
        rows = torch.arange(start, stop, device=query.device)
        columns = torch.arange(first, last, device=query.device)
        keys = None
        if attn_mask is not None:
            keys = attn_mask if attn_mask.shape[-1] == 1 else attn_mask.narrow(-1, first, last - first)
        mask = allowed(rows, columns, is_causal, window, keys)
        q = query.narrow(-2, start, stop - start)
        k, v = (x.narrow(-2, first, last - first) for x in (key, value))
        outs.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=enable_gqa))
    return joined(outs, -2)


BANDED = Op(
    "banded_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, int? window, float? scale, "
    "bool enable_gqa) -> Tensor",
    banded_attention, flops=local_attention_flops, namespace="fxsp_local",
)  # fmt: skip
