"""Ranks that are given unlike things: an error on all of them that names both sides, and they can go on."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import Pool, RankError, run_ranks
from running import compiled
from torch import Tensor, nn

from fxsp import SequenceParallelInput

Ranks = Callable[[int], Pool]
PLAN = {"": {"x": SequenceParallelInput(1)}}


class Net(nn.Module):
    """A linear layer, dropout, and noise for whole values."""

    def __init__(self, noise: bool = False, dropout: float = 0.0, bias: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.dropout, self.noise = nn.Dropout(dropout), noise
        self.flag = False
        with torch.no_grad():
            self.head.bias.add_(bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.inner(x).tanh())
        if self.flag:
            x = x.sin()
        y = self.head(x).mean(1)
        return y + torch.randn(y.shape) if self.noise else y


def tokens(count: int = 7, batch: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(batch, count, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _error(call: Callable[[], Any]) -> tuple[str, str]:
    try:
        call()
    except Exception as error:  # noqa: BLE001
        return type(error).__name__, str(error)
    return "", ""


def _seeded(seed: int, net: nn.Module, **options: Any) -> Any:
    torch.manual_seed(seed)
    return compiled(net, plan=PLAN, **options)(tokens())


def _with_grad(on: bool, call: Callable[[], Any]) -> Any:
    with torch.set_grad_enabled(on):
        return call()


#: Rank -> what it does; ``odd`` is true on the last rank only.
FAULTS: dict[str, tuple[Callable[[bool], Any], tuple[str, ...]]] = {
    "length": (lambda odd: compiled(Net(), plan=PLAN)(tokens(8 if odd else 7)), ("[2, 7, 8]", "[2, 8, 8]")),
    "batch": (lambda odd: compiled(Net(), plan=PLAN)(tokens(batch=3 if odd else 2)), ("[2, 7, 8]", "[3, 7, 8]")),
    "dynamic length": (
        lambda odd: torch.compile(Net(), backend="sp", dynamic=True, options={"plan": PLAN, "inner": "aot_eager"})(
            tokens(9 if odd else 7)
        ),
        ("=7", "=9"),
    ),
    "dtype": (
        lambda odd: compiled(Net().double() if odd else Net(), plan=PLAN)(
            tokens(dtype=torch.float64 if odd else torch.float32)
        ),
        ("float32 [2, 7, 8]", "float64 [2, 7, 8]"),
    ),
    "values": (lambda odd: compiled(Net(), plan=PLAN)(tokens(seed=int(odd))), ("x float32 [2, 7, 8] with digest",)),
    "weights": (lambda odd: compiled(Net(bias=0.1 * odd), plan=PLAN)(tokens()), ("head.bias float32 [4] with",)),
    "shapes of weights": (
        lambda odd: compiled(nn.Linear(8, 4 + odd), plan={"": {"input": SequenceParallelInput(1)}})(tokens()),
        ("weight float32 [4, 8]", "weight float32 [5, 8]"),
    ),
    "option": (
        lambda odd: compiled(Net(), plan=PLAN, **({"gather_limit": 5} if odd else {}))(tokens()),
        ("gather_limit=None", "gather_limit=5"),
    ),
    "bad option": (lambda odd: compiled(Net(), plan=PLAN, **({"strikt": True} if odd else {}))(tokens()), ("strikt",)),
    "degrees": (
        lambda odd: compiled(Net(), plan=PLAN, **({"ulysses_degree": 5} if odd else {}))(tokens()),
        ("ulysses_degree=5",),
    ),
    "plan": (
        lambda odd: compiled(Net(), plan={"head": {"input": SequenceParallelInput(1)}} if odd else PLAN)(tokens()),
        ("<root>[x]", "head[input]"),
    ),
    "wrong plan": (
        lambda odd: compiled(Net(), plan={"heat": {"input": SequenceParallelInput(1)}} if odd else PLAN)(tokens()),
        ("<root>[x]", "heat[input]"),
    ),
    "no plan": (lambda odd: compiled(Net(), plan=None if odd else PLAN)(tokens()), ("<root>[x]", "the model's own")),
    "check_inputs": (lambda odd: compiled(Net(), plan=PLAN, check_inputs=not odd)(tokens()), ("=True", "=False")),
    "grad mode": (
        lambda odd: _with_grad(odd, lambda: compiled(Net(), plan=PLAN)(tokens())),
        ("grad mode off", "grad mode on"),
    ),
    "training": (lambda odd: compiled(Net().train(odd), plan=PLAN)(tokens()), ("in eval mode", "in training mode")),
    "requires grad": (
        lambda odd: compiled(Net(), plan=PLAN)(tokens().requires_grad_(odd)),
        ("x float32 [2, 7, 8] on cpu,", "requires grad"),
    ),
    "graph": (lambda odd: compiled(_flagged(odd), plan=PLAN)(tokens()), ("sin", "test_unlike_ranks.py:")),
    "seed": (lambda odd: _seeded(odd, Net(noise=True)), ("seed 0", "seed 1")),
    "seed of dropout": (lambda odd: _seeded(odd, Net(dropout=0.5)), ("seed 0", "seed 1")),
    "seed of dropout per rank": (lambda odd: _seeded(odd, Net(dropout=0.5), rng="per_rank"), ("seed 0", "seed 1")),
}


def _flagged(flag: bool) -> Net:
    net = Net()
    net.flag = flag
    return net


def _faults(rank: int, size: int) -> dict[str, tuple[str, str]]:
    found = {}
    for name, (act, _) in FAULTS.items():
        torch.manual_seed(0)
        torch.compiler.reset()
        found[name] = _error(lambda act=act: act(rank == size - 1))
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_each_is_an_error_on_all_ranks_that_names_both_sides(ranks: Ranks, size: int) -> None:
    for rank, found in enumerate(ranks(size).run(_faults)):
        for name, (_, parts) in FAULTS.items():
            kind, text = found[name]
            own = name in ("bad option", "degrees")
            expected = ("OptionError" if rank == size - 1 else "RanksApartError") if own else "InputMismatchError"
            assert kind == expected, (rank, name, kind, text)
            assert all(part in text for part in parts), (rank, name, text)
            if not (own and rank == size - 1):
                assert f"rank {size - 1}" in text, (rank, name, text)
                assert ("ranks [0, 1]" if size == 3 and not own else "rank 0") in text, (rank, name, text)


def _alone(rank: int, size: int, folder: str) -> None:
    """An attribute is set on the last rank only: it compiles anew, and the others call what they have."""
    net = Net()
    fast = compiled(net, plan=PLAN)
    with torch.no_grad():
        for _ in range(3):
            fast(tokens())
        net.flag = rank == size - 1
        began = time.monotonic()
        kind, text = _error(lambda: [fast(tokens()) for _ in range(3)])
    row = [kind, text, time.monotonic() - began]
    Path(folder, str(rank)).write_text(json.dumps(row))
    if rank == size - 1:
        os._exit(1)  # as an error that nobody catches does


@pytest.mark.parametrize("size", [2, 3])
def test_a_rank_that_compiles_alone_is_named_within_ten_seconds(
    size: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RankError, match=f"rank {size - 1} of {size}:\nthe process died"):
        run_ranks(size, _alone, str(tmp_path), timeout=60)
    for rank in range(size):
        kind, text, seconds = json.loads((tmp_path / str(rank)).read_text())
        assert kind == "RanksApartError", (rank, text)
        for part in (f"rank {size - 1} compiles the graph of Net (test_unlike_ranks.py:", "self.flag", "call 4"):
            assert part in text, (rank, text)
        assert seconds < 10
    said = capfd.readouterr().err
    assert f"fxsp: rank 0 can't go on: rank {size - 1} compiles the graph of Net" in said
