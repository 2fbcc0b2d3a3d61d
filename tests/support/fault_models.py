"""A model that a rank can fail in, at places that have a name; and the plan that splits it."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from fxsp import SequenceParallelInput
from small import Attention

__all__ = ["PLAN", "Model", "Result", "compiled", "failing_at"]

Result = tuple[list[Tensor], list[Tensor]]

#: Where :func:`trip` raises on this rank; empty: nowhere.
_armed = ""


@torch.library.custom_op("fxsp_faults::trip", mutates_args=())
def trip(x: Tensor, place: str) -> Tensor:
    """A copy; or an error, where a test wants one."""
    if place == _armed:
        raise ValueError(f"out of something, {place}")
    return x.clone()


@trip.register_fake
def _(x: Tensor, place: str) -> Tensor:
    return torch.empty_like(x)


def _trip_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return trip(grad, f"{ctx.place} in the backward pass"), None


trip.register_autograd(_trip_backward, setup_context=lambda ctx, inputs, output: setattr(ctx, "place", inputs[1]))


@contextlib.contextmanager
def failing_at(place: str) -> Any:
    """The operator raises at ``place``, on this rank."""
    global _armed  # noqa: PLW0603
    _armed = place
    try:
        yield
    finally:
        _armed = ""


class Model(nn.Module):
    """Two attentions (four all-to-alls), and places before, between and after them at which a rank may fail."""

    def __init__(self, tripping: bool = False) -> None:
        super().__init__()
        self.first, self.second = Attention(), Attention()
        self.tripping = tripping

    def _place(self, x: Tensor, place: str) -> Tensor:
        return trip(x, place) if self.tripping else x

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self._place(x, "before"))
        return self._place(self.second(self._place(x, "between")), "after")


#: The inputs of the attentions are split: an operator of ours before them is whole.
PLAN = {name: {"hidden": SequenceParallelInput(1)} for name in ("first", "second")}


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="sp", options={"plan": PLAN, "inner": "aot_eager", **options})
