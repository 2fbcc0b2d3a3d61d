"""One rank compiles anew, or no more, or is given something else; see :mod:`fault_scenarios`."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from fault_models import PLAN, Model, Result, compiled
from faults import Rank
from small import inputs

# --- a rank compiles anew, or no more ---------------------------------------------------------------------------------


class Scaled(Model):
    """Its graph depends on a number that Dynamo guards on."""

    scale = 1

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


def _rescaled(here: Rank, everywhere: bool = False, limit: int = 8) -> Result:
    model, x = Scaled(), inputs()
    fast = compiled(model)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=limit):
        fast(x)
        here.fault()
        if everywhere or here.rank == 1:
            model.scale = 2
        return [fast(x)], [model(x)]


def compiles_alone(here: Rank) -> Result:
    return _rescaled(here)


def limit_on_one(here: Rank) -> Result:
    return _rescaled(here, limit=1)


def limit_on_all(here: Rank) -> Result:
    return _rescaled(here, limit=1, everywhere=True)


# --- a rank is given something else -----------------------------------------------------------------------------------


def _unlike(here: Rank, model: nn.Module, x: Tensor, **options: Any) -> Result:
    fast = compiled(model, **options)
    here.fault()
    with torch.no_grad():
        return [fast(x)], [model(x)]


def length(here: Rank) -> Result:
    return _unlike(here, Model(), inputs(tokens=6 if here.rank == 1 else 5))


def batch(here: Rank) -> Result:
    return _unlike(here, Model(), inputs()[: 1 if here.rank == 1 else 2])


def dtype(here: Rank) -> Result:
    kind = torch.float64 if here.rank == 1 else torch.float32
    return _unlike(here, Model().to(kind), inputs().to(kind))


def values(here: Rank) -> Result:
    return _unlike(here, Model(), inputs(seed=here.rank))


def weights(here: Rank) -> Result:
    torch.manual_seed(here.rank)
    return _unlike(here, Model(), inputs())


class Noisy(Model):
    """Random numbers on whole values."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(1) + torch.randn(x.shape[0], x.shape[2])


def seed(here: Rank) -> Result:
    model = Noisy()
    torch.manual_seed(here.rank)
    return _unlike(here, model, inputs())


def option(here: Rank) -> Result:
    return _unlike(here, Model(), inputs(), ulysses_degree=1 if here.rank == 1 else 2)


def plan(here: Rank) -> Result:
    return _unlike(here, Model(), inputs(), plan={"first": PLAN["first"]} if here.rank == 1 else PLAN)


def version(here: Rank) -> Result:
    torch_version = "2.0.0" if here.rank == 1 else torch.__version__
    with mock.patch.object(torch, "__version__", torch_version):
        return _unlike(here, Model(), inputs())


def skips_a_call(here: Rank) -> Result:
    """One batch less on one rank: the calls that meet are given other values, of the same shape."""
    model, batches = Model(), [inputs(seed=seed) for seed in range(3)]
    fast = compiled(model, check_inputs=True)
    with torch.no_grad():
        fast(batches[0])
        here.fault()
        x = batches[2 if here.rank == 1 else 1]
        return [fast(x)], [model(x)]
