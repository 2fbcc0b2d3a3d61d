"""Rings on real processes: whole small models, forward and backward, and the operator in eager mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fxsp
from distributed import Pool
from running import collectives, error_of

WIDTH, HEADS = 16, 4
Ranks = Callable[[int], Pool]


class Block(nn.Module):
    """Attention with ``kv`` key heads, a mask or the causal flag, and a linear layer."""

    def __init__(self, kv: int, causal: bool) -> None:
        super().__init__()
        self.kv, self.causal = kv, causal
        self.qkv = nn.Linear(WIDTH, WIDTH + 2 * kv * (WIDTH // HEADS))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        d = WIDTH // HEADS
        q, k, v = (
            y.unflatten(-1, (-1, d)).transpose(1, 2) for y in self.qkv(x).split([WIDTH, self.kv * d, self.kv * d], -1)
        )
        o = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal, enable_gqa=self.kv != HEADS)
        return x + self.out(o.transpose(1, 2).flatten(2))


class Model(nn.Module):
    _sp_plan: ClassVar[dict[str, Any]] = {"": {"x": fxsp.SequenceParallelInput(1)}}

    def __init__(self, kv: int = HEADS, causal: bool = False, saved: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(kv, causal) for _ in range(2)])
        self.saved = saved

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, mask, use_reentrant=False) if self.saved else block(x, mask)
        return x


def _mask(kind: str, length: int) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "additive":
        return torch.randn(2, HEADS, length, length)
    allowed = torch.rand(2, 1, length if kind == "bool" else 1, length) > 0.4
    allowed[..., 0] = True
    return allowed


def _steps(
    rank: int, size: int, ring: int, arguments: dict[str, Any], mask: str, lengths: list[int], inner: str
) -> tuple[list[float], list[str], int, list[int]]:
    """Errors of output and gradients for each length; methods, graphs; all-to-alls forward and backward."""
    model = Model(**arguments)
    options = {"ulysses_degree": size // ring, "ring_degree": ring, "inner": inner}
    dynamic = True if len(lengths) > 1 else None
    fast = torch.compile(model, backend="sp", dynamic=dynamic, options=options)
    before = len(fxsp.reports())
    errors: list[float] = []
    for length in lengths:
        x, m = torch.randn(2, length, WIDTH), _mask(mask, length)
        results = []
        for f in (model, fast):
            y = x.clone().requires_grad_()
            out = f(y, m)
            grads = torch.autograd.grad((out * torch.arange(WIDTH)).square().mean(), [y, *model.parameters()])
            results.append([out.detach(), *grads])
        errors.append(max(error_of(b, a) for a, b in zip(*results, strict=True)))
    # Again, now that all is compiled, to see what runs.
    with collectives() as forward:
        out = fast(y, m)
    with collectives() as backward:
        out.sum().backward()
    counts = [sum(n for name, n in c.items() if "all_to_all" in name) for c in (forward, backward)]
    reports = fxsp.reports()[before:]
    return errors, [a.method for r in reports for a in r.attentions], len(reports), counts


@pytest.mark.parametrize(
    ("size", "ring", "arguments", "mask", "length", "inner"),
    [
        (2, 2, {}, "none", 8, "aot_eager"),
        (2, 2, {"kv": 1}, "bool", 7, "aot_eager"),
        (2, 2, {"kv": 2, "causal": True}, "none", 9, "eager"),
        (3, 3, {"kv": 2, "causal": True}, "none", 10, "aot_eager"),
        (3, 3, {}, "additive", 2, "aot_eager"),
        (3, 3, {"kv": 2}, "padding", 11, "aot_eager"),
        (4, 4, {"kv": 1, "causal": True}, "none", 3, "aot_eager"),
        (4, 2, {"kv": 2, "causal": True}, "none", 13, "aot_eager"),
        (4, 2, {"kv": 2}, "additive", 10, "aot_eager"),
    ],
)
def test_values_and_gradients(
    ranks: Ranks, size: int, ring: int, arguments: dict[str, Any], mask: str, length: int, inner: str
) -> None:
    results = ranks(size).run(_steps, ring, arguments, mask, [length], inner)
    for errors, methods, graphs, counts in results:
        assert errors[0] <= 1e-5
        assert methods == ["ring" if ring == size else "hybrid"] * 2
        assert graphs == 1
        # Per attention: r - 1 rotations, of keys and values, and back with gradients; four exchanges of a hybrid.
        exchanges = 0 if ring == size else 2
        if inner != "eager":
            assert counts == [2 * (ring - 1 + exchanges), 2 * (2 * (ring - 1) + exchanges)]


@pytest.mark.parametrize(("arguments", "mask"), [({"causal": True}, "none"), ({}, "none"), ({"kv": 2}, "bool")])
def test_symbolic_lengths_compile_once(ranks: Ranks, arguments: dict[str, Any], mask: str) -> None:
    for errors, _, graphs, _ in ranks(3).run(_steps, 3, arguments, mask, [9, 13, 10, 21], "aot_eager"):
        assert max(errors) <= 1e-5
        assert graphs == 1


@pytest.mark.slow
def test_inductor(ranks: Ranks) -> None:
    results = ranks(2).run(_steps, 2, {"kv": 2, "causal": True}, "none", [9, 14], "inductor", timeout=240)
    for errors, _, graphs, _ in results:
        assert max(errors) <= 1e-5
        assert graphs == 1


def test_a_checkpoint_does_not_send_keys_around_again(ranks: Ranks) -> None:
    (plain, *_), (saved, *_) = (
        ranks(2).run(_steps, 2, {"saved": flag}, "none", [9], "aot_eager") for flag in (False, True)
    )
    assert saved[0][0] <= 1e-5
    assert saved[3] == plain[3] == [2, 4]


def _operator(rank: int, size: int) -> list[float]:
    """The operator on real ranks without a compiler, differentiated."""
    group = dist.group.WORLD.group_name
    lengths, whole = [2 * size + 1], [False]
    q, k, v = (torch.randn(1, 4, lengths[0], 8, requires_grad=True) for _ in "qkv")
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    weights = torch.randn_like(want)
    expected = torch.autograd.grad((want * weights).sum(), [q, k, v])
    ops = torch.ops.fxsp
    local = [ops.shard(x, 2, lengths, whole, False, rank, size, group) for x in (q, k, v)]
    out, *_ = ops.ring_attention(*local, None, lengths, whole, lengths, whole, True, None, 1, rank, size, group)
    full = ops.gather(out, 2, lengths, whole, rank, size, group)
    found = torch.autograd.grad((full * weights).sum(), [q, k, v])
    return [error_of(a, b) for a, b in zip((full, *found), (want, *expected), strict=True)]


def test_the_operator_in_eager_mode(ranks: Ranks) -> None:
    for errors in ranks(3).run(_operator):
        assert max(errors) <= 1e-5
