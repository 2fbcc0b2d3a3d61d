"""Models with masks that are finite and forbid whole rows: each way to run an attention has one device's gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fxsp
from distributed import Pool
from fxsp.hooks.sequence_parallel import apply_sequence_parallel
from running import collectives, error_of

WIDTH = 24
PLAN = {"": {"x": fxsp.SequenceParallelInput(1)}}
#: Options that ask for a way, for P ranks.
WAYS: dict[str, Callable[[int], dict[str, Any]]] = {
    "ring": lambda size: {"ulysses_degree": 1, "ring_degree": size},
    "hybrid": lambda size: {"ulysses_degree": 2, "ring_degree": size // 2},
    "ulysses": lambda size: {"ulysses_degree": size, "ring_degree": 1},
    "gather_kv": lambda size: {"allgather_degree": size},
    "local": lambda size: {},
    "merged": lambda size: {"gather_limit": 0},
}


class Attention(nn.Module):
    """Of tokens to themselves (``"local"``: to whole ones, ``"merged"``: of a few whole ones to them), 4 heads."""

    def __init__(self, way: str, kv: int = 4, value: int = 6) -> None:
        super().__init__()
        self.way, self.kv = way, kv
        self.q, self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, kv * 6), nn.Linear(WIDTH, kv * value)
        self.out = nn.Linear(4 * value, WIDTH)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, mask: Tensor, few: Tensor, trained: bool = False) -> Tensor:
        x = x + torch.tanh(x)
        q = self.q(few if self.way == "merged" else x)
        k, v = (f(few if self.way == "local" else x) for f in (self.k, self.v))
        q, k, v = (y.unflatten(-1, (h, -1)).transpose(1, 2) for y, h in ((q, 4), (k, self.kv), (v, self.kv)))
        if trained:
            mask = mask + self.bias * torch.arange(mask.shape[-1])
        o = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=self.kv != 4)
        return self.out(o.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def _mask(m: int, n: int, level: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Left padding and the causal flag: the first rows may look at nothing; the last is forbidden beside."""
    mask = torch.full((2, 1, m, n), level, dtype=dtype).triu(1)
    mask[0, ..., : n // 2] = level
    mask[1, ..., -1, :] = level
    return mask


def _inputs(way: str, n: int, level: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    x, few = torch.randn(2, n, WIDTH, dtype=dtype), torch.randn(2, 5, WIDTH, dtype=dtype)
    rows, columns = {"local": (n, 5), "merged": (5, n)}.get(way, (n, n))
    return x, _mask(rows, columns, level, dtype), few


def _verified(way: str, model: nn.Module, size: int, *inputs: Any, **more: Any) -> None:
    options = {"plan": PLAN, **WAYS[way](size)}
    evidence = fxsp.verify(model, *inputs, world_size=size, options=options, **more)
    (graph,) = evidence.graphs
    assert {a.method for a in graph.report.attentions} == {way}, graph.report
    worst = {name: error for name, error in graph.errors.items() if not error <= 1e-5}
    assert not worst, (way, size, worst)
    assert any(name.startswith("the gradient") for name in graph.errors)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.mark.parametrize("way", WAYS)
def test_every_way(way: str) -> None:
    """On 2, 3, 4 and 8 simulated ranks, at lengths that do not divide, and fewer tokens than ranks."""
    low = torch.finfo(torch.float32).min
    for size, n, level in ((2, 13, low), (3, 7, -1e9), (4, 3, low), (4, 11, -1e9), (8, 19, low)):
        if (size in (2, 3) and way == "hybrid") or (4 % size and way == "ulysses"):
            continue
        _verified(way, Attention(way), size, *_inputs(way, n, level))


@pytest.mark.parametrize("way", ["ring", "hybrid", "merged"])
@pytest.mark.parametrize("kind", ["grouped heads", "wide values", "a trained mask", "fp64", "torch's own", "3-D mask"])
def test_whose_gradient(way: str, kind: str) -> None:
    """Torch writes some attentions out, and then keys share the gradient of such a row; blocks do what torch does."""
    n, level = 11, torch.finfo(torch.float32).min
    dtype = torch.float64 if kind == "fp64" else torch.float32
    model = Attention(way, 2 if kind == "grouped heads" else 4, 5 if kind == "wide values" else 6).to(dtype)
    x, mask, few = _inputs(way, n, level, dtype)
    if kind == "3-D mask":
        mask = mask[0].expand(4, -1, -1)
    given = (x, mask, few, kind == "a trained mask")
    if kind == "torch's own":
        with sdpa_kernel(SDPBackend.MATH):
            _verified(way, model, 4, *given)
    else:
        _verified(way, model, 4, *given)


# On real processes.


def _steps(rank: int, size: int, way: str, level: float, dtype: torch.dtype, n: int, inner: str) -> Any:
    """Errors of output and gradients against one process, and how many messages went forward and backward."""
    model = Attention(way).to(dtype)
    x, mask, few = _inputs(way, n, level, dtype)
    fast = torch.compile(model, backend="sp", options={"plan": PLAN, "inner": inner, **WAYS[way](size)})
    results = []
    for f in (model, fast):
        y = x.clone().requires_grad_()
        out = f(y, mask, few)
        grads = torch.autograd.grad(
            (out * torch.linspace(-1, 1, WIDTH, dtype=dtype)).sum(),
            [y, model.q.weight, model.k.weight, model.v.weight],
        )
        results.append([out.detach(), *grads])
    with collectives() as forward:
        out = fast(y, mask, few)
    with collectives() as backward:
        out.sum().backward()
    moves = ("all_to_all", "all_gather")
    counts = [sum(n for name, n in c.items() if any(m in name for m in moves)) for c in (forward, backward)]
    methods = [a.method for a in fxsp.reports()[-1].attentions]
    return [error_of(b, a) for a, b in zip(*results, strict=True)], methods, counts


@pytest.mark.parametrize(
    ("way", "size", "level", "dtype", "n", "messages"),
    [
        ("ring", 3, "min", torch.float32, 11, [2, 4]),
        ("hybrid", 4, -1e9, torch.float32, 13, [3, 4]),
        ("merged", 3, "min", torch.float32, 10, None),
        ("ring", 2, "min", torch.bfloat16, 9, [1, 2]),
        ("hybrid", 4, "min", torch.float64, 3, [3, 4]),
    ],
)
def test_on_real_ranks(
    ranks: Callable[[int], Pool], way: str, size: int, level: Any, dtype: torch.dtype, n: int, messages: Any
) -> None:
    """One device's gradients, by as many messages as without such a mask."""
    number = torch.finfo(dtype).min if level == "min" else level
    for errors, methods, counts in ranks(size).run(_steps, way, number, dtype, n, "aot_eager"):
        assert methods == [way]
        assert max(errors) <= {torch.float32: 1e-5, torch.float64: 1e-9}.get(dtype, 3e-2), errors
        if messages is not None:
            assert [c - g for c, g in zip(counts, (1, 1), strict=True)] == messages  # but for the output, and x


def _eagerly(rank: int, size: int, ulysses: int, level: float, n: int) -> list[float]:
    """Hooks, without a compiler."""
    model = Attention("ring")
    x, mask, few = _inputs("ring", n, level)
    results = []
    for split in (False, True):
        if split:
            config = fxsp.SequenceParallelConfig(ulysses_degree=ulysses, ring_degree=size // ulysses)
            plan = {"": {"x": fxsp.SequenceParallelInput(1)}, "out": fxsp.SequenceParallelOutput(1)}
            apply_sequence_parallel(model, config, plan)
        y = x.clone().requires_grad_()
        out = model(y, mask, few)
        grads = torch.autograd.grad(
            (out * torch.linspace(-1, 1, WIDTH)).sum(), [y, model.q.weight, model.k.weight, model.v.weight]
        )
        results.append([out.detach(), *grads])
    return [error_of(b, a) for a, b in zip(*results, strict=True)]


@pytest.mark.parametrize(("size", "ulysses"), [(2, 1), (4, 2)])
def test_hooks(ranks: Callable[[int], Pool], size: int, ulysses: int) -> None:
    for errors in ranks(size).run(_eagerly, ulysses, torch.finfo(torch.float32).min, 11):
        assert max(errors) <= 1e-5, errors
