"""Layers, tensors and operators that are not plain ones."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from construct_variants_base import Built, hook, model, variant
from constructs import DIM, ROOT_PLAN, TOKENS, Root, Wrap
from fxsp import SequenceParallelInput, SequenceParallelOutput

# --- layers ---------------------------------------------------------------------------------------------------------


class LowRank(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(F.dropout(x, 0.0, self.training))) * 0.7


@variant()
def adapters(wrap: Wrap) -> Built:
    root = Root().requires_grad_(False)
    root.block.attention.qkv = LowRank(root.block.attention.qkv)
    root.block.attention.out = LowRank(root.block.attention.out)
    return wrap(root), root


@variant()
def spectral_norm(wrap: Wrap) -> Built:
    root = Root()
    nn.utils.parametrizations.spectral_norm(root.block.attention.out)
    return wrap(root), root


@variant()
def old_weight_norm(wrap: Wrap) -> Built:
    root = Root()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(root.block.attention.out)
    return wrap(root), root


@model(plan={"block": {"src": SequenceParallelInput(split_dim=1), 0: SequenceParallelOutput(gather_dim=1)}})
class EncoderLayer(Root):
    def __init__(self) -> None:
        super().__init__(nn.TransformerEncoderLayer(DIM, 2, 16, dropout=0.0, batch_first=True))


@model(plan=ROOT_PLAN, gathers="aten.bmm.default in attention")
class MultiheadAttention(nn.Module):
    """Once by ``scaled_dot_product_attention``, once with weights, which it spells out."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0] + self.attention(x, x, x)[0]


@model(plan=ROOT_PLAN)
class ClassTokens(Root):
    """Tokens of the model's own before those of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(1, 3, DIM))
        self.places = nn.Parameter(torch.randn(1, TOKENS + 3, DIM))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        h = torch.cat([self.tokens.expand(x.shape[0], -1, -1), x], 1) + self.places
        h = self.block(h)
        return self.last(h[:, 0]), h[:, 3:]


# --- tensors --------------------------------------------------------------------------------------------------------


@hook()
def complex_rotary(y: Tensor) -> Tensor:
    z = torch.view_as_complex(y.unflatten(-1, (-1, 2)))
    angles = torch.outer(torch.arange(y.shape[1]).float(), torch.ones(DIM // 2))
    return torch.view_as_real(z * torch.polar(torch.ones_like(angles), angles)[None]).flatten(-2)


@hook()
def scalars_in_where(y: Tensor) -> Tensor:
    return torch.where(y > 0, y, -0.5) + torch.where(y > 0, 1.0, 0.0) + torch.where(y[..., :1] < 0, 2.0, y)


@hook()
def many_dtypes(y: Tensor) -> Tensor:
    return y.half().float() + y.to(torch.bfloat16).to(y) + y.double().float() + y.long().float()


@hook(gathers="aten.fft_fft2.default")
def fourier(y: Tensor) -> Tensor:
    return torch.fft.fft2(y).real


@hook(gathers="aten.index_put.default")
def written_where_a_mask_is_true(y: Tensor) -> Tensor:
    y = y * 1
    y[y > 0.5] = 0.5
    return y


class Scaled(torch.autograd.Function):
    """Forward, context and backward apart; two inputs, two outputs, and an argument that is no tensor."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return x * y * scale, x.cumsum(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.scale = inputs[2]

    @staticmethod
    def backward(ctx: Any, a: Tensor, b: Tensor) -> Any:
        x, y = ctx.saved_tensors
        return a * y * ctx.scale + 2 * b, a * x, None


@hook(gathers="autograd_function_apply")
def function_of_two(y: Tensor) -> Tensor:
    return sum(Scaled.apply(y, y.tanh(), 0.5))


@torch.library.custom_op("fxsp_tests::reversed", mutates_args=())
def reversed_tokens(x: Tensor) -> Tensor:
    return x.flip(1).contiguous()


reversed_tokens.register_fake(torch.empty_like)
reversed_tokens.register_autograd(lambda ctx, grad: grad.flip(1))


@hook(gathers="fxsp_tests.reversed.default has no sharding rule")
def operator_of_the_user(y: Tensor) -> Tensor:
    return reversed_tokens(y)


@torch.library.custom_op("fxsp_tests::doubled_", mutates_args=("x",))
def doubled_(x: Tensor) -> None:
    x.mul_(2)


@hook(whole="writes to its arguments in a way that is not known", gradients=False)
def operator_that_writes(y: Tensor) -> Tensor:
    y = y * 1
    doubled_(y)
    return y
