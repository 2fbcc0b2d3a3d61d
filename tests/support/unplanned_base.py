"""Blocks, and how a module that nobody has written a plan for is registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["HEADS", "MODULES", "WIDTH", "Base", "Block", "Built", "heads", "made", "merged"]

Built = tuple[nn.Module, dict[str, Any]]
WIDTH, HEADS = 16, 4
MODULES: dict[str, Callable[[], Built]] = {}


def made(**shapes: tuple[int, ...]) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register a module class; its inputs are normal tensors of these shapes."""

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        def build() -> Built:
            torch.manual_seed(0)
            module = cls().eval()
            return module, {name: torch.randn(shape) for name, shape in shapes.items()}

        MODULES[cls.__name__] = build
        return cls

    return register


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(-3, -2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(-3, -2).flatten(-2)


class Attention(nn.Module):
    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.causal = causal

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        k, v = self.kv(x if context is None else context).chunk(2, dim=-1)
        y = F.scaled_dot_product_attention(heads(self.q(x)), heads(k), heads(v), mask, is_causal=self.causal)
        return self.out(merged(y))


class Block(nn.Module):
    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.attention = Attention(causal)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norms[0](x), context, mask)
        return x + self.mlp(self.norms[1](x))


class Base(nn.Module):
    """Two blocks, and linear layers around them."""

    causal = False

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(self.causal) for _ in range(2))
