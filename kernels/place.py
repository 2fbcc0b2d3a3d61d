"""Where the tokens and heads of an exchange are put in place: by Triton kernels, or by plain tensor operations.

On CUDA (and ROCm) tensors the operators ``torch.ops.fxsp_kernels.*`` move them (:mod:`fxsp.kernels.triton_ops`), if
Triton is installed; elsewhere, and for dtypes that no model computes with, plain operations do the same
(:mod:`fxsp.kernels.exchange`), which Inductor fuses.  To import this module takes neither Triton nor a GPU.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

__all__ = ["kernels"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

#: For tests: kernels for tensors of the CPU too, where Triton's interpreter runs them.
_INTERPRETED = False


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def kernels(x: Tensor) -> Any:
    """The operators that move tensors like ``x``, or None: plain operations are to do it."""
    if x.dtype not in _DTYPES or not (x.device.type == "cuda" or _INTERPRETED) or not _installed():
        return None
    importlib.import_module("fxsp.kernels.triton_ops")
    return torch.ops.fxsp_kernels
