"""Attention under masks and with shared heads, and blocks that a checkpoint runs again."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hook_parts_base import PARTS, Attend, Block, D, In, Out, Part, calls, part, x

# --- attention --------------------------------------------------------------------------------------------------------


def _padding(n: int) -> Tensor:
    keep = torch.ones(2, 1, 1, n, dtype=torch.bool)
    keep[1, :, :, (n + 1) // 2 :] = False
    return keep


@part
def masks() -> Part:
    inputs = []
    for n in (7, 4, 1):
        bias = torch.randn(1, 4, n, n, generator=torch.Generator().manual_seed(n))
        inputs += [((x(n),), {"mask": mask}) for mask in (_padding(n), bias, bias[:, :1], bias[0, 0], bias[:, :, :1])]
    return Part(Attend(), {"": {"x": In(1)}}, inputs)


@part
def causal() -> Part:
    return Part(Attend(), {"": {"x": In(1)}}, [((x(n),), {"causal": True}) for n in (7, 4, 1, 9)])


@part
def shared_heads() -> Part:
    inputs = [
        ((x(7, width=24),), {}),
        ((x(7, width=24),), {"causal": True}),
        ((x(4, width=24),), {"mask": _padding(4)}),
    ]
    return Part(Attend(6, 3, 24), {"": {"x": In(1)}}, inputs)


@part
def one_shared_head() -> Part:
    return Part(Attend(4, 1), {"": {"x": In(1)}}, [((x(7),), {}), ((x(4),), {"causal": True})])


class Function(nn.Module):
    """Attention in a plain function, far below the root, on tensors without a dimension of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        z = F.scaled_dot_product_attention(y, y, y)
        q = y.unflatten(-1, (2, 2, -1)).permute(0, 2, 3, 1, 4)  # [B, 2, 2, S, d]
        return z + F.scaled_dot_product_attention(q, q, q, scale=0.5).permute(0, 3, 1, 2, 4).flatten(2)


@part
def attention_of_other_ranks() -> Part:
    return Part(Function(), {"": {"x": In(1)}}, calls(x(7), x(2)))


# --- checkpoints ------------------------------------------------------------------------------------------------------


class Recomputed(nn.Module):
    def __init__(self, reentrant: bool, functions: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.reentrant, self.functions = reentrant, functions

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            run = (
                (lambda y, block=block: block.ff(block.attn(y)) + y.mean(-1, keepdim=True)) if self.functions else block
            )
            x = checkpoint(run, x, use_reentrant=self.reentrant)
        return x


def _recomputed(reentrant: bool, functions: bool, inside: bool = False) -> Part:
    plan = {"blocks.*": {"x": In(1)}, "blocks.1": Out(1)} if inside else {"": {"x": In(1)}}
    if inside:
        plan = {"blocks.*.attn": {"x": In(1)}, "blocks.*.ff": Out(1)}
    return Part(Recomputed(reentrant, functions), plan, calls(x(7), x(2)))


for _reentrant in (False, True):
    for _functions, _inside in ((False, False), (True, False), (False, True)):
        _name = f"checkpoint{'_reentrant' * _reentrant}{'_functions' * _functions}{'_hooks_inside' * _inside}"
        PARTS[_name] = lambda r=_reentrant, f=_functions, i=_inside: _recomputed(r, f, i)
