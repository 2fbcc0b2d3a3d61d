"""Control flow of higher-order operators and transforms, and checkpoints."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.associative_scan import associative_scan
from torch._higher_order_ops.map import map as map_rows
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.utils.checkpoint import checkpoint

from construct_variants_base import Built, hook, model, variant
from constructs import DIM, Block, Root, Wrap
from fxsp import SequenceParallelInput, SequenceParallelOutput

# --- control flow ---------------------------------------------------------------------------------------------------


@hook(gathers="higher-order operator map_impl: not opened")
def mapped(y: Tensor) -> Tensor:
    return map_rows(lambda row: row.cumsum(0), y)


@hook(gathers="functorch transform")
def pulled_back(y: Tensor) -> Tensor:
    """What ``vjp`` returns differentiates after the transform has ended."""
    value, back = torch.func.vjp(lambda z: z.cumsum(1).sin(), y)
    return back(value * y)[0] + back(y)[0]


@hook(gathers="functorch transform")
def pulled_back_once(y: Tensor) -> Tensor:
    value, back = torch.func.vjp(lambda z: z.cumsum(1).sin(), y)
    return back(value * y)[0]


@hook(gathers="functorch transform")
def noise_in_vmap(y: Tensor) -> Tensor:
    return torch.func.vmap(lambda row: row.cumsum(0) * torch.rand(DIM), randomness="same")(y)


@hook(gathers="higher-order operator scan")
def scanned(y: Tensor) -> Tensor:
    return scan(lambda state, row: (state * 0.5 + row, state + row), y[:, 0] * 0, y, dim=1)[1]


@hook(gathers="aten.slice.Tensor needs dimension")
def scanned_in_parallel(y: Tensor) -> Tensor:
    return associative_scan(lambda a, b: a + b, y, dim=1, combine_mode="generic")


@hook(gathers="higher-order operator while_loop")
def looped(y: Tensor) -> Tensor:
    def step(i: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return i + 1, z * 0.5 + z.mean(1, keepdim=True)

    return while_loop(lambda i, z: i < 3, step, (torch.tensor(0), y))[1]


@hook(gathers="aten.as_strided.default has no sharding rule")
def windows_by_strides(y: Tensor) -> Tensor:
    """Overlapping windows of three tokens, as Longformer makes them, of a value that is transposed in memory."""
    z = y.transpose(0, 1)
    windows = z.as_strided((z.shape[0] - 2, 3, *z.shape[1:]), (z.stride(0), *z.stride()))
    return F.pad(windows.amax(1), (0, 0, 0, 0, 1, 1)).transpose(0, 1)


@hook(whole="reads memory around a value that is split")
def beyond_a_slice(y: Tensor) -> Tensor:
    z = y[:, 1:]
    return y * z.as_strided((z.shape[0], 1, z.shape[2]), z.stride()).cos()


@model(whole="no entry of the plan applies")
class BranchOfBlocks(Root):
    """The plan names a block that only a branch of ``cond`` calls."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(torch.cond(h.sum() > 0, lambda z: self.block(z), lambda z: z * 2, (h,)))  # noqa: PLW0108  the call is in the traced code


# --- checkpoints ----------------------------------------------------------------------------------------------------


class Stack(nn.Module):
    """Blocks, each in a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(F.relu), Block(torch.tanh)])
        self.last = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.last(x)


_EVERY = {"blocks.*": {"x": SequenceParallelInput(split_dim=1)}, "last": {"input": SequenceParallelInput(split_dim=1)}}
_FIRST = {"blocks.0": {"x": SequenceParallelInput(split_dim=1)}, "blocks.1": SequenceParallelOutput(gather_dim=1)}


@variant(plan=_EVERY)
def checkpoints_in_a_loop(wrap: Wrap) -> Built:
    stack = Stack()
    return wrap(stack), stack


@variant(plan=_FIRST)
def first_and_last_checkpoint(wrap: Wrap) -> Built:
    stack = Stack()
    return wrap(stack), stack


@hook()
def checkpointed_dropout(y: Tensor) -> Tensor:
    return checkpoint(lambda z: F.dropout(z, 0.3) * z.sigmoid(), y, use_reentrant=False)


@hook()
def nested_checkpoints(y: Tensor) -> Tensor:
    def inner(z: Tensor) -> Tensor:
        return z.sin().exp()

    return checkpoint(
        lambda z: checkpoint(inner, z, use_reentrant=False).mean(1, keepdim=True) + z, y, use_reentrant=False
    )


@hook(gathers="functorch transform: not opened")
def transform_in_checkpoint(y: Tensor) -> Tensor:
    return checkpoint(lambda z: torch.func.vmap(lambda row: row.softmax(0))(z) * z, y, use_reentrant=False)
