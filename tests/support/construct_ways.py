"""Ways to compile, to call modules, and to return values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from constructs import ROOT_PLAN, Block, Root, Wrap, construct
from fxsp import SequenceParallelInput, SequenceParallelOutput

Built = tuple[Callable[..., Any], nn.Module]

# --- ways to compile --------------------------------------------------------------------------------------------------


@construct()
def compiled_lambda(wrap: Wrap) -> Built:
    model = Root()
    return wrap(lambda x: model(x) * 2), model


@construct()
def train_step(wrap: Wrap) -> Built:
    model = Root()

    def step(x: Tensor) -> Tensor:
        return F.mse_loss(model(x), x.detach().cos())

    return wrap(step), model


@construct()
def train_step_with_backward(wrap: Wrap) -> Built:
    model = Root()

    def step(x: Tensor) -> Tensor:
        loss = F.mse_loss(model(x), x.detach().cos())
        loss.backward()
        return model.last(x)

    return wrap(step), model


class Methods(Root):
    def predict(self, x: Tensor) -> Tensor:
        return self(x).tanh()


@construct()
def bound_method(wrap: Wrap) -> Built:
    model = Methods()
    return wrap(model.predict), model


@construct()
def compiled_forward(wrap: Wrap) -> Built:
    model = Root()
    return wrap(model.forward), model


_BLOCK_PLAN = {"": {"x": SequenceParallelInput(split_dim=1), 0: SequenceParallelOutput(gather_dim=1)}}


@construct(plan=_BLOCK_PLAN)
def compiled_submodule(wrap: Wrap) -> Built:
    model = Root()
    model.block = wrap(model.block)
    return model, model


@construct()
def compiled_in_place(wrap: Wrap) -> Built:
    model = Root()
    inside = wrap(lambda x: model(x))  # noqa: PLW0108  the call is in the traced code
    return lambda x: inside(inside(x)), model


class Many(nn.Module):
    """Several blocks in a list; the plan splits before the first and gathers after the last."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


_FIRST_LAST = {
    "blocks.0": {"x": SequenceParallelInput(split_dim=1)},
    "blocks.1": SequenceParallelOutput(gather_dim=1),
}


@construct(plan=_FIRST_LAST)
def two_instances(wrap: Wrap) -> Built:
    model = Many([Block(), Block()])
    return wrap(model), model


@construct(plan={"blocks.*": {"x": SequenceParallelInput(split_dim=1), 0: SequenceParallelOutput(gather_dim=1)}})
def one_module_twice(wrap: Wrap) -> Built:
    block = Block()
    model = Many([block, block])
    return wrap(model), model


class CalledTwice(Root):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(self.block(x).relu()))


@construct()
def called_twice(wrap: Wrap) -> Built:
    model = CalledTwice()
    return wrap(model), model


class CallsForward(Root):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block.forward(self.first(x)))


@construct()
def through_forward(wrap: Wrap) -> Built:
    model = CallsForward()
    return wrap(model), model


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.ModuleList([Block(), Block()]), nn.ModuleList([Block()])])

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return x


@construct(
    plan={
        "stages.0.0": {"x": SequenceParallelInput(split_dim=1)},
        "stages.1.0": SequenceParallelOutput(gather_dim=1),
    }
)
def nested_lists(wrap: Wrap) -> Built:
    model = Nested()
    return wrap(model), model


class ReturnsDict(Block):
    def forward(self, x: Tensor) -> dict[str, Any]:  # type: ignore[override]
        y = super().forward(x)
        return {"hidden": y, "extra": (y.mean(dim=1), [y * 2])}


class ReadsDict(Root):
    def forward(self, x: Tensor) -> dict[str, Any]:  # type: ignore[override]
        out = self.block(self.first(x))
        return {"y": self.last(out["hidden"]), "z": out["extra"]}


@construct(plan={"block": {"x": SequenceParallelInput(split_dim=1)}})
def returns_dict(wrap: Wrap) -> Built:
    model = ReadsDict(ReturnsDict())
    return wrap(model), model


@dataclass
class Out:
    hidden: Tensor
    pooled: Tensor


class ReturnsDataclass(Block):
    def forward(self, x: Tensor) -> Out:  # type: ignore[override]
        y = super().forward(x)
        return Out(y, y.sum(1))


class ReadsDataclass(Root):
    def forward(self, x: Tensor) -> Out:  # type: ignore[override]
        out = self.block(self.first(x))
        return Out(self.last(out.hidden), out.pooled)


@construct(plan={"block": {"x": SequenceParallelInput(split_dim=1)}})
def returns_dataclass(wrap: Wrap) -> Built:
    model = ReadsDataclass(ReturnsDataclass())
    return wrap(model), model


class ReturnsTuple(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y = super().forward(x)
        return y.relu(), y.tanh()


class ReadsTuple(Root):
    def forward(self, x: Tensor) -> Tensor:
        a, b = self.block(self.first(x))
        return self.last(a * b)


@construct(
    plan={
        "block": {
            "x": SequenceParallelInput(split_dim=1),
            0: SequenceParallelOutput(gather_dim=1),
            1: SequenceParallelOutput(gather_dim=1),
        }
    }
)
def returns_tuple(wrap: Wrap) -> Built:
    model = ReadsTuple(ReturnsTuple())
    return wrap(model), model


class Hooks(Root):
    """A forward pre-hook and a forward hook around the block."""

    def __init__(self) -> None:
        super().__init__()
        self.block.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        self.block.register_forward_hook(lambda module, args, result: result + 1)


@construct()
def module_hooks(wrap: Wrap) -> Built:
    model = Hooks()
    return wrap(model), model


class Tied(Root):
    """One weight in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.last.weight = self.first.weight


@construct(plan=ROOT_PLAN)
def tied_weights(wrap: Wrap) -> Built:
    model = Tied()
    return wrap(model), model


class Parametrized(Root):
    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.block.attention.out)


@construct()
def weight_norm(wrap: Wrap) -> Built:
    model = Parametrized()
    return wrap(model), model
