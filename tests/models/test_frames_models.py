"""Video models whose plan splits frames: patches in frames, rotary tables, text, attention in space and in time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsp
from fxsp import SequenceParallelInput
from simulated import Simulated, by_plan

F = nn.functional
DIM, HEADS = 32, 8


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(DIM, DIM), nn.Linear(DIM, 2 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, context: Tensor | None = None, angles: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q = self.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = (y.transpose(1, 2) for y in self.kv(context).unflatten(-1, (2, HEADS, -1)).unbind(2))
        if angles is not None:
            q, k = (_rotated(y, angles) for y in (q, k))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * angles.cos() + turned * angles.sin()


class Patches(nn.Module):
    """As Wan is made: a convolution makes patches of frames, which are tokens of one sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.own, self.cross = nn.Conv3d(3, DIM, (1, 2, 2), (1, 2, 2)), Attention(), Attention()
        self.norm, self.out = nn.LayerNorm(DIM), nn.Linear(DIM, 12)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        batch, _, f, h, w = x.shape
        h, w = h // 2, w // 2
        where = (
            torch.arange(f).view(f, 1, 1, 1) * 0.3 + torch.arange(h).view(h, 1, 1) * 0.1 + torch.arange(w).view(w, 1)
        )
        angles = where.expand(f, h, w, DIM // HEADS).reshape(f * h * w, -1)
        y = self.embed(x).flatten(2).transpose(1, 2)
        y = y + self.own(self.norm(y), angles=angles)
        y = y + self.cross(y, text)
        y = self.out(y).reshape(batch, f, h, w, 2, 2, 3).permute(0, 6, 1, 2, 4, 3, 5)
        return y.flatten(5, 6).flatten(3, 4)


class Factorized(nn.Module):
    """As Latte is made: attention in space, then in time; then of text and all frames together."""

    def __init__(self) -> None:
        super().__init__()
        self.space, self.time, self.joint = Attention(), Attention(), Attention()
        self.head = nn.Linear(DIM, 5)

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, f, h, w, _ = x.shape
        y = x.flatten(2, 3).flatten(0, 1)
        y = y + self.space(y)
        y = y.unflatten(0, (batch, f)).permute(0, 2, 1, 3).flatten(0, 1)
        y = y + self.time(y)
        y = y.unflatten(0, (batch, h * w)).permute(0, 2, 1, 3).flatten(1, 2)
        z = torch.cat([text, y], 1)
        z = z + self.joint(z)
        text, y = z.split([text.shape[1], y.shape[1]], 1)
        return self.head(y.mean(1)), text, y.unflatten(1, (f, h, w))[:, 0]


def _case(kind: str, frames: int) -> tuple[nn.Module, tuple[Tensor, ...], dict[str, Any]]:
    torch.manual_seed(0)
    text = torch.randn(2, 5, DIM)
    if kind == "patches":
        return Patches(), (torch.randn(2, 3, frames, 4, 6), text), {"": {"x": SequenceParallelInput(2)}}
    entries = {"x": SequenceParallelInput(1)}
    if kind == "factorized, text too":
        entries["text"] = SequenceParallelInput(1)
    return Factorized(), (torch.randn(2, frames, 2, 3, DIM), text), {"": entries}


KINDS = ("patches", "factorized", "factorized, text too")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize(("frames", "size"), [(24, 4), (25, 2), (25, 3), (3, 8)])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind: str, frames: int, size: int) -> None:
    model, given, plan = _case(kind, frames)
    evidence = fxsp.verify(model, *given, world_size=size, options={"plan": plan, "strict": True})
    assert evidence.ok, str(evidence)
    (graph,) = evidence.graphs
    assert max(*graph.outputs, *graph.gradients) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_listed_as_of_split_tokens(kind: str) -> None:
    """24 frames on 4 ranks need no pads: methods and bytes are those of a plan that splits the tokens themselves."""
    model, given, plan = _case(kind, 24)
    with torch.no_grad():
        report = fxsp.explain(model, *given, world_size=4, plan=plan)
    q = 2 * 24 * 6 * DIM * 4 // 4  # local bytes of each of q, k, v and the output
    wanted = {"patches": [("ulysses", q * 3), ("local", 0)], "factorized": [("ulysses", q * 3)] * 2}
    found = [(a.method, a.bytes) for a in report.attentions]
    text = 2 * 2 * DIM * 4  # five tokens, two of them on each rank
    joint = [("ulysses", 3 * (q + text))] if kind != "patches" else []
    assert found == [*wanted[kind.partition(",")[0]][: 1 if joint else 2], *joint]
    assert not [g for g in report.implicit_gathers if g.kind == "implicit"]


@pytest.mark.parametrize("kind", KINDS)
def test_symbolic_frames(kind: str) -> None:
    """One graph for all numbers of frames, in frames of symbolic size, too."""
    model, _, plan = _case(kind, 4)
    reports: list[Any] = []
    torch.compiler.reset()
    fast = torch.compile(model, backend=Simulated(3, by_plan({"plan": plan}, reports)), dynamic=True)
    with torch.no_grad():
        for frames in (7, 9, 5):
            given = _case(kind, frames)[1]
            torch.testing.assert_close(fast(*given), model(*given), rtol=1e-5, atol=1e-5)
    assert len(reports) == 1
    assert reports[0].attentions
