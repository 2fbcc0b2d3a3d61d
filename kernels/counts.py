"""What operators of ours cost: bytes that they send, memory that they move, products that they compute.

Each is a field of the records that have it (:class:`fxsp.kernels.op.Op`).  Pads are counted: they travel.  Sums of half
precision travel as float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxsp.kernels.collectives import summand_dtype
from fxsp.kernels.op import Cost, Gradient, Local, Sent, Sizes
from fxsp.types import Length, Shard, as_length, ceil_div, product

__all__ = [
    "attention_flops",
    "bytes_of",
    "exchanged",
    "exchanged_within",
    "local_attention_flops",
    "moved",
    "moved_by_gather",
    "moved_by_take",
    "once_more",
    "reduced",
    "reduced_bytes",
    "returned_rows",
    "returned_use",
    "rows_scattered",
    "rows_sent",
    "rows_summed",
    "scattered",
    "split_bytes",
]

# --- what is sent


def split_bytes(shape: Any, shard: Shard, itemsize: int, size: int) -> Length:
    """Bytes of a rank's rows of split segments: what it sends to each other rank in a gather."""
    rows = product((shard.outer, shard.sequence.split_length(size)))
    return product((*(rows if i == shard.dim else n for i, n in enumerate(shape)), itemsize))


def reduced_bytes(elements: Length, dtype: torch.dtype, size: int) -> Length:
    """Bytes that each of ``size`` ranks sends in an all-reduce: ``2 (P-1)/P`` of its operand."""
    return _part(product((elements, summand_dtype(dtype).itemsize)), 2 * (size - 1), size)


def _part(total: Length, numerator: int, denominator: int) -> Length:
    """``total * numerator / denominator``, rounded up."""
    return ceil_div(as_length(total * numerator), denominator)


def reduced(call: Sizes) -> Length:
    """An all-reduce."""
    x: Local = call["x"]
    return reduced_bytes(product(x.shape), x.dtype, call.size)


def exchanged(call: Sizes) -> Length:
    """All but the own of ``P`` blocks of an all-to-all."""
    x: Local = call["x"]
    return _part(product((*x.shape, x.dtype.itemsize)), call.size - 1, call.size)


def exchanged_within(call: Sizes) -> Length:
    """The same among as many ranks as the operand has blocks."""
    x: Local = call["x"]
    return as_length(product((*x.shape[1:], x.dtype.itemsize)) * (x.shape[0] - 1))


def rows_sent(call: Sizes) -> Length:
    """A rank's rows of split segments, to ``P - 1`` others."""
    return _rows(call, call["x"].dtype, 0)


def rows_scattered(call: Sizes) -> Length:
    """Everyone else's rows of split segments."""
    return _rows(call, summand_dtype(call["x"].dtype), 0)


def rows_summed(call: Sizes) -> Length:
    """As :func:`rows_sent`; whole segments are summed by an all-reduce."""
    return _rows(call, call["x"].dtype, 2)


def _rows(call: Sizes, dtype: torch.dtype, passes_of_whole: int) -> Length:
    x: Local = call["x"]
    rows: Length = 0
    for length, whole in zip(call["lengths"], call["whole"], strict=True):
        if length is None:  # a size that nobody described: all rows travel, at most
            rows = x.shape[call["dim"]]
            break
        if not whole:
            rows = rows + ceil_div(length, call.size)
        elif passes_of_whole:
            rows = rows + _part(passes_of_whole * length, 1, call.size)
    others = [n for i, n in enumerate(x.shape) if i != call["dim"]]
    return product((*others, as_length(rows), dtype.itemsize, call.size - 1))


# --- what gradients send


def once_more(call: Gradient) -> Iterator[Sent]:
    """An exchange is the adjoint of an exchange."""
    for sent in call.forward:
        why = "gradients of tokens and heads of an attention"
        yield Sent(sent.kind, sent.bytes, why, sent.tokens, sent.members)


def scattered(call: Gradient) -> Iterator[Sent]:
    """What was gathered is summed, by those who have the rows."""
    for sent in call.forward:
        dtype = call.dtype()
        count = as_length(sent.bytes * (summand_dtype(dtype).itemsize // dtype.itemsize))
        yield Sent("reduce_scatter", count, "gradients of gathered tokens", sent.tokens)


def returned_use(call: Gradient) -> Iterator[Sent]:
    """A whole value that is used with shards."""
    if call.argument("group"):
        x, parameter = call.value(), call.is_parameter("x")
        what = "gradients of parameters" if parameter else "the gradient of a whole value that is used with shards"
        yield Sent("all_reduce", reduced_bytes(product(x.shape), x.dtype, call.size), what)


def returned_rows(call: Gradient) -> Iterator[Sent]:
    """The adjoint of a shard: rows of split segments are gathered, those of whole ones are summed."""
    (type_, value), size = call.shard(), call.size
    why = "the gradient of a whole value, of which each rank uses its rows"
    rows = split_bytes(value.shape, type_, value.dtype.itemsize, size)
    if any(s.sharded for s in type_.sequence.segments):
        yield Sent("all_gather", as_length(rows * (size - 1)), why, type_.sequence)
    for segment in type_.sequence.segments:
        if not segment.sharded:
            tokens = product((type_.outer, segment.length))
            elements = product(tokens if i == type_.dim else n for i, n in enumerate(value.shape))
            yield Sent("all_reduce", reduced_bytes(elements, value.dtype, size), why)


# --- what is moved in device memory


def bytes_of(x: Tensor) -> int:
    """All of a tensor."""
    return x.numel() * x.element_size()


def moved(call: Sizes) -> Iterator[Cost]:
    """Read once and written once, pads included: a reordering, or the buffers of an all-to-all."""
    yield Cost(1, 1, 2 * bytes_of(call.result))


def moved_by_take(call: Sizes) -> Iterator[Cost]:
    """A block of the outermost dimension is a view, once the operator is lowered."""
    if call["dim"] != 0:
        yield from moved(call)


def moved_by_gather(call: Sizes) -> Iterator[Cost]:
    """The all-gather writes the rows of all ranks.  Before, the tokens are moved outermost, where they are not; after
    it several segments are put in order."""
    x: Tensor = call["x"]
    if not x.movedim(call["dim"], 0).is_contiguous():
        yield Cost(1, 1, 2 * bytes_of(x), rows="local")
    yield Cost(1, call.size, bytes_of(x) * (1 + call.size), rows="local")
    if len(call["lengths"]) > 1:
        yield Cost(call.size, call.size, 2 * bytes_of(call.result), rows="real")


# --- what is computed


def attention_flops(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], *, causal: bool) -> int:
    """``[..., m, d], [..., n, d], [..., n, e]``: two products over the allowed pairs of queries and keys."""
    m, n = q[-2], k[-2]
    pairs = m * n
    if causal:  # the flag means the upper left corner: query i sees keys 0..i
        full = min(m, n)
        pairs = full * (full + 1) // 2 + (m - full) * n
    queries = 1
    for size in q[:-2]:
        queries *= size
    return 2 * queries * pairs * (q[-1] + v[-1])


def local_attention_flops(call: Sizes, rank: int | None) -> int:
    """An operator with the arguments of ``scaled_dot_product_attention``."""
    q, k, v = (tuple(call[name].shape) for name in ("query", "key", "value"))
    return attention_flops(q, k, v, causal=bool(call["is_causal"]))
