"""Bring your own model: from a wrong plan, by its error and its report, to a good one.

    python examples/bring_your_own_model.py

One process, no group, no GPU.  The model is a small transformer of our own with a convolution over tokens in its stem.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fxsp


class Stem(nn.Module):
    """Mixes neighbouring tokens: a depthwise convolution needs all of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.mix = nn.Conv1d(width, width, 3, padding=1, groups=width)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B, S, C]`` to ``[B, S, C]``."""
        return self.mix(self.embed(tokens).transpose(1, 2)).transpose(1, 2)


class Block(nn.Module):
    """Attention and an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: Tensor) -> Tensor:
        """``[B, S, C]`` to ``[B, S, C]``."""
        q, k, v = self.qkv(hidden).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        hidden = hidden + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return hidden + self.mlp(hidden)


class Model(nn.Module):
    """A stem, and blocks."""

    def __init__(self, width: int = 32, heads: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.stem = Stem(width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.head = nn.Linear(width, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B, S, C]`` to ``[B, S, 4]``."""
        hidden = self.stem(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


def step(title: str) -> None:
    """A heading."""
    print(f"\n== {title} {'=' * max(0, 96 - len(title))}")


def main() -> None:
    """Three plans."""
    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(2, 50, 32)
    split = fxsp.SequenceParallelInput(split_dim=1)
    with torch.no_grad():
        step("1. A plan with a wrong name is an error that knows the right one")
        try:
            fxsp.explain(model, x, world_size=4, plan={"": {"x": split}})
        except fxsp.PlanError as error:
            print(error)

        step("2. A plan that is right, and slow: the convolution needs all tokens")
        report = fxsp.explain(model, x, world_size=4, plan={"": {"tokens": split}})
        print(report)
        gather = report.implicit_gathers[0]
        print(f"\nwhy? report.explain({gather.module!r}):\n{report.explain(gather.module)}")

        step("3. The stem is small: let it run whole, and split what the blocks get")
        good = {"blocks.0": {"hidden": split}}
        report = fxsp.explain(model, x, world_size=4, plan=good)
        print(report)
        assert not report.implicit_gathers

        step("4. Is it the same model?  Simulated ranks say so")
        evidence = fxsp.verify(model, x, world_size=(2, 3, 8), options={"plan": good})
        print(evidence)
        assert evidence.ok


if __name__ == "__main__":
    main()
