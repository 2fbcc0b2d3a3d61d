"""The graph after every stage of the compiler, on a model small enough to read.

    torchrun --nproc-per-node 2 examples/stages.py            (make stages)

A block with attention and an MLP is split over the ranks by a plan of two entries.
"""

from __future__ import annotations

import contextlib
import io
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fxsp
from fxsp.passes.pipeline import STAGES


class Block(nn.Module):
    """Self-attention and an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, S, C]`` to ``[B, S, C]``."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Model(nn.Module):
    """One block, its tokens split; seven tokens, so that the last rank holds a pad."""

    _sp_plan: ClassVar = {
        "block": {"x": fxsp.SequenceParallelInput(split_dim=1, auto_pad=True)},
        "head": fxsp.SequenceParallelOutput(gather_dim=1),
    }

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(width=16, heads=2)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, S, 16]`` to ``[B, S, 3]``."""
        return self.head(self.block(x))


def main() -> None:
    """Compile; print each stage on rank 0."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        model, x = Model().eval(), torch.randn(1, 7, 16)
        fast = torch.compile(model, backend="sp", options={"inner": "aot_eager", "print": STAGES})
        with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
            torch.testing.assert_close(fast(x), model(x))
        if dist.get_rank() == 0:
            report = fxsp.reports()[-1]
            before = ""
            for stage, text in report.stages.items():
                print(f"== {stage} {'=' * (100 - len(stage))}\n{text if text != before else 'as before'}\n")
                before = text
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
