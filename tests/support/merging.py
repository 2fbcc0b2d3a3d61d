"""The gradients of two merged attentions, written down: the reference of the kernel for them."""

from __future__ import annotations

from torch import Tensor

from fxsp.kernels.attention.merge import _seen, _shares

__all__ = ["merge_backward_eager"]


def merge_backward_eager(
    grad: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``out``, ``lse``, ``other``, ``other_lse``, written down."""
    a, b, _ = _shares(lse, other_lse)
    x, y, g = _seen(out, lse, lse.dtype), _seen(other, other_lse, lse.dtype), grad.to(lse.dtype)
    # x - out' is b (x - y), y - out' is a (y - x): no difference of nearly equal sums.
    both = (g * (x - y)).sum(-1)
    dx, dy = (g * a.unsqueeze(-1)).to(out.dtype), (g * b.unsqueeze(-1)).to(other.dtype)
    return dx, a * (grad_lse + b * both), dy, b * (grad_lse - a * both)
