"""From hooks to the compiler by one line: a model with `_sp_plan`, as vLLM-Omni has them.

    torchrun --nproc-per-node 2 examples/hooks_to_compiler.py

The model was written for one device.  Its plan splits image tokens and their rotary tables, keeps the text whole on
every rank, and gathers the output.  First hooks follow the plan, eagerly; then `torch.compile(model, backend="sp")`
follows the same plan, with the hooks still on.  Lengths that do not divide over the ranks are no special case.
"""

from __future__ import annotations

import copy
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fxsp
from fxsp import SequenceParallelInput, SequenceParallelOutput
from fxsp.hooks.sequence_parallel import enable_sequence_parallel_for_model, report_of


class Rope(nn.Module):
    """Rotary tables of the image tokens: two values, which the plan splits where they come out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", 100.0 ** -torch.linspace(0, 1, width // 2), persistent=False)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, S, C]`` to cosines and sines ``[S, d]``."""
        angles = torch.arange(hidden_states.shape[1])[:, None] * self.frequencies
        angles = angles.repeat_interleave(2, 1)
        return angles.cos(), angles.sin()


class Block(nn.Module):
    """Joint attention of text and image, and an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """``[B, S, C]`` and ``[B, T, C]`` to the same."""
        image, text = (
            self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            for x in (hidden_states, encoder_hidden_states)
        )
        q, k, v = image.unbind()
        q, k = (self.rotate(x, *rotary) for x in (q, k))
        q, k, v = (torch.cat(pair, 2) for pair in zip(text.unbind(), (q, k, v), strict=True))
        mixed = self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        more = mixed.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], 1)
        encoder_hidden_states, hidden_states = encoder_hidden_states + more[0], hidden_states + more[1]
        return hidden_states + self.mlp(hidden_states), encoder_hidden_states + self.mlp(encoder_hidden_states)

    @staticmethod
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Pairs of channels, turned."""
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * cos + torch.stack([-b, a], -1).flatten(-2) * sin


class Transformer(nn.Module):
    """A diffusion transformer in small."""

    _sp_plan: ClassVar = {
        "rope": {
            0: SequenceParallelInput(split_dim=0, expected_dims=2, split_output=True),
            1: SequenceParallelInput(split_dim=0, expected_dims=2, split_output=True),
        },
        "blocks.0": {"hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3)},
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3),
    }

    def __init__(self, width: int = 32, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.proj_in, self.rope = nn.Linear(16, width), Rope(width // heads)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.proj_out = nn.Linear(width, 16)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """``[B, S, 16]`` and ``[B, T, C]`` to ``[B, S, 16]``."""
        rotary = self.rope(hidden_states)
        hidden_states = self.proj_in(hidden_states)
        for block in self.blocks:
            hidden_states, encoder_hidden_states = block(hidden_states, encoder_hidden_states, rotary)
        return self.proj_out(hidden_states)


def error(ours: Tensor, theirs: Tensor) -> float:
    """Relative, by the 2-norm."""
    return float((ours - theirs).norm() / theirs.norm())


def compare(options: dict[str, str] | None = None) -> dict[str, float]:
    """Errors of hooks and of the compiler against one process, for two lengths; prints what each of them did."""
    torch.manual_seed(0)
    model = Transformer().eval()
    one_process = copy.deepcopy(model)
    say = print if not dist.is_initialized() or dist.get_rank() == 0 else lambda *_: None

    enable_sequence_parallel_for_model(model)  # hooks, from the model's own plan
    compiled = torch.compile(model, backend="sp", options=options, dynamic=True)  # the one line

    errors = {}
    with torch.no_grad():
        for image, text in ((37, 5), (22, 8)):
            inputs = torch.randn(2, image, 16), torch.randn(2, text, 32)
            expected = one_process(*inputs)
            errors[f"hooks, {image}+{text} tokens"] = error(model(*inputs), expected)
            errors[f"compiled, {image}+{text} tokens"] = error(compiled(*inputs), expected)
    say("hooks:", ", ".join(record.method for record in report_of(model).attentions))
    report = fxsp.reports()[-1]
    say("compiler:", ", ".join(record.method for record in report.attentions), "-", "; ".join(report.notes))
    for name, value in errors.items():
        say(f"{name:<28} relative error {value:.1e}")
    return errors


def main() -> None:
    """On the ranks that torchrun started."""
    dist.init_process_group("gloo")
    try:
        assert max(compare().values()) < 1e-5
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
