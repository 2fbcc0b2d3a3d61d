"""Tensors taken apart into consecutive rows, and put together again: without a copy where there is nothing to do."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, cat

from fxsp.kernels.tokens import Lengths, Size

__all__ = ["along", "cut", "joined"]


def joined(pieces: Sequence[Tensor], dim: int) -> Tensor:
    """All rows; of one piece, itself."""
    return pieces[0] if len(pieces) == 1 else cat(list(pieces), dim)


def cut(x: Tensor, sizes: Lengths, dim: int) -> list[Tensor]:
    """So many rows each, one piece after the other: views; a single piece is ``x`` itself."""
    if len(sizes) == 1:
        return [x]
    pieces: list[Tensor] = []
    start: Size = 0
    for n in sizes:
        pieces.append(x.narrow(dim, start, n))
        start = start + n
    return pieces


def along(x: Tensor, dim: int) -> list[int]:
    """The shape of a vector that is broadcast against ``x`` along ``dim``."""
    return [-1 if i == dim else 1 for i in range(x.dim())]
