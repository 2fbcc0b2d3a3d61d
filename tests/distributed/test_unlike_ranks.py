"""Ranks that are given unlike things: an error on all of them that names both sides, and they can go on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distributed import Pool, RankError, run_ranks
from fxsp import SequenceParallelInput, backend
from fxsp.ranks import channel
from running import compiled, recorded

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


def _faults(rank: int, size: int, names: list[str]) -> dict[str, tuple[str, str]]:
    found = {}
    for name in names:
        act, _ = FAULTS[name]
        torch.manual_seed(0)
        torch.compiler.reset()
        found[name] = _error(lambda act=act: act(rank == size - 1))
    return found


@pytest.mark.parametrize(
    ("size", "names"), [(2, list(FAULTS)), (3, ["length", "dtype", "values", "plan", "bad option", "seed"])]
)
def test_each_is_an_error_on_all_ranks_that_names_both_sides(ranks: Ranks, size: int, names: list[str]) -> None:
    for rank, found in enumerate(ranks(size).run(_faults, names, timeout=400)):
        for name, (kind, text) in found.items():
            _, parts = FAULTS[name]
            own = name in ("bad option", "degrees")
            expected = ("OptionError" if rank == size - 1 else "RanksApartError") if own else "InputMismatchError"
            assert kind == expected, (rank, name, kind, text)
            assert all(part in text for part in parts), (rank, name, text)
            if not (own and rank == size - 1):
                assert f"rank {size - 1}" in text, (rank, name, text)
                other = f"This is rank {rank}" if own else "ranks [0, 1]" if size == 3 else "rank 0"
                assert other in text, (rank, name, text)


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
        run_ranks(size, _alone, str(tmp_path), timeout=200)
    for rank in range(size):
        kind, text, seconds = json.loads((tmp_path / str(rank)).read_text())
        assert kind == "RanksApartError", (rank, text)
        for part in (f"rank {size - 1} compiles the graph of Net (test_unlike_ranks.py:", "self.flag", "call 4"):
            assert part in text, (rank, text)
        assert seconds < 10
    said = capfd.readouterr().err
    assert f"can't go on: rank {size - 1} compiles the graph of Net" in said


# --- values, call by call ---------------------------------------------------------------------------------------------


def _second_call(rank: int, size: int) -> dict[Any, tuple[str, str]]:
    """The first call is alike, the second is not: its values, or a parameter that it did not see before."""
    found: dict[Any, tuple[str, str]] = {}
    for option in (None, True, False):
        torch.compiler.reset()
        net = Net(noise=True)
        fast = compiled(net, plan=PLAN, **({} if option is None else {"check_inputs": option}))
        torch.manual_seed(0)
        found["alike", option] = _error(lambda fast=fast: fast(tokens()))
        found["values", option] = _error(lambda fast=fast: fast(tokens(seed=rank)))
        torch.manual_seed(rank)
        found["seed", option] = _error(lambda fast=fast: fast(tokens()))
        torch.compiler.reset()
        net = Net(noise=True)
        torch.manual_seed(rank)
        fast = compiled(net, plan=PLAN, **({} if option is None else {"check_inputs": option}))
        found["first", option] = _error(lambda fast=fast: fast(tokens(seed=rank)))
        found["first again", option] = _error(lambda fast=fast: fast(tokens(seed=rank)))
    return found


def test_values_are_compared_at_the_first_call_at_each_or_never(ranks: Ranks) -> None:
    for found in ranks(2).run(_second_call, timeout=400):
        for option in (None, True, False):
            assert found["alike", option] == ("", "")
            for name in ("values", "seed"):
                assert found[name, option][0] == ("InputMismatchError" if option else ""), (name, option, found)
            for name in ("first", "first again"):
                assert found[name, option][0] == ("" if option is False else "InputMismatchError"), (name, option)
        assert "x float32 [2, 7, 8] with digest" in found["values", True][1]
        assert "random state of cpu" in found["seed", True][1]


# --- ranks that come late, fail, or leave -----------------------------------------------------------------------------


def _late(rank: int, size: int) -> float:
    channel.WORD = 2.0
    if rank:
        time.sleep(4)
    net = Net()
    with torch.no_grad():
        compiled(net, plan=PLAN)(tokens())
        if rank:
            time.sleep(4)
        return (compiled(net, plan=PLAN)(tokens(9)) - net(tokens(9))).abs().max().item()


def test_a_late_rank_is_waited_for_and_named(capfd: pytest.CaptureFixture[str]) -> None:
    assert max(run_ranks(2, _late, timeout=200)) < 1e-6
    said = capfd.readouterr().err
    assert "fxsp: rank 0 compiles the graph of Net (test_unlike_ranks.py:" in said
    assert re.search(r"has waited \d s for rank 1; it gives up after", said), said
    assert "rank 1 has begun 1 calls of compiled graphs, and is at test_unlike_ranks.py:" in said
    assert "(_late)" in said


def _fails(rank: int, size: int) -> list[tuple[str, str]]:
    """The inner compiler of rank 1 fails; after that both ranks compile another model."""
    real = backend.compile_inner

    def full(*args: Any) -> Any:
        raise OSError("no space left on device")

    if rank == 1:
        backend.compile_inner = full
    found = [_error(lambda: compiled(Net(), plan=PLAN)(tokens()))]
    backend.compile_inner = real
    return [*found, _error(lambda: compiled(Net(dropout=0.5), plan=PLAN)(tokens()))]


def test_a_compiler_that_fails_on_one_rank_fails_on_all(ranks: Ranks) -> None:
    (first, then), (second, after) = ranks(2).run(_fails)
    assert first[0] == "RanksApartError"
    assert "rank 1 failed where the others did not: OSError: no space left on device" in first[1]
    assert "no space left on device" in second[1]
    assert (then, after) == (("", ""), ("", ""))


def _limit(rank: int, size: int, on_all: bool) -> tuple[tuple[str, str], list[str]]:
    """Dynamo compiles no more on rank 1, or on both ranks: a function that compiled too often is left to Python."""
    net = Net()
    fast = compiled(net, plan=PLAN)
    with torch.no_grad(), recorded() as texts:
        fast(tokens())
        with torch._dynamo.config.patch(recompile_limit=1 if rank or on_all else 8):
            return _error(lambda: torch.testing.assert_close(fast(tokens(9)), net(tokens(9)))), texts


def test_the_recompile_limit_is_reached_on_all_ranks_or_it_is_an_error(ranks: Ranks) -> None:
    for (kind, text), _ in ranks(2).run(_limit, False):
        assert kind == "InputMismatchError", text
        assert "rank 0 compiles the graph of Net" in text
        assert "rank 1 has reached Dynamo's recompile limit and runs forward (test_unlike_ranks.py:" in text
    for error, warned in ranks(2).run(_limit, True):
        assert error == ("", "")
        assert any("UnshardedWarning: this process has reached" in text for text in warned), warned


_LEAVES = """
import sys, torch, torch.distributed as dist
sys.path[:0] = {tests!r}
from running import compiled
from test_unlike_ranks import PLAN, Net, tokens
dist.init_process_group("gloo", init_method="file://{store}", rank=int(sys.argv[1]), world_size=2)
with torch.no_grad():
    compiled(Net(), plan=PLAN)(tokens())
    if sys.argv[1] == "0":
        compiled(Net(), plan=PLAN)(tokens(9))
