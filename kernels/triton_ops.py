"""The Triton kernels as operators ``torch.ops.fxsp_kernels.*``, of which a compiler sees the inside (``triton_op``).

Imported only where a kernel is wanted (see :mod:`fxsp.kernels.exchange.place`): it needs Triton.  They are written
into graphs after autograd; the differentiable operators are those of :mod:`fxsp.kernels.ops`, each an adjoint of
another.

Tensors may have any strides, expanded ones included.  Results are contiguous.  Offsets are 64 bits wide.

Sizes: B batch, P ranks (blocks), L rows of a block, S rows in global order, D head dimension.  A segment of ``n`` rows
has ``ceil(n / P)`` rows in each block, the last ones pads; one that is ``whole`` has all ``n`` in every block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.library import triton_op, wrap_triton

from fxsp.kernels.exchange.place import TENSORS
from fxsp.kernels.exchange.triton_heads import pack_heads_kernel, unpack_heads_kernel
from fxsp.kernels.exchange.triton_rows import pack_rows_kernel, unpack_rows_kernel
from fxsp.kernels.tokens import Part, placed
from fxsp.types import as_length, product, same_length

__all__ = ["pack_heads", "pack_rows", "tile", "unit", "unpack_heads", "unpack_rows"]

#: Segments that one launch of the kernels for rows moves.
SEGMENTS = 4


def unit(itemsize: int, width: int, *strides: Any) -> int:
    """How many elements, at most 16 bytes, lie side by side in tensors whose last stride comes last.

    ``width``: elements side by side in a row.  ``strides``: of all tensors, those of the elements as a tuple each.
    """
    count = 16 // itemsize
    lengths = [as_length(n) for s in strides for n in s[:-1]]  # asked as expressions: that adds no guard
    while count > 1:
        inner = all(same_length(as_length(s[-1]), 1) for s in strides)
        if inner and width % count == 0 and all(n % count == 0 for n in lengths):
            return count
        count //= 2
    return 1


def tile(elements: Any, itemsize: int) -> tuple[int, int]:
    """``(rows, elements)`` of a tile of 8 KiB, for runs of ``elements``: powers of two, with few idle lanes."""
    if not isinstance(elements, int):
        return 8, 1024 // itemsize
    sizes = [1 << i for i in range(6, 11)]
    across = min(sizes, key=lambda n: (-(-elements // n) * n, -n))
    return max(8192 // itemsize // across, 1), across


def _tiles(n: Any, of: int) -> Any:
    return (n + of - 1) // of


def _in_units(strides: Sequence[Any], per: int) -> list[Any]:
    """Strides in units of ``per`` elements, the last one in elements."""
    return [*(s // per for s in strides[:-1]), strides[-1]]


@triton_op("fxsp_kernels::pack_heads", mutates_args=())
def pack_heads(xs: list[Tensor], rows: int, zero_pads: bool, size: int) -> Tensor:
    """``[B, P h_i, L, D]`` each -> ``[P, rows, B sum of h_i, D]``, rows from L on copies of the last one, or zero.

    At most three tensors, of one shape but for their heads.
    """
    batch, _, length, width = xs[0].shape
    heads = [int(x.shape[1]) // int(size) for x in xs]
    out = xs[0].new_empty([size, rows, batch * sum(heads), width])
    itemsize = out.element_size()
    per = unit(itemsize, width, *(x.stride() for x in xs))
    block_l, block_e = tile(max(heads) * width, itemsize)
    chunks = sum(_tiles(h * width, block_e) for h in heads)
    q, k, v = [*xs, xs[0], xs[0]][:TENSORS]
    hq, hk, hv = [*heads, 0, 0][:TENSORS]
    strides = [n for x in (q, k, v) for n in _in_units(x.stride(), per)]
    wrap_triton(pack_heads_kernel)[(_tiles(rows, block_l), size * batch, chunks)](
        q, k, v, out, *strides, batch, length, rows,
        HQ=hq, HK=hk, HV=hv, D=width, UNIT=per, ZERO=zero_pads, BLOCK_L=block_l, BLOCK_E=block_e,
    )  # fmt: skip
    return out


@triton_op("fxsp_kernels::unpack_heads", mutates_args=())
def unpack_heads(x: Tensor, heads: list[int], length: int) -> Tensor:
    """``[P, rows, B sum of h_i, D]`` -> ``[B, length, P sum of h_i, D]``: all heads of the first tensor come first.

    At most three tensors.
    """
    size, _, _, width = x.shape
    heads = [int(h) for h in heads]
    batch = x.shape[2] // sum(heads)
    out = x.new_empty([batch, length, size * sum(heads), width])
    itemsize = out.element_size()
    per = unit(itemsize, width, x.stride())
    block_l, block_e = tile(max(heads) * width, itemsize)
    chunks = sum(_tiles(h * width, block_e) for h in heads)
    hq, hk, hv = [*heads, 0, 0][:TENSORS]
    wrap_triton(unpack_heads_kernel)[(_tiles(length, block_l), size * batch, chunks)](
        x, out, *_in_units(x.stride(), per), batch, size, length,
        HQ=hq, HK=hk, HV=hv, D=width, UNIT=per, BLOCK_L=block_l, BLOCK_E=block_e,
    )  # fmt: skip
    return out


def merged(sizes: list[Any], *strides: list[Any]) -> tuple[list[Any], list[list[Any]]]:
    """The dimensions of a row as three, the last two of known size, with the strides of each tensor.

    Neighbours that are one run in every tensor become one.  Raises ``ValueError`` if more than three are left.
    """
    left: list[tuple[Any, list[Any]]] = []
    for i in reversed(range(len(sizes))):
        n, at = sizes[i], [s[i] for s in strides]
        if isinstance(n, int) and n == 1:
            continue
        if left and isinstance(n, int) and isinstance(left[0][0], int):
            m, next_at = left[0]
            if all(same_length(as_length(a), product((m, as_length(b)))) for a, b in zip(at, next_at, strict=True)):
                left[0] = (n * m, next_at)
                continue
        left.insert(0, (n, at))
    if left and not isinstance(left[-1][0], int):
        left.append((1, [1] * len(strides)))
    if not left:
        left.append((1, [1] * len(strides)))
    while len(left) < 3:
        left.insert(0, (1, [0] * len(strides)))
    if len(left) > 3 or not isinstance(left[1][0], int):
        raise ValueError(f"a row of sizes {sizes} has more than three dimensions, or one of unknown size inside")
    return [n for n, _ in left], [[at[i] for _, at in left] for i in range(len(strides))]


def _groups(parts: list[Part]) -> Any:
    """``(start, start in a block, rows in a block, lengths of four, bits of whole)`` of each launch."""
    for i in range(0, len(parts), SEGMENTS):
        some = parts[i : i + SEGMENTS]
        bits = sum(1 << j for j, part in enumerate(some) if part.whole)
        lengths = [*(part.length for part in some), 0, 0, 0][:SEGMENTS]
        yield some[0].start, some[0].row, sum(part.rows for part in some), lengths, bits


def _row_shape(inner: list[Any], dim: int, rows: Any) -> list[Any]:
    return [*inner[:dim], rows, *inner[dim:]]


@triton_op("fxsp_kernels::pack_rows", mutates_args=())
def pack_rows(
    x: Tensor, lengths: list[int], whole: list[bool], size: int, zero_pads: bool, rank: int, blocks: int, dim: int
) -> Tensor:
    """``x [S, *inner]`` -> those of ``blocks`` ranks from ``rank`` on, ``[blocks, *inner[:dim], L, *inner[dim:]]``.

    Pad rows are copies of the last row of their segment, or zero.
    """
    inner = list(x.shape[1:])
    parts = placed(lengths, whole, int(size))
    total: Any = sum(part.rows for part in parts)
    out = x.new_empty([blocks, *_row_shape(inner, dim, total)])
    rows_out = out.movedim(dim + 1, 1)
    (a, h, d), (xi, oi) = merged(inner, list(x.stride()[1:]), list(rows_out.stride()[2:]))
    at_x, at_out = [x.stride(0), *xi], [*rows_out.stride()[:2], *oi]
    itemsize = out.element_size()
    per = unit(itemsize, d, at_x, at_out)
    row, across = tile(a * h * d if isinstance(a, int) else h * d, itemsize)
    for start, local, rows, four, bits in _groups(parts):
        wrap_triton(pack_rows_kernel)[(_tiles(rows, row), _tiles(a * h * d, across), blocks)](
            x, out, *_in_units(at_x, per), *_in_units(at_out, per), a, size, rank, rows, start, local, *four,
            H=h, D=d, UNIT=per, WHOLE=bits, ZERO=zero_pads, BLOCK_L=row, BLOCK_E=across,
        )  # fmt: skip
    return out


@triton_op("fxsp_kernels::unpack_rows", mutates_args=())
def unpack_rows(x: Tensor, lengths: list[int], whole: list[bool], size: int, rank: int, dim: int) -> Tensor:
    """``x [P, L, *inner]`` -> ``[*inner[:dim], S, *inner[dim:]]``: the segments in global order, without pads.

    A whole segment is read from the block of ``rank``.
    """
    inner = list(x.shape[2:])
    out = x.new_empty(_row_shape(inner, dim, sum(lengths)))
    rows_out = out.movedim(dim, 0)
    (a, h, d), (xi, oi) = merged(inner, list(x.stride()[2:]), list(rows_out.stride()[1:]))
    at_x, at_out = [*x.stride()[:2], *xi], [rows_out.stride(0), *oi]
    itemsize = out.element_size()
    per = unit(itemsize, d, at_x, at_out)
    row, across = tile(a * h * d if isinstance(a, int) else h * d, itemsize)
    for start, local, _, four, bits in _groups(placed(lengths, whole, int(size))):
        wrap_triton(unpack_rows_kernel)[(_tiles(sum(four), row), _tiles(a * h * d, across))](
            x, out, *_in_units(at_x, per), *_in_units(at_out, per), a, size, rank, start, local, *four,
            H=h, D=d, UNIT=per, WHOLE=bits, BLOCK_L=row, BLOCK_E=across,
        )  # fmt: skip
    return out
