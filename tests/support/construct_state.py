"""Constructs that write to inputs and buffers, alias, have unusual strides, or draw random numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from constructs import DIM, ROOT_PLAN, TOKENS, Block, Root, Wrap, construct, hooked, tokens

Built = tuple[Callable[..., Any], nn.Module]

# --- mutation and aliasing --------------------------------------------------------------------------------------------


def _state_and_tokens() -> tuple[Tensor, ...]:
    return (*tokens(), torch.ones(2, TOKENS, DIM))


class WritesInput(Root):
    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        y = self.block(self.first(x))
        state.add_(y.detach())
        return self.last(y) + state


@construct(inputs=_state_and_tokens, calls=2)
def mutated_input(wrap: Wrap) -> Built:
    model = WritesInput()
    return wrap(model), model


class Counts(Block):
    """A step counter and a running mean over tokens, as BatchNorm keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(DIM))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        with torch.no_grad():
            self.mean.lerp_(x.mean(dim=(0, 1)), 0.1)
        return super().forward(x - self.mean)


@construct(calls=2)
def buffers(wrap: Wrap) -> Built:
    model = Root(Counts())
    return wrap(model), model


class Aliases(Root):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.block(x)
        return y, y.transpose(1, 2), y[:, 2:5], x, x.view(-1), self.last(y)


@construct()
def aliased_outputs(wrap: Wrap) -> Built:
    model = Aliases()
    return wrap(model), model


def _strided() -> tuple[Tensor, ...]:
    wide = torch.randn(DIM, 2, 2 * TOKENS, generator=torch.Generator().manual_seed(1))
    return (wide.permute(1, 2, 0)[:, ::2].requires_grad_(),)


@construct(inputs=_strided)
def strided_input(wrap: Wrap) -> Built:
    model = Root()
    return wrap(model), model


def _expanded() -> tuple[Tensor, ...]:
    return (torch.randn(1, TOKENS, DIM, generator=torch.Generator().manual_seed(1)).expand(2, -1, -1),)


@construct(inputs=_expanded)
def expanded_input(wrap: Wrap) -> Built:
    model = Root()
    return wrap(model), model


def _expanded_tokens() -> tuple[Tensor, ...]:
    return (torch.randn(2, 1, DIM, generator=torch.Generator().manual_seed(1)).expand(-1, TOKENS, -1),)


@construct(inputs=_expanded_tokens, plan=ROOT_PLAN)
def expanded_over_tokens(wrap: Wrap) -> Built:
    model = Root()
    return wrap(model), model


def _twice() -> tuple[Tensor, ...]:
    (x,) = tokens()
    return x, x


class Two(Root):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.last(self.block(self.first(x))) + y


@construct(inputs=_twice)
def one_tensor_twice(wrap: Wrap) -> Built:
    model = Two()
    return wrap(model), model


def _overlapping() -> tuple[Tensor, ...]:
    base = torch.randn(2, TOKENS + 2, DIM, generator=torch.Generator().manual_seed(1))
    return base[:, 2:], base[:, :-2]


@construct(inputs=_overlapping)
def overlapping_inputs(wrap: Wrap) -> Built:
    model = Two()
    return wrap(model), model


class WritesOverlapping(Root):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        y.mul_(2)
        return self.last(self.block(self.first(x))) + y


@construct(inputs=_overlapping)
def overlapping_inputs_written(wrap: Wrap) -> Built:
    model = WritesOverlapping()
    return wrap(model), model


def _halve(y: Tensor) -> Tensor:
    y = y * 1
    y.detach().mul_(0.5)
    return y


@construct()
def write_through_detach(wrap: Wrap) -> Built:
    """Its values are halved, its gradients are not."""
    return hooked(_halve)(wrap)


# --- dropout ----------------------------------------------------------------------------------------------------------


@construct()
def dropout(wrap: Wrap) -> Built:
    model = Root(Block(nn.Dropout(0.4)))
    return wrap(model), model


@construct()
def dropout_zero(wrap: Wrap) -> Built:
    model = Root(Block(nn.Dropout(0.0)))
    return wrap(model), model


@construct()
def dropout_eval(wrap: Wrap) -> Built:
    model = Root(Block(nn.Dropout(0.4))).eval()
    return wrap(model), model


@construct()
def random_noise(wrap: Wrap) -> Built:
    return hooked(lambda y: y + torch.randn_like(y) * torch.rand(y.shape[1], 1))(wrap)
