"""Modules with attentions of another kind, or with something else around one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unplanned_base import HEADS, MODULES, WIDTH, Base, Block, Built, heads, made, merged


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
