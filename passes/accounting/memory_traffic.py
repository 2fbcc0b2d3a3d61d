"""Which nodes of a lowered attention move memory, and how much, for the counts of *device_memory*.

The unit is a *pass*: one read, or one write, of all elements of one of q, k, v and the output o on a rank.  A node that
moves only some of the rows (the segments that are split, say) counts as if it moved all; its bytes are exact.  What an
operator of ours moves is in its record (:class:`fxsp.kernels.op.Op`).  Any other reads and writes a result that has
memory of its own (``cat``, ``contiguous``, ``reshape``, ...), and moves nothing where the result is a view.

The attention itself, which reads q, k, v and writes o in any case, is not counted.  Its output lies in memory as its
queries do (flash attention and cuDNN on GPUs); on a CPU, and where a mask is given, batch first, then tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from fxsp.kernels.counts import bytes_of
from fxsp.kernels.op import Cost, sizes_of
from fxsp.kernels.ops import op_of
from fxsp.passes.attention.operators import ATTENTION_OPS
from fxsp.passes.graph import Call
from fxsp.torch_internals import schema, storage_key

__all__ = ["attended", "attention_output", "costs", "is_attention"]


def is_attention(node: Node) -> bool:
    """Whether a node attends: an operator of :data:`ATTENTION_OPS`, or one of ours (a ring, a merged one)."""
    op = op_of(node)
    return node.target in ATTENTION_OPS or (op is not None and op.flops is not None)


def attended(node: Node) -> list[tuple[Node, str]]:
    """The operands of an attention that are q, k and v."""
    call, op = Call(node), ATTENTION_OPS.get(node.target)
    names = ("q", "k", "v") if op is None else (op.query, op.key, op.value)
    return [(call[name], letter) for name, letter in zip(names, "qkv", strict=True)]


def attention_output(node: Node, q: Tensor, v: Tensor, device: str) -> Any:
    """A result like that of an attention, with the strides of the kernels for ``device``."""
    op, width = ATTENTION_OPS.get(node.target), v.shape[-1]
    if op is not None and not op.builtin:
        out = q.new_empty([*q.shape[:-1], width])
        return out if len(schema(node.target).returns) == 1 else [out] * len(schema(node.target).returns)
    if q.dim() != 4:  # no fused kernel takes these
        return q.new_empty([*q.shape[:-1], width])
    batch, heads, rows, _ = q.shape
    if device != "cpu" and op is not None and op.mask_in(Call(node)) is None and q.stride(2) > q.stride(0):
        out = q.new_empty(rows, batch, heads, width).permute(1, 2, 0, 3)
    else:
        out = q.new_empty(batch, rows, heads, width).transpose(1, 2)
    return out if op is not None else [out, *(out.new_empty(out.shape[:3]) for _ in range(2))]


def costs(node: Node, value: Any, operands: dict[Node, Any], size: int) -> Iterator[Cost]:
    """What ``node`` costs; ``value`` is its result, ``operands`` the values of its operands."""
    op = op_of(node)
    if op is not None and op.moves is not None:
        yield from op.moves(sizes_of(node, size, lambda n: operands.get(n, n), value))
    elif node.target not in ATTENTION_OPS and isinstance(value, Tensor):
        keys = {storage_key(x) for x in tree_leaves(list(operands.values())) if isinstance(x, Tensor)}
        if storage_key(value) not in keys:
            yield Cost(1, 1, 2 * bytes_of(value))
