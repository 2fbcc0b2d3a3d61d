"""Where the tokens and heads of an exchange are put in place: by Triton kernels, or by plain tensor operations.

On CUDA (and ROCm) tensors the operators ``torch.ops.fxsp_kernels.*`` move them (:mod:`fxsp.kernels.triton_ops`), if
Triton is installed; elsewhere, and for what they do not take, plain operations do the same
(:mod:`fxsp.kernels.exchange.exchange`).  To import this module takes neither Triton nor a GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

__all__ = ["TENSORS", "kernels"]

#: Tensors that one launch of the kernels for heads moves: q, k and v.
TENSORS = 3

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

#: For tests: kernels for tensors of the CPU too, where Triton's interpreter runs them.
_INTERPRETED = False


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def _fits(sizes: Sequence[Any]) -> bool:
    """Whether a kernel can walk the elements of a row: three dimensions, the inner ones of known size."""
    left = [n for n in sizes if not (isinstance(n, int) and n == 1)]
    return len(left) <= 3 and all(isinstance(n, int) for n in left[1:])


def kernels(x: Tensor, row: Sequence[Any]) -> Any:
    """The operators that move tensors like ``x`` with rows of the sizes ``row``; None: plain operations do it."""
    if x.device.type != "cuda" and not _INTERPRETED:
        return None
    if x.dtype not in _DTYPES or not _fits(row) or not _installed():
        return None
    importlib.import_module("fxsp.kernels.triton_ops")
    return torch.ops.fxsp_kernels
