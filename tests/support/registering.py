"""A module and hooks that write down when they are called, for the tests of the registry."""

from __future__ import annotations

import torch
from torch import nn

from fxsp.hooks.base import HookRegistry, ModelHook

__all__ = ["AddOne", "Double", "Override", "Trace", "X", "hooked"]


class Double(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor, *, bias: float = 0.0) -> torch.Tensor:
        return x * self.weight + bias


class Trace(ModelHook):
    """Writes down when it is called."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def initialize_hook(self, module):
        self.log.append(f"init {self.name}")
        return module

    def pre_forward(self, module, *args, **kwargs):
        self.log.append(f"pre {self.name}")
        return args, kwargs

    def post_forward(self, module, output):
        self.log.append(f"post {self.name}")
        return output

    def reset_state(self, module):
        self.log.append(f"reset {self.name}")
        return module


class Override(Trace):
    def new_forward(self, module, *args, **kwargs):
        self.log.append(f"new {self.name}")
        return args[0] + 100


class AddOne(ModelHook):
    """Module level, so that it can be pickled."""

    def pre_forward(self, module, *args, **kwargs):
        return (args[0] + 1, *args[1:]), kwargs


X = torch.tensor([1.0, 2.0])


def hooked(*hooks: tuple[str, ModelHook]) -> tuple[Double, HookRegistry]:
    module = Double()
    registry = HookRegistry.get_or_create(module)
    for name, hook in hooks:
        registry.register_hook(name, hook)
    return module, registry