"""


def test_a_rank_that_leaves_is_an_error_at_once(tmp_path: Path) -> None:
    script, here = tmp_path / "leaves.py", Path(__file__).parent
    script.write_text(_LEAVES.format(tests=[str(here), str(here.parent / "support")], store=tmp_path / "store"))
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    runs = [
        subprocess.Popen([sys.executable, script, rank], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    texts = [run.communicate(timeout=200)[1] for run in runs]
    assert runs[1].returncode == 0, texts[1]
    assert runs[0].returncode == 1
    assert "RanksApartError: rank 1 ended, or destroyed the process group, while rank 0 compiles the graph" in texts[0]


# --- groups -----------------------------------------------------------------------------------------------------------


def _mesh(rank: int, size: int) -> list[tuple[str, str]]:
    """Two data ranks with inputs, lengths and seeds of their own, each a group of two; then one group is apart."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))["sequence"]
    data = rank // 2
    torch.manual_seed(data)
    net = Net(dropout=0.5)
    torch.manual_seed(data)
    fast = compiled(net, plan=PLAN, mesh=mesh, check_inputs=True)
    found = [_error(lambda: fast(tokens(7 + data, seed=data)))]
    torch.manual_seed(data)
    return [*found, _error(lambda: fast(tokens(7 + data, seed=rank if data else 0)))]


def test_groups_of_a_mesh_are_compared_each_by_itself(ranks: Ranks) -> None:
    found = ranks(4).run(_mesh, timeout=400)
    assert [first for first, _ in found] == 4 * [("", "")]
    assert [second[0] for _, second in found] == ["", "", "InputMismatchError", "InputMismatchError"]
    assert "rank 0 of the group (global 2) has x float32" in found[3][1][1]


def _again(rank: int, size: int) -> list[tuple[str, str]]:
    """A group is made anew, in the store of the one before, which still has its messages."""
    store = dist.FileStore(os.environ["FXSP_TEST_STORE"], size)
    found = []
    for name in ("first", "second"):
        dist.destroy_process_group()
        dist.init_process_group("gloo", store=dist.PrefixStore(name, store), rank=rank, world_size=size)
        torch.compiler.reset()
        found.append(_error(lambda: compiled(Net(), plan=PLAN)(tokens())))
        channel._channels.clear()  # as if another process took the place of this one
        found.append(_error(lambda: compiled(Net(), plan=PLAN)(tokens(9))))
    return found


def test_a_group_may_be_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXSP_TEST_STORE", str(tmp_path / "store"))
    assert run_ranks(2, _again, timeout=200) == 2 * [4 * [("", "")]]
