"""Layers that mix tokens, as mixers: attention without softmax, mixtures of experts, recurrences, losses, BatchNorm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from construct_mixing import mixer, register_groups
from constructs import CONSTRUCTS, DIM, ROOT_PLAN, TOKENS, Attention, Construct, Wrap

# --- attention of other kinds -----------------------------------------------------------------------------------------


@mixer("attention", split=True)
def linear_attention(x: Tensor, w: Tensor) -> Tensor:
    q, k, v = x.softmax(-1), (x @ w).exp(), x
    return q @ (k.transpose(1, 2) @ v)


@mixer("attention", split=True)
def linear_attention_einsum(x: Tensor, w: Tensor) -> Tensor:
    q, k = x.unflatten(-1, (2, -1)), (x @ w).unflatten(-1, (2, -1))
    return torch.einsum("bshd,bhde->bshe", q, torch.einsum("bshd,bshe->bhde", k, q)).flatten(2)


@mixer("attention")
def scores_by_hand(x: Tensor, w: Tensor) -> Tensor:
    return torch.softmax(x @ (x @ w).transpose(1, 2), dim=-1) @ x


@mixer("attention", split=True)
def experts(x: Tensor, w: Tensor) -> Tensor:
    """Every token through the weighted best two of four experts, all of them computed."""
    weights, chosen = (x @ w)[..., :4].softmax(-1).topk(2, dim=-1)
    gates = (F.one_hot(chosen, 4) * weights[..., None]).sum(-2)
    return torch.einsum("bse,bsd,edf->bsf", gates, x, w.expand(4, -1, -1) * torch.arange(1.0, 5.0)[:, None, None])


@mixer("attention")
def dispatched_experts(x: Tensor, w: Tensor) -> Tensor:
    """Tokens sorted by their expert, as an index_add puts them back."""
    flat = x.flatten(0, 1)
    chosen = (flat @ w)[:, :4].argmax(-1)
    order = chosen.argsort(stable=True)
    mixed = (flat[order] @ w) * (1 + chosen[order])[:, None]
    return torch.zeros_like(flat).index_add(0, order, mixed).view_as(x)


@mixer("attention", split=True)
def experts_by_mask(x: Tensor, w: Tensor) -> Tensor:
    chosen = (x @ w)[..., :3].argmax(-1, keepdim=True)
    out = torch.zeros_like(x)
    for expert in range(3):
        out = out + torch.where(chosen == expert, x @ (w * (expert + 1)), 0.0)
    return out


@mixer("attention", split=True)
def state_space(x: Tensor, w: Tensor) -> Tensor:
    state, out = torch.zeros(2, DIM), []
    for t in range(TOKENS):
        state = state * 0.5 + x[:, t] @ w
        out.append(state)
    return torch.stack(out, dim=1)


# --- losses -----------------------------------------------------------------------------------------------------------


def _targets() -> Tensor:
    targets = torch.arange(2 * TOKENS).view(2, TOKENS) % DIM
    targets[0, :4] = -100
    targets[1, 9:] = -100
    return targets


@mixer("losses", split=True)
def cross_entropy(x: Tensor, w: Tensor) -> Tensor:
    return F.cross_entropy((x @ w).flatten(0, 1), _targets().flatten())


@mixer("losses", split=True)
def causal_loss(x: Tensor, w: Tensor) -> Tensor:
    return F.cross_entropy((x @ w)[:, :-1].flatten(0, 1), _targets()[:, 1:].flatten())


@mixer("losses", split=True)
def causal_loss_padded(x: Tensor, w: Tensor) -> Tensor:
    """As transformers does it: the targets are shifted, the scores are not."""
    targets = F.pad(_targets(), (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy((x @ w).view(-1, DIM).float(), targets.view(-1), ignore_index=-100, reduction="mean")


@mixer("losses", split=True)
def squared_error(x: Tensor, w: Tensor) -> Tensor:
    return F.mse_loss(x @ w, x.detach().tanh())


@mixer("losses", split=True)
def unreduced_loss(x: Tensor, w: Tensor) -> Tensor:
    losses = F.cross_entropy((x @ w).transpose(1, 2), _targets(), reduction="none")
    return losses.sum() / (_targets() != -100).sum()


@mixer("losses", split=True)
def masked_mean(x: Tensor, w: Tensor) -> Tensor:
    keep = (_targets() != -100)[..., None].float()
    return ((x @ w).square() * keep).sum() / keep.sum()


# --- BatchNorm, as a module with running statistics -------------------------------------------------------------------


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(DIM, DIM)
        self.norm = nn.BatchNorm1d(DIM)
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.attention(self.norm(x.flatten(0, 1)).view_as(x))


def _normed(wrap: Wrap) -> tuple[Callable[..., Any], nn.Module]:
    model = Normed()
    return wrap(model), model


CONSTRUCTS["running_statistics"] = Construct("running_statistics", _normed, plan=ROOT_PLAN, calls=2)

register_groups()
