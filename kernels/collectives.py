"""The four collectives on plain tensors, visible to a compiler as ``_c10d_functional`` ops.

Each takes any strides, and returns a contiguous tensor.  Bools travel as bytes.  Sums of fp16 and bf16 values travel
and accumulate in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxsp.torch_internals import functional_collectives

__all__ = [
    "all_gather",
    "all_reduce",
    "all_reduce_as",
    "all_to_all",
    "all_to_all_within",
    "reduce_scatter",
    "start_all_reduce",
    "start_shift",
    "summand",
    "summand_dtype",
    "wait",
]

_c10d = functional_collectives()


def _wire(x: Tensor) -> Tensor:
    """``x`` as it is moved: contiguous, bools as bytes."""
    x = x.contiguous()
    return x.view(torch.uint8) if x.dtype == torch.bool else x


def _moved(y: Tensor, like: Tensor) -> Tensor:
    y = wait(y)
    return y.view(torch.bool) if like.dtype == torch.bool else y


def _summed(y: Tensor, like: Tensor) -> Tensor:
    return wait(y).to(like.dtype)


def wait(pending: Tensor) -> Tensor:
    """The result of a collective that was started."""
    return _c10d.wait_tensor.default(pending)  # type: ignore[no-any-return]


def summand_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of ``dtype`` travel and accumulate: halves in fp32; bools count."""
    if dtype in (torch.float16, torch.bfloat16):
        return torch.float32
    return torch.int32 if dtype == torch.bool else dtype


def summand(x: Tensor) -> Tensor:
    """``x`` as it is summed, contiguous."""
    return x.to(summand_dtype(x.dtype)).contiguous()


def start_all_reduce(x: Tensor, group: str) -> Tensor:
    """Start the sum over ranks of a :func:`summand`."""
    return _c10d.all_reduce.default(x, "sum", group)  # type: ignore[no-any-return]


def all_reduce(x: Tensor, group: str) -> Tensor:
    """The sum over ranks (of bools: whether any is true)."""
    return _summed(start_all_reduce(summand(x), group), x)


def all_reduce_as(x: Tensor, op: str, group: str) -> Tensor:
    """Another operation over ranks than the sum, ``"max"`` or ``"min"``, of contiguous integers, as they are."""
    return wait(_c10d.all_reduce.default(x, op, group))


def reduce_scatter(x: Tensor, size: int, group: str) -> Tensor:
    """The rank-th of ``size`` blocks of rows of the sum over ranks."""
    return _summed(_c10d.reduce_scatter_tensor.default(summand(x), "sum", size, group), x)


def all_gather(x: Tensor, size: int, group: str) -> Tensor:
    """The rows of all ranks, rank after rank."""
    return _moved(_c10d.all_gather_into_tensor.default(_wire(x), size, group), x)


def all_to_all(x: Tensor, group: str) -> Tensor:
    """``x`` is ``[P, ...]``: row j goes to rank j, and row i of the result comes from rank i."""
    ones = [1] * int(x.shape[0])
    return _moved(_c10d.all_to_all_single.default(_wire(x), ones, ones, group), x)


def all_to_all_within(x: Tensor, rank: int, size: int, group: str) -> Tensor:
    """An all-to-all of ``x [u, ...]`` among the ``u`` consecutive ranks that this one is among.

    The others take part with empty parts: it needs no group of its own.
    """
    members = int(x.shape[0])
    first = rank - rank % members
    parts = [int(first <= j < first + members) for j in range(size)]
    return _moved(_c10d.all_to_all_single.default(_wire(x), parts, parts, group), x)


def start_shift(x: Tensor, by: int, rank: int, size: int, group: str) -> Tensor:
    """Start to send ``x [n]`` to the rank ``by`` further, and to receive as much from the rank ``by`` before.

    An all-to-all in which all other parts are empty: it needs no group of its own, and no order of sends and receives.
    """
    n = x.shape[0]
    to, source = (rank + by) % size, (rank - by) % size
    send = [n if j == to else 0 for j in range(size)]
    receive = [n if j == source else 0 for j in range(size)]
    return _c10d.all_to_all_single.default(x, receive, send, group)  # type: ignore[no-any-return]
