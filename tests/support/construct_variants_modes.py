"""Modes of autograd and autocast; buffers, attributes and views that are written and kept."""

from __future__ import annotations

import torch
from torch import Tensor

from construct_variants_base import Built, hook, model, no_gradients, variant
from constructs import DIM, TOKENS, Block, Root, Wrap

# --- modes ----------------------------------------------------------------------------------------------------------


@hook()
def nested_autocast(y: Tensor) -> Tensor:
    w = torch.ones(DIM, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        a = y.round() @ w  # small whole numbers: exact in bf16
        with torch.autocast("cpu", enabled=False):
            b = y @ w
    return a.float() + b


@hook()
def grad_in_no_grad(y: Tensor) -> Tensor:
    with torch.no_grad():
        a = y * 2
        with torch.enable_grad():
            b = y * 3
        c = b * y
    return a + b + c


@hook()
def grad_mode_by_call(y: Tensor) -> Tensor:
    torch.set_grad_enabled(False)
    z = y.mean(1, keepdim=True)
    torch.set_grad_enabled(True)
    return y * z


@hook(gradients=False)
def inference_mode_inside(y: Tensor) -> Tensor:
    with torch.inference_mode():
        return y * y.mean(1, keepdim=True)


@variant(inputs=no_gradients, backward=False)
def inference_mode_outside(wrap: Wrap) -> Built:
    root = Root()
    fast = wrap(root)

    def run(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return fast(x)

    return run, root


@model()
class BlockWithoutGrad(Root):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        with torch.no_grad():
            t = self.block(h)
        return self.last(h * t)


# --- state ----------------------------------------------------------------------------------------------------------


class Averages(Block):
    """Buffers that are written in whole, in part, and assigned."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(DIM))
        self.register_buffer("history", torch.zeros(TOKENS, DIM))
        self.register_buffer("previous", torch.zeros(2, TOKENS, DIM))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean((0, 1)))
        self.history[2:5] = x.detach()[0, 2:5]
        y = super().forward(x) + self.mean + self.history.mean(0) + self.previous
        self.previous = x.detach()
        return y


@variant(calls=2)
def averages(wrap: Wrap) -> Built:
    root = Root(Averages())
    return wrap(root), root


class Remembers(Block):
    def __init__(self) -> None:
        super().__init__()
        self.last_output: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last_output = super().forward(x)
        return self.last_output * 2


@variant()
def tensor_kept_by_a_module(wrap: Wrap) -> Built:
    root = Root(Remembers())
    fast = wrap(root)
    return lambda x: (fast(x), root.block.last_output), root


def _views_of_one() -> tuple[Tensor, ...]:
    base = torch.randn(2, TOKENS, DIM, generator=torch.Generator().manual_seed(1))
    return base, base.view(2, -1), base[:, 2:5]


@model(inputs=_views_of_one)
class AliasedInputs(Root):
    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return self.last(self.block(self.first(x))) + y.view_as(x) + z.sum()


@model(inputs=_views_of_one, calls=2, whole="shares memory that is written to in place")
class AliasedInputsWritten(Root):
    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        z.mul_(2)
        return self.last(self.block(self.first(x))) + y.view_as(x) + z.sum()


@hook(whole="writes through detach()")
def written_through_data(y: Tensor) -> Tensor:
    y = y * 1
    y.data.mul_(0.5)
    return y


@hook(gathers="higher-order operator register_hook")
def hook_of_a_tensor(y: Tensor) -> Tensor:
    y.register_hook(lambda grad: grad * 0.5)
    return y * 2
