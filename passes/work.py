"""Which operators are worth running on shards for their own sake: those that multiply matrices, or attend."""

from __future__ import annotations

import torch
from torch.fx import Node

from fxsp.passes.attention.operators import ATTENTION_OPS

__all__ = ["has_work"]

_PRODUCTS = "linear matmul mm bmm addmm baddbmm einsum conv1d conv2d conv3d"
_WORK = frozenset(f"aten::{name}" for name in _PRODUCTS.split())


def has_work(node: Node) -> bool:
    """Whether a call does so much per element that running it on every rank costs more than gathering its result."""
    if node.target in ATTENTION_OPS:
        return True
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name in _WORK
