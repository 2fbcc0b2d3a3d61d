"""A small transformer of our own: for what surrounds the compiler, where a real model would only take longer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxsp import SequenceParallelInput

__all__ = ["SPLIT", "Attention", "Model", "inputs"]

#: The plan of :class:`Model`.
SPLIT = {"": {"x": SequenceParallelInput(1)}}


class Attention(nn.Module):
    """Self-attention with two heads of 4 on ``[batch, tokens, 8]``."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.out, self.dropout = nn.Linear(8, 24), nn.Linear(8, 8), dropout

    def forward(self, hidden: Tensor) -> Tensor:
        q, k, v = self.qkv(hidden).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind()
        p = self.dropout if self.training else 0.0
        y = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=p)
        return hidden + self.out(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """``[batch, tokens, 8]`` to ``[batch, tokens, 5]``; ``mix`` adds an operator that needs all tokens."""

    def __init__(self, mix: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Attention(dropout), Attention(dropout)])
        self.head, self.mix = nn.Linear(8, 5), mix

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x)
        if self.mix:
            x = x.cumsum(1)
        return self.head(x if scale is None else x * scale)


def inputs(tokens: int = 5, seed: int = 3) -> Tensor:
    """``[2, tokens, 8]`` random numbers, the same on every rank."""
    return torch.randn(2, tokens, 8, generator=torch.Generator().manual_seed(seed))
