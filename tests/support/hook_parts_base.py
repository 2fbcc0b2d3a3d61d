"""What a small model for the tests of hooks is made of, and how it is registered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxsp import SequenceParallelInput, SequenceParallelOutput, SequenceParallelPartialInput

__all__ = [
    "PARTS",
    "Attend",
    "Block",
    "Body",
    "D",
    "Deep",
    "In",
    "Out",
    "Part",
    "Partial",
    "calls",
    "part",
    "sdpa",
    "x",
]

In, Out, Partial = SequenceParallelInput, SequenceParallelOutput, SequenceParallelPartialInput
D = 8


@dataclass
class Part:
    """A model, its plan, and calls ``(args, kwargs)``; every call is compared, values and gradients."""

    model: nn.Module
    plan: Any
    calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
    #: Modules -> the segments of their first argument in the first call: ``n`` tokens that are whole, ``-n`` split.
    tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)


PARTS: dict[str, Callable[[], Part]] = {}


def part(build: Callable[[], Part]) -> Callable[[], Part]:
    PARTS[build.__name__] = build
    return build


def x(tokens: int, batch: int = 2, width: int = D, seed: int = 0) -> Tensor:
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(seed + tokens))


def calls(*values: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    return [value if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], dict) else ((value,), {})
            for value in values]  # fmt: skip


def sdpa(q: Tensor, k: Tensor, v: Tensor, heads: int, shared: int | None = None, **options: Any) -> Tensor:
    """``[B, S, heads * d]`` each -> the same."""
    shared = shared or heads
    q, k, v = (t.unflatten(-1, (h, -1)).transpose(1, 2) for t, h in ((q, heads), (k, shared), (v, shared)))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=shared != heads, **options).transpose(1, 2).flatten(2)


class Attend(nn.Module):
    """Self- or cross-attention; ``shared`` heads of keys and values."""

    def __init__(self, heads: int = 4, shared: int | None = None, width: int = D) -> None:
        super().__init__()
        self.heads, self.shared = heads, shared or heads
        kv = width // heads * self.shared
        self.q, self.k, self.v, self.o = (nn.Linear(width, n) for n in (width, kv, kv, width))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, causal: bool = False):
        y = x if context is None else context
        out = sdpa(self.q(x), self.k(y), self.v(y), self.heads, self.shared, attn_mask=mask, is_causal=causal)
        return x + self.o(out)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.ff = Attend(), nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, D))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ff(self.attn(x))


class Body(nn.Module):
    def __init__(self, n: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(n)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = Body(), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x))
