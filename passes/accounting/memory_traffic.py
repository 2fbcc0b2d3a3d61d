"""Which nodes of a lowered attention move memory, and how much: the table behind the counts of *device_memory*.

The unit is a *pass*: one read, or one write, of all elements of one of q, k, v and the output o on a rank.  A node that
moves only some of the rows (the segments that are split, say) counts as if it moved all; its bytes are exact.

=================== ============================ =======================================================================
operator            passes, per tensor moved     why
=================== ============================ =======================================================================
pack_heads          1 read, 1 write              q, k, v by destination, pads included
all_to_all (within) 1 read, 1 write              the send buffer is read, the receive buffer is written
unpack, pack        1 read, 1 write              several segments, or pads among rows whose order counts
unpack_heads        1 read, 1 write              heads next to each other, as the output projection reads them
gather_used         1 read, P writes             the all-gather of keys and values: all ranks' rows are written
\\                   1 read, 1 write              before it, where tokens are not outermost: they are moved there
\\                   P reads, P writes            after it, where there are several segments: they are put in order
ring_attention      4 (r-1) reads and writes     each step k, v are laid in one message, and travel (r places)
\\                   3 (r-1)                      each step the output so far and the step's are read, their sum written
merged_attention    1 read, P writes of outputs  those of all ranks come in
any other           1 read, 1 write of a result  that has memory of its own (``cat``, ``contiguous``, ``reshape``, ...)
\\                   nothing                      where the result is a view of an operand
=================== ============================ =======================================================================

The attention itself, which reads q, k, v and writes o in any case, is not counted.  Its output lies in memory as its
queries do (flash attention and cuDNN on GPUs); on a CPU, and where a mask is given, batch first, then tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from fxsp.passes.attention.operators import ATTENTION_OPS
from fxsp.passes.graph import Call
from fxsp.torch_internals import is_operator, schema, storage_key

__all__ = ["Cost", "attended", "attention_output", "costs", "is_attention"]

_MINE = (torch.ops.fxsp.ring_attention.default, torch.ops.fxsp.merged_attention.default)


@dataclass(frozen=True)
class Cost:
    """What one node reads and writes: passes for each tensor moved, and bytes of all of them together."""

    reads: int
    writes: int
    bytes: int
    #: The tensors, of ``"qkvo"``; empty: all that pass through the node.
    tensors: str = ""
    #: What the bytes grow with: ``"local"`` rows, pads included, or ``"real"`` ones; empty: as the node's result tells.
    rows: str = ""


def is_attention(node: Node) -> bool:
    """Whether a node attends: an operator of :data:`ATTENTION_OPS`, or one of ours (a ring, a merged one)."""
    return node.target in ATTENTION_OPS or node.target in _MINE


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
    """What ``node`` costs by the table; ``value`` is its result, ``operands`` the values of its operands."""
    name = schema(node.target).name if is_operator(node.target) else ""
    if node.target not in ATTENTION_OPS:
        yield from _TABLE.get(name, _own_memory)(node, value, operands, size)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _moved(node: Node, value: Tensor, operands: dict[Node, Any], size: int) -> Iterator[Cost]:
    yield Cost(1, 1, 2 * _bytes(value))


def _own_memory(node: Node, value: Any, operands: dict[Node, Any], size: int) -> Iterator[Cost]:
    keys = {storage_key(x) for x in tree_leaves(list(operands.values())) if isinstance(x, Tensor)}
    if isinstance(value, Tensor) and storage_key(value) not in keys:
        yield from _moved(node, value, operands, size)


def _taken(node: Node, value: Tensor, operands: dict[Node, Any], size: int) -> Iterator[Cost]:
    """A block of the outermost dimension is a view, once fxsp ops are lowered."""
    if Call(node)["dim"] != 0:
        yield from _moved(node, value, operands, size)


def _gathered(node: Node, value: Tensor, operands: dict[Node, Any], size: int) -> Iterator[Cost]:
    call = Call(node)
    x = operands[call["x"]]
    if not x.movedim(call["dim"], 0).is_contiguous():
        yield Cost(1, 1, 2 * _bytes(x), rows="local")
    yield Cost(1, size, _bytes(x) * (1 + size), rows="local")
    if len(call["lengths"]) > 1:
        yield Cost(size, size, 2 * _bytes(value), rows="real")


def _ring(node: Node, value: Any, operands: dict[Node, Any], size: int) -> Iterator[Cost]:
    call = Call(node)
    steps, out = call["size"] // call["ulysses"] - 1, value[0]
    if steps == 0:
        return
    yield Cost(2 * steps, 2 * steps, 4 * steps * sum(_bytes(operands[call[name]]) for name in "kv"), "kv", "local")
    # The sum is kept in fp32 until the last step; the first one reads two outputs as they are.
    item = out.element_size()
    moved = out.numel() * (item * (steps + 2) + 2 * max(item, 4) * (steps - 1))
    yield Cost(2 * steps, steps, moved, "o", "local")


def _merged(node: Node, value: Any, operands: dict[Node, Any], size: int) -> Iterator[Cost]:
    if size > 1:
        yield Cost(1, size, (1 + size) * _bytes(value[0]), "o", "real")


_TABLE: dict[str, Callable[..., Iterator[Cost]]] = {
    "fxsp::pack_heads": _moved,
    "fxsp::unpack_heads": _moved,
    "fxsp::pack": _moved,
    "fxsp::unpack": _moved,
    "fxsp::all_to_all": _moved,
    "fxsp::all_to_all_within": _moved,
    "fxsp::take": _taken,
    "fxsp::gather_used": _gathered,
    "fxsp::ring_attention": _ring,
    "fxsp::merged_attention": _merged,
}
