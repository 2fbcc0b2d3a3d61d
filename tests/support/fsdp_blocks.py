"""A stack of attention blocks, each wrapped or compiled for itself, on real ranks beside the stack on one process."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import fxsp
from running import collectives, error_of, gradient_error

__all__ = ["run_blocks"]

BLOCKS = 3


class Block(nn.Module):
    """Six heads of 4: they divide by two ranks and by three.  What it returns is ``form``."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.qkv, self.out, self.form = nn.Linear(24, 72), nn.Linear(24, 24), form

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self._run, x, use_reentrant=False) if self.form == "checkpoint" else self._run(x)

    def _run(self, x: Tensor) -> Any:
        q, k, v = self.qkv(x).unflatten(-1, (3, 6, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        y = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return {"tuple": (y.mean(), y), "view": y.view(y.shape)}.get(self.form, y)


class Net(nn.Module):
    def __init__(self, form: str, proj: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(24, 24) if proj else None
        self.blocks, self.form = nn.ModuleList([Block(form) for _ in range(BLOCKS)]), form

    def forward(self, x: Tensor) -> Tensor:
        if self.proj is not None:
            x = self.proj(x)
        for block in self.blocks:
            y = block(x)
            x = y[1] if isinstance(y, tuple) else y
            x = x.view_as(x) if self.form == "view" else x
        return x


def _passes(module: nn.Module, grads: Any, outputs: Any) -> None:
    """A hook that changes nothing."""


def _compiled(model: Net, form: str, size: int) -> Any:
    options = {"plan": {"": {"x": fxsp.SequenceParallelInput(1)}}, "inner": "aot_eager"}
    if form == "regional":
        for block in model.blocks:
            block.compile(backend="sp", options=options)
        return model
    if form == "regional fsdp":
        mesh = init_device_mesh("cpu", (size,))
        for part in [*model.blocks, model]:
            fully_shard(part, mesh=mesh)
        for block in model.blocks:
            block.compile(backend="sp", options={"inner": "aot_eager"})
        return model
    if form == "backward hooks":
        for block in model.blocks:
            block.register_full_backward_hook(_passes)
    mesh = init_device_mesh("cpu", (size,))
    for part in [*model.blocks, model]:
        fully_shard(part, mesh=mesh)
    return torch.compile(model, backend="sp", options=options)


def run_blocks(
    rank: int, size: int, form: str, batch: int, tokens: int, proj: bool, training: bool
) -> tuple[dict[str, float], Counter[str]]:
    """Relative errors of the output and of gradients, and the collectives of a forward pass that compiled nothing."""
    torch.manual_seed(0)
    model = Net(form, proj)
    whole, x = copy.deepcopy(model), torch.randn(batch, tokens, 24)
    run = _compiled(model, form, size)
    with warnings.catch_warnings(), torch.set_grad_enabled(training):
        warnings.simplefilter("ignore")
        for _ in range(2):  # from the second call on, blocks by themselves exchange split values
            run(x)
        with collectives() as ran:
            found = run(x)
        wanted = whole(x)
        errors = {"output": error_of(found, wanted)}
        if training:
            for y in (found, wanted):
                (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
            usual = max(p.grad.norm().item() for p in whole.parameters() if p.grad is not None)
            for (name, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
                own: Any = p.grad
                own = own.full_tensor() if isinstance(own, DTensor) else own
                assert own is not None
                assert q.grad is not None
                errors[name] = gradient_error(own, q.grad, usual)
    dist.barrier()
    return errors, ran
