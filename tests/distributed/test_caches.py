"""One cache directory for all ranks: compiled one rank after the other, then again by fresh processes that only read.

A compiler that keeps a rank's number out of what caches are keyed by would hand rank 1 the program of rank 0.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distributed import run_ranks
from running import error_of
from small import SPLIT, Attention, inputs

pytestmark = pytest.mark.slow


@dataclass
class Step:
    """What one rank saw: relative errors of the output and of all gradients, cache counters, when it compiled."""

    error: float
    gradient_errors: list[float]
    inductor: dict[str, int]
    autograd: dict[str, int]
    began: float
    ended: float


class One(nn.Module):
    """An attention, and an operator that needs all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x).cumsum(1)


def _until(path: Path) -> None:
    while not path.exists():
        time.sleep(0.05)


def _step(rank: int, size: int, folder: str) -> Step:
    """A training step; a rank's inner compiler begins when that of the rank before has ended.

    Before and after it all ranks meet.
    """
    from torch._dynamo.utils import counters

    from fxsp import backend

    done = [Path(folder) / str(r) for r in range(size)]
    times: list[float] = []
    compile_inner = backend.compile_inner

    def in_turn(*args: Any) -> Any:
        if rank:
            _until(done[rank - 1])
        times.append(time.time())
        compiled = compile_inner(*args)
        times.append(time.time())
        done[rank].touch()
        return compiled

    backend.compile_inner = in_turn
    counters.clear()
    model, x = One(), inputs(tokens=7).requires_grad_()
    wanted = torch.autograd.grad(model(x).square().mean(), [x, *model.parameters()])
    out = torch.compile(model, backend="sp", options={"plan": SPLIT})(x)
    found = torch.autograd.grad(out.square().mean(), [x, *model.parameters()])
    errors = [error_of(a, b) for a, b in zip(found, wanted, strict=True)]
    return Step(
        error_of(out, model(x)), errors, dict(counters["inductor"]), dict(counters["aot_autograd"]), times[0], times[1]
    )


def test_ranks_share_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    found = []
    for name in ("cold", "warm"):
        (tmp_path / name).mkdir()
        found.append(run_ranks(2, _step, str(tmp_path / name), timeout=560))
    for steps in found:
        assert steps[0].ended <= steps[1].began, "one after the other"
        for step in steps:
            assert step.error <= 1e-5
            assert max(step.gradient_errors) <= 1e-5, step.gradient_errors
    cold, warm = found
    assert cold[0].inductor["fxgraph_cache_miss"] == 2
    assert cold[0].autograd["autograd_cache_miss"] == 1
    for step in warm:  # forward and backward, and what stands for both
        assert step.inductor["fxgraph_cache_hit"] == 2
        assert step.autograd["autograd_cache_hit"] == 1
        for missed in ("fxgraph_cache_miss", "fxgraph_cache_bypass"):
            assert missed not in step.inductor
        for missed in ("autograd_cache_miss", "autograd_cache_bypass"):
            assert missed not in step.autograd
