"""Small modules of structures that no library has, or has otherwise: nobody has written a plan for them.

:data:`MODULES`: name -> ``() -> (module, inputs)``, the module in eval mode.  :data:`HELD`: those that gather in their
midst, and the operator that has to be named for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["HELD", "MODULES", "Block"]

Built = tuple[nn.Module, dict[str, Any]]
WIDTH, HEADS = 16, 4
MODULES: dict[str, Callable[[], Built]] = {}
HELD = {
    "RunningMean": "aten.cumsum",
    "FourierMixing": "aten.fft_fft",
    "KeptTokens": "aten.topk",
    "Windows": "aten.reshape",
}


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


@made(x=(1, 24, WIDTH))
class LinearAttention(Base):
    def forward(self, x: Tensor) -> Tensor:
        q, (k, v) = heads(self.first(x)), (heads(t) for t in self.blocks[0].attention.kv(x).chunk(2, dim=-1))
        state = F.relu(k).transpose(-2, -1) @ v
        return self.last(merged(F.relu(q) @ state))


@made(x=(1, 24, WIDTH), text=(1, 5, WIDTH))
class ShortText(Base):
    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        text = self.first(text)
        for block in self.blocks:
            x = block(x, text)
        return self.last(x)


@made(image=(1, 24, WIDTH), text=(1, 7, WIDTH))
class Joint(Base):
    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([self.first(text), self.first(image)], dim=1)
        for block in self.blocks:
            x = block(x)
        text, image = x.split([7, 24], dim=1)
        return self.last(image), text


@made(x=(1, 24, WIDTH))
class WrittenOut(Base):
    """An attention of products and a softmax, with a bias."""

    def forward(self, x: Tensor) -> Tensor:
        q, (k, v) = heads(self.first(x)), (heads(t) for t in self.blocks[0].attention.kv(x).chunk(2, dim=-1))
        positions = torch.arange(x.shape[1])
        bias = -(positions[:, None] - positions[None, :]).abs().float()
        return self.last(merged((q @ k.transpose(-2, -1) * 0.5 + bias).softmax(-1) @ v))


@made(x=(1, 24, WIDTH))
class Rotary(Base):
    """Rotated queries and keys, and key heads for two query heads each."""

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1])[:, None] * torch.tensor([1.0, 0.1])
        cos, sin = (torch.cat([t, t], -1) for t in (angles.cos(), angles.sin()))

        def rotate(t: Tensor) -> Tensor:
            a, b = t.chunk(2, dim=-1)
            return t * cos + torch.cat([-b, a], -1) * sin

        q = rotate(heads(self.first(x)))
        k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.blocks[0].attention.kv(x)[..., :16].chunk(2, -1))
        y = F.scaled_dot_product_attention(q, rotate(k), v, is_causal=True, enable_gqa=True)
        return self.last(merged(y))


@made(x=(2, 23, WIDTH))
class ClassToken(Base):
    """A token that is learned is put before the others, and what became of it is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.first(x)], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.last(x[:, 0])


@made(x=(1, 24, WIDTH))
class AttentionPooling(Base):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](self.first(x))
        return self.last(self.blocks[1].attention(self.query, x))


@made(source=(1, 24, WIDTH), target=(1, 12, WIDTH))
class EncoderDecoder(Base):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = Block(causal=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory = self.blocks[0](self.first(source))
        return self.last(self.blocks[1](self.decoder(target), memory))


@made(x=(1, 24, WIDTH))
class LongSkips(Base):
    """What blocks returned is kept in a list, and taken from it in the other order."""

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for block in self.blocks:
            kept.append(x)
            x = block(x)
        while kept:
            x = self.last(torch.cat([x, kept.pop()], dim=-1)[..., ::2])
        return x


@made(x=(1, 24, WIDTH))
class RelativeBias(Base):
    """A bias for each distance, from a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1])
        bias = self.table(positions[None, :] - positions[:, None] + 32).permute(2, 0, 1)[None]
        return self.last(self.blocks[0](self.first(x), None, bias))


@made(x=(1, 24, WIDTH))
class ShortConvolution(Base):
    """A causal convolution over tokens before the attention."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.mix(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)
        return self.last(self.blocks[0](x))


@made(x=(2, 24, WIDTH))
class GroupedNorm(Base):
    """Statistics over tokens and some channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x).transpose(1, 2)).transpose(1, 2)
        return self.last(self.blocks[0](x))


@made(x=(1, 24, WIDTH))
class ByEinsum(Base):
    def forward(self, x: Tensor) -> Tensor:
        q = self.first(x).unflatten(-1, (HEADS, -1))
        k, v = (t.unflatten(-1, (HEADS, -1)) for t in self.blocks[0].attention.kv(x).chunk(2, dim=-1))
        weights = torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1)
        return self.last(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))


@made(x=(1, 24, WIDTH))
class FourierMixing(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + torch.fft.fft(torch.fft.fft(x, dim=-1), dim=1).real
        return self.last(F.gelu(self.first(x)))


class _LanguageModel(Base):
    causal = True

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, WIDTH)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        logits = F.linear(x, self.embedding.weight)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def _language_model() -> Built:
    torch.manual_seed(0)
    ids = torch.randint(32, (2, 24))
    return _LanguageModel().eval(), {"ids": ids, "labels": ids.clone()}


MODULES["LanguageModel"] = _language_model


@made(x=(1, 24, WIDTH))
class KeptTokens(Base):
    """Half of the tokens, those with the largest score, go through the second block."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](self.first(x))
        _, kept = x.sum(-1).topk(x.shape[1] // 2, dim=1)
        index = kept.sort(dim=1).values[..., None].expand(-1, -1, WIDTH)
        return self.last(x.scatter(1, index, self.blocks[1](x.gather(1, index))))


@made(x=(1, 24, WIDTH))
class Chunks(Base):
    """Queries come in chunks, as is done to save memory."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(torch.cat([self.blocks[0].attention(part, x) for part in x.split(8, dim=1)], dim=1))


@made(video=(1, 24, WIDTH), audio=(1, 10, WIDTH))
class VideoAndAudio(Base):
    """Two streams that attend to each other."""

    def forward(self, video: Tensor, audio: Tensor) -> dict[str, Tensor]:
        video, audio = self.blocks[0](self.first(video)), self.blocks[1](self.last(audio))
        return {"video": self.blocks[0](video, audio), "audio": self.blocks[1](audio, video)}
