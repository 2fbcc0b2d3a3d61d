"""Which operators are worth running on shards for their own sake: those that multiply matrices, or attend."""

from __future__ import annotations

from torch.fx import Node

from fxsp.passes.attention.operators import ATTENTION_OPS
from fxsp.passes.rules.families import family

__all__ = ["has_work"]


def has_work(node: Node) -> bool:
    """Whether a call does so much per element that running it on every rank costs more than gathering its result."""
    if node.target in ATTENTION_OPS:
        return True
    return node.target in family("work")
