"""Modules that have their tokens elsewhere, or mix them in another way than by attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unplanned_base import HEADS, WIDTH, Base, made


@made(text=(1, 10, WIDTH), image=(1, 24, WIDTH))
class TwoTowers(Base):
    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        a, b = self.blocks[0](self.first(text)).mean(1), self.blocks[1](self.last(image)).mean(1)
        return F.cosine_similarity(a, b)


@made(x=(2, 24, WIDTH))
class TokenPyramid(Base):
    """Shaped like a U: pairs of tokens are one token, and two again."""

    def forward(self, x: Tensor) -> Tensor:
        fine = self.blocks[0](self.first(x))
        coarse = self.blocks[1](fine.unflatten(1, (-1, 2)).mean(2))
        return self.last(fine + coarse.repeat_interleave(2, dim=1))


@made(x=(1, 48, WIDTH))
class Perceiver(Base):
    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, 6, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.first(x)
        latents = self.blocks[0](self.latents, tokens)
        return self.last(self.blocks[1](tokens, latents))


@made(x=(1, 24, WIDTH))
class TokenChoice(Base):
    """A mixture: each token weighs the results of its two experts."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, 4), nn.Parameter(torch.randn(4, WIDTH, WIDTH) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        weights, chosen = self.router(x).softmax(-1).topk(2, dim=-1)
        gates = torch.zeros(*x.shape[:2], 4).scatter(-1, chosen, weights)
        return x + torch.einsum("bse,bsi,eio->bso", gates, x, self.experts)


@made(x=(2, 24, WIDTH))
class Mixer(Base):
    """MLP-Mixer: over tokens, then over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.over_tokens = nn.Sequential(nn.Linear(24, 12), nn.GELU(), nn.Linear(12, 24))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.over_tokens(x.transpose(1, 2)).transpose(1, 2)
        return x + self.last(F.gelu(self.first(x)))


@made(x=(1, 8, WIDTH))
class StateLoop(Base):
    """A state that a loop of Python carries from token to token."""

    def forward(self, x: Tensor) -> Tensor:
        gates, state, found = torch.sigmoid(self.first(x)), torch.zeros(x.shape[0], WIDTH), []
        for i in range(x.shape[1]):
            state = gates[:, i] * state + x[:, i]
            found.append(state)
        return self.last(torch.stack(found, dim=1))


@made(image=(1, 3, 16, 24))
class ConvolutionFirst(Base):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.positions = nn.Parameter(torch.randn(1, 24, WIDTH))

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.last(x)


@made(x=(2, WIDTH, 24))
class TokensLast(Base):
    """Channels first, as audio has it."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(x)
        return x + self.blocks[0](x.transpose(1, 2)).transpose(1, 2)


@made(x=(2, 24, WIDTH))
class BatchAndTokensMerged(Base):
    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        flat = self.first(x.reshape(b * s, WIDTH))
        flat = self.blocks[0](flat.reshape(b, s, WIDTH)).reshape(b * s, WIDTH)
        return self.last(flat).reshape(b, s, WIDTH)


@made(x=(24, 2, WIDTH))
class TokensFirst(nn.Module):
    """``[S, B, C]``, torch's own attention module."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(WIDTH, HEADS), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.attention(x, x, x, need_weights=False)[0])


@made(x=(1, 24, WIDTH))
class PackedDocuments(Base):
    """Documents one after the other; a token sees its own."""

    def forward(self, x: Tensor) -> Tensor:
        document = torch.arange(x.shape[1]) // 7
        mask = (document[:, None] == document[None, :])[None, None]
        for block in self.blocks:
            x = block(x, None, mask)
        return x


@made(x=(2, 24, WIDTH))
class NoAttention(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.gelu(self.first(x)))


@made(x=(1, 24, WIDTH))
class RunningMean(Base):
    """Every token adds the mean of those before it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        count = torch.arange(1, x.shape[1] + 1)[:, None]
        return self.last(x + x.cumsum(1) / count)


@made(x=(1, 6, 8, WIDTH))
class Axial(Base):
    """Attention along rows, then along columns."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.blocks[0](x.flatten(0, 1)).unflatten(0, x.shape[:2])
        x = x.transpose(1, 2)
        x = self.blocks[1](x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return self.last(x.transpose(1, 2))


@made(x=(1, 8, 8, WIDTH))
class Windows(Base):
    """Attention inside of windows of 4 x 4."""

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        x = self.first(x)
        parts = x.reshape(b, h // 4, 4, w // 4, 4, c).transpose(2, 3).reshape(-1, 16, c)
        parts = self.blocks[0](parts).reshape(b, h // 4, w // 4, 4, 4, c).transpose(2, 3)
        return self.last(parts.reshape(b, h, w, c))


@made(x=(1, 4, 12, WIDTH))
class SpaceAndTime(Base):
    """A video: attention within each frame, then of each place over the frames."""

    def forward(self, x: Tensor) -> Tensor:
        b, f, s, c = x.shape
        x = self.blocks[0](self.first(x).reshape(b * f, s, c)).reshape(b, f, s, c)
        x = self.blocks[1](x.transpose(1, 2).reshape(b * s, f, c)).reshape(b, s, f, c)
        return self.last(x.transpose(1, 2))
