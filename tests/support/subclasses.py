"""Small tensor subclasses for weights: each has 8-bit numbers and a scale for each row, and differs in how it acts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

__all__ = ["KINDS", "Block", "Calling", "Dispatching", "Dynamic", "Straight", "quantize"]

aten = torch.ops.aten


class Dispatching(Tensor):
    """``__torch_dispatch__`` alone: any operator gets the numbers that it stands for."""

    q: Tensor
    s: Tensor

    @staticmethod
    def __new__(cls, q: Tensor, s: Tensor, dtype: torch.dtype) -> Any:
        return Tensor._make_wrapper_subclass(cls, q.shape, strides=q.stride(), dtype=dtype, device=q.device)

    def __init__(self, q: Tensor, s: Tensor, dtype: torch.dtype) -> None:
        self.q, self.s = q, s

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["q", "s"], self.dtype

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], dtype: Any, size: Any, stride: Any) -> Any:
        return cls(inner["q"], inner["s"], dtype)

    def __repr__(self, **_: Any) -> str:
        return f"{type(self).__name__}({tuple(self.shape)})"

    def numbers(self) -> Tensor:
        return self.q.to(self.dtype) * self.s

    @classmethod
    def of(cls, w: Tensor) -> Any:
        s = w.abs().amax(1, keepdim=True) / 127
        return cls((w / s).round().to(torch.int8), s, w.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten.detach.default, aten.alias.default, aten.clone.default):
            return cls(func(args[0].q), func(args[0].s), args[0].dtype)
        args, kwargs = tree_map_only(cls, cls.numbers, (args, kwargs or {}))
        return func(*args, **kwargs)


class Dynamic(Dispatching):
    """``__torch_dispatch__``; activations are rounded by one scale, the largest of all tokens."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.t.default:
            return cls(args[0].q.t(), args[0].s.t(), args[0].dtype)
        if func in (aten.mm.default, aten.addmm.default) and isinstance(args[-1], cls):
            *bias, x, w = args
            scale = x.abs().max() / 127
            return super().__torch_dispatch__(func, types, (*bias, (x / scale).round() * scale, w), kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)


class Calling(Dispatching):
    """``__torch_function__``: ``linear`` is written out above autograd, the activations rounded row by row."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            x, w, bias = args
            with torch.no_grad():
                scale = x.abs().amax(-1, keepdim=True) / 127
            rounded = (x / scale).round().clamp(-127, 127)
            y = (rounded @ w.q.to(w.dtype).mT) * scale * w.s.view(-1) + 0.5 * (x @ w.numbers().mT)
            return y if bias is None else y + bias
        return super().__torch_function__(func, types, args, kwargs or {})


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        return (x * 64).round() / 64 @ w.mT

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] @ ctx.saved_tensors[0], None


class Straight(Dispatching):
    """``__torch_function__`` that runs a custom ``autograd.Function`` (gradients pass straight through a rounding)."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            x, w, bias = args
            y = _Product.apply(x, w.numbers())
            return y if bias is None else y + bias
        return super().__torch_function__(func, types, args, kwargs or {})


KINDS = {kind.__name__: kind for kind in (Dispatching, Dynamic, Calling, Straight)}


def quantize(model: nn.Module, kind: type[Dispatching], *, frozen: bool = True, names: tuple[str, ...] = ()) -> None:
    """Replace the weights of linear layers (all, or those of these names)."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (not names or name in names):
            module.weight = nn.Parameter(kind.of(module.weight.detach()), requires_grad=not frozen)


class Block(nn.Module):
    """Attention and two layers, with a norm."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 64, bias=False), nn.GELU(), nn.Linear(64, width))

    def forward(self, x: Tensor) -> Tensor:  # [batch, tokens, width]
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)
