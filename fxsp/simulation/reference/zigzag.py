"""What ``fxsp.deal`` and ``fxsp.undeal`` mean: a list of the tokens, in the order in which ranks hold them.

Written apart from ``fxsp.kernels``, as the rest of the oracle (:mod:`fxsp.simulation.reference.table`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxsp.simulation.reference.lanes import smaller

__all__ = ["deal", "poisoned", "undeal"]


def _rows(
    lengths: Sequence[int], head_tail: Sequence[bool], size: int, units: Sequence[int] = ()
) -> list[tuple[int, bool]]:
    """Of each row the token and whether it is a pad (of that token): segment by segment, rank after rank."""
    result: list[tuple[int, bool]] = []
    start = 0
    for n, dealt, unit in zip(map(int, lengths), head_tail, map(int, units or [1] * len(lengths)), strict=True):
        parts = 2 * size if dealt else size
        total = n if not dealt and unit == 1 else parts * unit * -(-n // (parts * unit))
        tokens = [(start + (i if i < n else n - unit + (i - n) % unit), i >= n) for i in range(total)]
        start += n
        if not dealt:
            result += tokens
            continue
        blocks = [tokens[i :: len(tokens) // (2 * size)] for i in range(len(tokens) // (2 * size))]
        chunks = [[block[c] for block in blocks] for c in range(2 * size)]
        for rank in range(size):
            result += chunks[rank] + chunks[-1 - rank]
    return result


def _pads(rows: Sequence[tuple[int, bool]], x: Tensor, dim: int) -> Tensor:
    shape = [1] * x.dim()
    shape[dim] = -1
    return torch.tensor([pad for _, pad in rows], dtype=torch.bool, device=x.device).view(shape)


def deal(
    x: Tensor,
    dim: int,
    lengths: Sequence[int],
    head_tail: Sequence[bool],
    zero_pads: bool,
    size: int,
    units: Sequence[int] = (),
) -> Tensor:
    """Global rows in the order of ranks; a pad is a copy of the segment's last row, or zero."""
    rows = _rows(lengths, head_tail, size, units)
    result = torch.stack([x.select(dim, token) for token, _ in rows], dim) if rows else x.narrow(dim, 0, 0).clone()
    return result.masked_fill(_pads(rows, x, dim), 0) if zero_pads else result


def undeal(
    x: Tensor, dim: int, lengths: Sequence[int], head_tail: Sequence[bool], size: int, units: Sequence[int] = ()
) -> Tensor:
    """The way back: every token from where it lies; pads are dropped."""
    at = {token: i for i, (token, pad) in enumerate(_rows(lengths, head_tail, size, units)) if not pad}
    if not at:  # no tokens, no rows
        return x.narrow(dim, 0, 0).clone()
    return torch.stack([x.select(dim, at[token]) for token in range(len(at))], dim)


def poisoned(
    dealt: Tensor,
    x: Tensor,
    dim: int,
    lengths: Sequence[int],
    head_tail: Sequence[bool],
    size: int,
    units: Sequence[int] = (),
) -> Tensor:
    """What :func:`deal` made of ``x``, with other pads: the first row, three quarters of it where numbers are real."""
    return torch.where(_pads(_rows(lengths, head_tail, size, units), x, dim), smaller(x.narrow(dim, 0, 1)), dealt)
