"""Constructs of the language: checkpointing, autocast, graph breaks, functions that are not opened."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from constructs import DIM, Block, Root, Wrap, construct, hooked, tokens

Built = tuple[Callable[..., Any], nn.Module]

# --- activation checkpointing -----------------------------------------------------------------------------------------


class Checkpointed(Root):
    """The block, or only its attention, inside ``torch.utils.checkpoint``."""

    def __init__(self, inside: bool = False, **settings: Any) -> None:
        super().__init__()
        self.inside = inside
        self.settings = settings
        if inside:
            attention = self.block.attention
            self.block.attention.forward = functools.partial(checkpoint, type(attention).forward, attention, **settings)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.block(x) if self.inside else checkpoint(self.block, x, **self.settings))


@construct()
def checkpoint_new(wrap: Wrap) -> Built:
    model = Checkpointed(use_reentrant=False)
    return wrap(model), model


@construct()
def checkpoint_reentrant(wrap: Wrap) -> Built:
    model = Checkpointed(use_reentrant=True)
    return wrap(model), model


class AttentionCheckpointed(Block):
    """A block that checkpoints its own attention."""

    def forward(self, x: Tensor) -> Tensor:
        return x + checkpoint(self.attention, self.norm(x), use_reentrant=False)


@construct()
def checkpoint_inside_block(wrap: Wrap) -> Built:
    model = Root(AttentionCheckpointed())
    return wrap(model), model


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    saved = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.PREFER_RECOMPUTE


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)


@construct()
def checkpoint_selective(wrap: Wrap) -> Built:
    model = Checkpointed(use_reentrant=False, context_fn=_contexts)
    return wrap(model), model


# --- modes ------------------------------------------------------------------------------------------------------------


@construct()
def autocast_region(wrap: Wrap) -> Built:
    linear = nn.Linear(DIM, DIM)

    def hook(y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = F.linear(y, linear.weight)
        return y.float()

    return hooked(hook)(wrap)


class Autocast(Root):
    """Everything under bf16 autocast, the softmax of a gate in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = self.block(self.first(x))
            with torch.autocast("cpu", enabled=False):
                x = x.float() * x.float().softmax(-1)
            return self.last(x)


@construct()
def autocast_whole(wrap: Wrap) -> Built:
    model = Autocast()
    return wrap(model), model


@construct()
def no_grad_region(wrap: Wrap) -> Built:
    def hook(y: Tensor) -> Tensor:
        with torch.no_grad():
            scale = y.pow(2).mean(dim=1, keepdim=True).rsqrt()
        return y * scale

    return hooked(hook)(wrap)


@construct()
def no_grad_decorator(wrap: Wrap) -> Built:
    @torch.no_grad()
    def scale(y: Tensor) -> Tensor:
        return y.abs().amax(dim=1, keepdim=True)

    return hooked(lambda y: y / scale(y))(wrap)


@construct()
def detach(wrap: Wrap) -> Built:
    return hooked(lambda y: y * y.detach().sigmoid() + y.detach().mean(dim=1, keepdim=True))(wrap)


# --- graph breaks -----------------------------------------------------------------------------------------------------


@construct()
def break_in_block(wrap: Wrap) -> Built:
    def hook(y: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return y.relu()

    return hooked(hook)(wrap)


@construct()
def print_in_block(wrap: Wrap) -> Built:
    def hook(y: Tensor) -> Tensor:
        print("a shape:", y.shape)
        return y.relu()

    return hooked(hook)(wrap)


class BreakInRoot(Root):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.last(self.block(x))


@construct()
def break_in_root(wrap: Wrap) -> Built:
    model = BreakInRoot()
    return wrap(model), model


@construct()
def data_dependent_branch(wrap: Wrap) -> Built:
    return hooked(lambda y: y.relu() if y.sum() > 0 else y.tanh())(wrap)


@construct()
def disabled_function(wrap: Wrap) -> Built:
    return hooked(torch._dynamo.disable(lambda y: y.cumsum(1)))(wrap)


# --- functions that are not opened ------------------------------------------------------------------------------------


class Scaled(torch.autograd.Function):
    """The cumulative sum, with a gradient that is not its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.cumsum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * grad * x


@construct()
def custom_function(wrap: Wrap) -> Built:
    return hooked(lambda y: Scaled.apply(y))(wrap)  # noqa: PLW0108  the call is in the traced code


@construct()
def functional_vmap(wrap: Wrap) -> Built:
    return hooked(lambda y: torch.func.vmap(lambda row: row.softmax(0) * row.sum())(y))(wrap)  # noqa: PLW0108  the call is in the traced code


@construct()
def functional_grad(wrap: Wrap) -> Built:
    return hooked(lambda y: torch.func.grad(lambda z: (z.cumsum(1) ** 2).sum())(y))(wrap)  # noqa: PLW0108  the call is in the traced code


@construct()
def functional_jvp(wrap: Wrap) -> Built:
    return hooked(lambda y: torch.func.jvp(lambda z: z.sin().cumsum(1), (y,), (y.cos(),))[1])(wrap)


def _near(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return torch.where(q >= k, score, -float("inf"))


class Flex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)

    def forward(self, x: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        q, k, v = self.qkv(x).unflatten(-1, (3, 2, DIM // 2)).permute(2, 0, 3, 1, 4)
        return x + flex_attention(q, k, v, score_mod=_near).transpose(1, 2).flatten(2)


def _no_gradients() -> tuple[Tensor, ...]:
    return tuple(x.detach() for x in tokens())


@construct(inputs=_no_gradients, backward=False)
def flex(wrap: Wrap) -> Built:
    model = Root(Flex()).requires_grad_(False)
    return wrap(model), model


@construct(inputs=_no_gradients, backward=False)
def cond(wrap: Wrap) -> Built:
    def hook(y: Tensor) -> Tensor:
        return torch.cond(y.sum() > 0, lambda z: z.cumsum(1), lambda z: z.flip(1), (y,))

    model = Root(Block(hook)).requires_grad_(False)
    return wrap(model), model


@construct()
def cond_training(wrap: Wrap) -> Built:
    return hooked(lambda y: torch.cond(y.sum() > 0, lambda z: z.cumsum(1), lambda z: z.sin(), (y,)))(wrap)
