"""Operators that are a whole layer in one, taken apart while a graph is normalized.

In evaluation without gradients ``nn.TransformerEncoderLayer`` and ``nn.MultiheadAttention`` call one operator of ATen
for all they do.  Here it is what it computes, projections, an attention, norms and a feed-forward: they have rules.

Input::

    %y = _native_multi_head_attention(%x, %x, %x, 32, 4, %w_qkv, %b_qkv, %w, %b, %mask, False, True, 1)

Output::

    %qkv  = linear(%x, %w_qkv, %b_qkv)
    %sdpa = scaled_dot_product_attention(%q, %k, %v, %allowed)
    %y    = linear(%flatten, %w, %b)

The numbers are those of the operators, up to floating point.  They differ from the modules' other path in two things: a
mask is read as a boolean one (whatever is not zero masks), and a query that may see no key is NaN.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fxsp import torch_internals

__all__ = ["FAST_PATHS"]

aten = torch.ops.aten
#: What the modules call ``mask_type`` where a row of the mask is for all queries of a batch entry.
_KEY_PADDING = 1


def _encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """``src`` ``[batch, tokens, embed_dim]`` to the same shape."""
    norm_1 = functools.partial(F.layer_norm, normalized_shape=[embed_dim], weight=norm_weight_1, bias=norm_bias_1)
    norm_2 = functools.partial(F.layer_norm, normalized_shape=[embed_dim], weight=norm_weight_2, bias=norm_bias_2)
    x = norm_1(src, eps=eps) if norm_first else src
    weights = qkv_weight, qkv_bias, proj_weight, proj_bias
    # What is computed comes first: it decides the strides of the sum, as in the operator, which adds in place.
    x = _attend(x, num_heads, *weights, mask=mask, mask_type=mask_type)[0] + src
    x = x if norm_first else norm_1(x, eps=eps)
    y = F.linear(norm_2(x, eps=eps) if norm_first else x, ffn_weight_1, ffn_bias_1)
    y = F.linear(F.gelu(y) if use_gelu else F.relu(y), ffn_weight_2, ffn_bias_2)
    x = y + x
    return x if norm_first else norm_2(x, eps=eps)


def _self_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``[batch, tokens, embed_dim]`` each; the output, and the weights ``[batch, (heads,) tokens, tokens]``."""
    projections = zip((query, key, value), qkv_weight.split(embed_dim), qkv_bias.split(embed_dim), strict=True)
    qkv = None if query is key is value else tuple(F.linear(x, w, b) for x, w, b in projections)
    out, q, k, blocked = _attend(
        query, num_head, qkv_weight, qkv_bias, proj_weight, proj_bias, mask=mask, mask_type=mask_type, qkv=qkv
    )
    if not need_weights:
        return out, None
    # A second time, in words: nothing of it is left where nobody looks at the weights.
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if blocked is not None:
        scores = scores.masked_fill(blocked, -math.inf)
    weights = scores.softmax(-1)
    return out, weights.mean(1) if average_attn_weights else weights


def _attend(
    x: Tensor,
    heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    *,
    mask: Tensor | None,
    mask_type: int | None,
    qkv: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The output; queries and keys, ``[batch, heads, tokens, width]``; and which keys are not seen, as a mask."""
    q, k, v = qkv or F.linear(x, qkv_weight, qkv_bias).chunk(3, -1)
    q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k, v))
    blocked = None if mask is None else _blocked(mask, mask_type)
    seen = None if blocked is None else blocked.logical_not()
    out = F.scaled_dot_product_attention(q, k, v, seen)
    if seen is not None:  # counted: a sum over keys that are split is no gather
        out = out.masked_fill(seen.sum(-1, keepdim=True) == 0, math.nan)
    return F.linear(out.transpose(1, 2).flatten(2), proj_weight, proj_bias), q, k, blocked


def _blocked(mask: Tensor, mask_type: int | None) -> Tensor:
    """True where a query may not see a key, for ``[batch, heads, queries, keys]``; repeated rows once."""
    for dim, stride in enumerate(mask.stride()):
        if isinstance(stride, int) and stride == 0 and dim < mask.ndim - 1:
            mask = mask.narrow(dim, 0, 1)
    blocked = mask if mask.dtype is torch.bool else mask.to(torch.bool)
    return blocked[:, None, None, :] if mask_type == _KEY_PADDING and mask.ndim == 2 else blocked


def _apart(function: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast knows nothing of these operators: what they consist of keeps its dtypes, too."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch_internals.without_autocast():
            return function(*args, **kwargs)

    return run


#: Operator -> a function of the same arguments that computes the same by operators with rules.
FAST_PATHS: Mapping[Any, Callable[..., Any]] = {
    aten._transformer_encoder_layer_fwd.default: _apart(_encoder_layer),
    aten._native_multi_head_attention.default: _apart(_self_attention),
}
