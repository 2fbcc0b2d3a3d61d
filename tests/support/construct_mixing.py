"""Operators that mix tokens: each alone in a small module, many modules in one model: one compile tests many.

A *mixer* is a function ``f(x, w)`` of tokens ``x [2, S, DIM]`` and a parameter ``w [DIM, DIM]`` of its own.  What is in
:data:`SPLIT` runs on split tokens without an implicit gather; all others gather, and say so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from constructs import CONSTRUCTS, DIM, ROOT_PLAN, TOKENS, Construct, Wrap, tokens

__all__ = ["GROUPS", "SPLIT", "Mix", "Zoo", "mixer", "mixer_names", "register_groups"]

Mix = Callable[[Tensor, Tensor], Any]

#: Mixers by group; a group is one model, and one compile.
GROUPS: dict[str, dict[str, Mix]] = {}
#: Mixers that need no implicit gather.
SPLIT: set[str] = set()


def mixer(group: str, *, split: bool = False) -> Callable[[Mix], Mix]:
    """Register a mixer under its own name; ``split`` says that it runs on split tokens."""

    def register(mix: Mix) -> Mix:
        GROUPS.setdefault(group, {})[mix.__name__] = mix
        if split:
            SPLIT.add(mix.__name__)
        return mix

    return register


class Mixer(nn.Module):
    def __init__(self, mix: Mix) -> None:
        super().__init__()
        self.before = nn.Linear(DIM, DIM)
        self.w = nn.Parameter(0.3 * torch.randn(DIM, DIM))
        self.mix = mix

    def forward(self, x: Tensor) -> Any:
        return self.mix(self.before(x), self.w)


class Zoo(nn.Module):
    def __init__(self, mixers: dict[str, Mix]) -> None:
        super().__init__()
        self.mixers = nn.ModuleDict({name: Mixer(mix) for name, mix in mixers.items()})

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {name: mixer(x) for name, mixer in self.mixers.items()}


def mixer_names() -> list[tuple[str, str]]:
    """All ``(group, mixer)``."""
    return [(group, name) for group, mixers in GROUPS.items() for name in mixers]


def _zoo(mixers: dict[str, Mix]) -> Callable[[Wrap], tuple[Callable[..., Any], nn.Module]]:
    def build(wrap: Wrap) -> tuple[Callable[..., Any], nn.Module]:
        model = Zoo(mixers)
        return wrap(model), model

    return build


def register_groups() -> None:
    """Make each group one construct."""
    for group, mixers in GROUPS.items():
        CONSTRUCTS[f"mixing: {group}"] = Construct(f"mixing: {group}", _zoo(mixers), tokens, ROOT_PLAN)


# --- neighbours -------------------------------------------------------------------------------------------------------


@mixer("neighbours")
def conv(x: Tensor, w: Tensor) -> Tensor:
    return F.conv1d(x.transpose(1, 2), w[:, :, None].expand(-1, -1, 3), padding=1).transpose(1, 2)


@mixer("neighbours")
def causal_conv(x: Tensor, w: Tensor) -> Tensor:
    padded = F.pad(x.transpose(1, 2), (2, 0))
    return F.conv1d(padded, w[:, :1, None].expand(-1, -1, 3), groups=DIM).transpose(1, 2)


@mixer("neighbours")
def average_pool(x: Tensor, w: Tensor) -> Tensor:
    return F.avg_pool1d(x.transpose(1, 2), 3, stride=2) * w[0, 0]


@mixer("neighbours")
def max_pool(x: Tensor, w: Tensor) -> Tensor:
    return F.max_pool1d((x @ w).transpose(1, 2), 2)


@mixer("neighbours")
def interpolated(x: Tensor, w: Tensor) -> Tensor:
    return F.interpolate((x @ w).transpose(1, 2), scale_factor=2, mode="nearest")


@mixer("neighbours")
def shifted(x: Tensor, w: Tensor) -> Tensor:
    return torch.cat([x[:, :1] * 0, x[:, :-1]], dim=1) @ w + x


@mixer("neighbours")
def unfolded(x: Tensor, w: Tensor) -> Tensor:
    return x.unfold(1, 3, 2).sum(-1) @ w


# --- all tokens -------------------------------------------------------------------------------------------------------


@mixer("reductions", split=True)
def mean_over_tokens(x: Tensor, w: Tensor) -> Tensor:
    return x - (x @ w).mean(dim=1, keepdim=True)


@mixer("reductions", split=True)
def sum_over_tokens(x: Tensor, w: Tensor) -> Tensor:
    return (x * x.sum(1, keepdim=True)) @ w


@mixer("reductions")
def norm_over_tokens(x: Tensor, w: Tensor) -> Tensor:
    return F.layer_norm((x @ w).transpose(1, 2), (TOKENS,)).transpose(1, 2) * x


@mixer("reductions")
def softmax_over_tokens(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w).softmax(dim=1) * x


@mixer("reductions")
def variance(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w) / x.var(dim=1, keepdim=True)


@mixer("reductions", split=True)
def largest(x: Tensor, w: Tensor) -> Tensor:
    return x @ w - x.amax(dim=1, keepdim=True)


@mixer("statistics", split=True)
def vector_norm(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w) / x.norm(dim=1, keepdim=True)


@mixer("statistics", split=True)
def logsumexp(x: Tensor, w: Tensor) -> Tensor:
    return x @ w - x.logsumexp(1, keepdim=True)


@mixer("statistics", split=True)
def argmax(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w) * x.argmax(dim=1, keepdim=True)


@mixer("statistics", split=True)
def any_token(x: Tensor, w: Tensor) -> Tensor:
    return torch.where((x > 1.5).any(dim=1, keepdim=True), x @ w, x)


@mixer("statistics")
def batch_norm(x: Tensor, w: Tensor) -> Tensor:
    return F.batch_norm((x @ w).transpose(1, 2), None, None, training=True).transpose(1, 2) * x


@mixer("statistics")
def group_norm(x: Tensor, w: Tensor) -> Tensor:
    return F.group_norm((x @ w).transpose(1, 2), 2).transpose(1, 2) * x


# --- order ------------------------------------------------------------------------------------------------------------


@mixer("order")
def cumsum(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w).cumsum(dim=1)


@mixer("order")
def cumprod(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w).sigmoid().cumprod(dim=1)


@mixer("order")
def rolled(x: Tensor, w: Tensor) -> Tensor:
    return x.roll(2, dims=1) @ w


@mixer("order")
def flipped(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w).flip(1) + x


@mixer("order")
def sorted_tokens(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w).sort(dim=1).values


@mixer("order")
def best_tokens(x: Tensor, w: Tensor) -> Tensor:
    values, places = (x @ w).topk(3, dim=1)
    return values * places


@mixer("order")
def kth(x: Tensor, w: Tensor) -> Tensor:
    return x @ w - x.kthvalue(3, dim=1, keepdim=True).values


@mixer("order")
def viewed_after_flip(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w).flip(1).view(2, -1)


# --- indices ----------------------------------------------------------------------------------------------------------


def _places() -> Tensor:
    return torch.tensor([3, 0, 7, 7, 10])


@mixer("indices")
def index(x: Tensor, w: Tensor) -> Tensor:
    return x[:, _places()] @ w


@mixer("indices")
def index_select(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w).index_select(1, _places())


@mixer("indices")
def gather_tokens(x: Tensor, w: Tensor) -> Tensor:
    places = (x.detach()[:, :, :1] * 100).long().abs() % TOKENS
    return (x @ w).gather(1, places.expand(-1, -1, DIM))


@mixer("indices")
def scatter_tokens(x: Tensor, w: Tensor) -> Tensor:
    places = (x.detach()[:, :, :1] * 100).long().abs() % 4
    return torch.zeros(2, 4, DIM).scatter_add(1, places.expand(-1, -1, DIM), x @ w)


@mixer("indices")
def index_put(x: Tensor, w: Tensor) -> Tensor:
    y = x @ w
    y[:, torch.tensor([1, 5])] = x[:, :2]
    return y


@mixer("indices", split=True)
def masked_fill(x: Tensor, w: Tensor) -> Tensor:
    return x.masked_fill(torch.arange(TOKENS)[None, :, None] % 3 == 0, 0.0) @ w


@mixer("indices")
def index_add(x: Tensor, w: Tensor) -> Tensor:
    return torch.zeros(2, TOKENS, DIM).index_add(1, _places(), (x @ w)[:, :5]) + x


@mixer("indices", split=True)
def one_token(x: Tensor, w: Tensor) -> Tensor:
    return x[:, 0] @ w


@mixer("indices", split=True)
def last_token(x: Tensor, w: Tensor) -> Tensor:
    return x[:, -1:] @ w


@mixer("indices")
def every_second(x: Tensor, w: Tensor) -> Tensor:
    return x[:, ::2] @ w


# --- writes -----------------------------------------------------------------------------------------------------------


@mixer("writes")
def slice_written(x: Tensor, w: Tensor) -> Tensor:
    y = x @ w
    y[:, 2:5] = y[:, 2:5] * 3
    return y


@mixer("writes")
def slice_added(x: Tensor, w: Tensor) -> Tensor:
    y = x @ w
    y[:, :4] += x[:, 1:5]
    return y


@mixer("writes", split=True)
def channels_written(x: Tensor, w: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y[..., ::2] = (x @ w)[..., ::2]
    y[..., 1::2] = x[..., 1::2]
    return y


@mixer("writes", split=True)
def in_place_chain(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w).add_(x).mul_(2).neg_()


@mixer("writes", split=True)
def filled(x: Tensor, w: Tensor) -> Tensor:
    y = x @ w
    y[..., 0].fill_(1.0)
    return y


@mixer("writes", split=True)
def copied(x: Tensor, w: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out.copy_(x @ w)
    return out


@mixer("writes")
def written_through_a_view(x: Tensor, w: Tensor) -> Tensor:
    y = x @ w
    y.view(2, -1)[:, 3:9].zero_()
    return y
