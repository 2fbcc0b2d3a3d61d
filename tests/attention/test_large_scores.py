"""Scores that are huge everywhere in a row: finite masks that forbid all keys, and scores that are large by themselves.

Right is what one device's own kernel gives, outputs and gradients, at its own precision: where rounding decides, the
untouched attention in fp64 says how far off one device is, and blocks may not be further.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
from test_ring_threads import _Threads
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fxsp.kernels import collectives
from fxsp.kernels.attention.merge import join, merge_eager, rounded
from fxsp.kernels.attention.own_kernel import _LIMIT, level_and_rest, wide, written_out
from fxsp.kernels.attention.ring import ring_attention, ring_attention_backward
from fxsp.kernels.attention.ring_kernels import block_forward
from fxsp.kernels.attention.split_kv import merged_attention, merged_attention_backward

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: Two roundings, of fp32 or of the output.
EXACT = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
LEVELS = (0.0, 1e2, -1e4, 1e4, -1e9, 1e9, torch.finfo(torch.float32).min)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def _error(a: Tensor, b: Tensor, least: float = 1e-3) -> float:
    a, b = a.detach().double(), b.detach().double()
    assert bool(a.isfinite().all())
    return float((a - b).norm() / b.norm().clamp(min=least))


# Precision.


def _sums(level: float, keys: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scores ``level`` and a little less, as they are in ``dtype``: the exact log of their sum over the level's."""
    scores = torch.full((8, keys), level, dtype=dtype) - torch.rand(8, keys, dtype=dtype)
    top = scores.amax(-1)
    return top, (scores.double() - top.unsqueeze(-1).double()).exp().sum(-1).log()


@pytest.mark.parametrize("level", LEVELS)
def test_shares_are_exact_whatever_the_level(level: float) -> None:
    """A log-sum-exp in one number is off by half of its last place, and a share by that; in two numbers it is not."""
    (a, rest_a), (b, rest_b) = (_sums(level, n, torch.float32) for n in (500, 700))
    x, y = torch.zeros(8, 1), torch.ones(8, 1)  # so that what is merged is the share of the second
    base = torch.maximum(a, b).double()
    p, q = ((t.double() - base + r).exp() for t, r in ((a, rest_a), (b, rest_b)))
    share = (q / (p + q)).unsqueeze(-1)
    two, top, total = join(x, a, rest_a.float(), y, b, rest_b.float())
    assert float((two.double() / share - 1).abs().max()) <= 16 * 2**-24
    torch.testing.assert_close(top.double() - base + total.double(), (p + q).log(), rtol=1e-6, atol=0)
    one, _ = merge_eager(x, rounded(a, rest_a.float())[0], y, rounded(b, rest_b.float())[0], torch.float32)
    lost = float((one.double() / share - 1).abs().max())
    place = 2.0 ** (math.floor(math.log2(max(abs(level), 1))) - 23)
    assert lost <= 2 * place + 1e-6
    if abs(level) >= 1e4:
        assert lost > 1e-5  # which is why one number is not enough


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["mask", "row", "causal", "scores"])
def test_two_numbers_from_a_fused_kernel(kind: str, dtype: torch.dtype) -> None:
    """Against the scores in fp64; rows near 0 keep the kernel's number."""
    for level in LEVELS:
        level = max(level, torch.finfo(dtype).min)
        if level > torch.finfo(dtype).max:
            continue
        q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64).to(dtype) for n in (7, 9, 9))
        bias = None
        if kind in ("mask", "row"):
            bias = torch.zeros(1, 1, 1 if kind == "row" else 7, 9, dtype=dtype)
            bias[..., -1, :] = level
        elif kind == "scores":
            k[..., 0], q[..., 0] = 1.0, min(max(level, -6e4), 6e4)
        out, first, rest = block_forward(q, k, v, bias, kind == "causal", 1.0)
        scores = q.to(wide(dtype)) @ k.to(wide(dtype)).mT
        scores = scores if bias is None else scores + bias
        if kind == "causal":
            scores = scores.masked_fill(torch.ones(7, 9, dtype=torch.bool).triu(1), -math.inf)
        exact = (scores.double() - first.double().unsqueeze(-1)).exp().sum(-1).log()
        # One number, up to the limit; beyond it a score's own rounding is left, once.
        unit = torch.finfo(wide(dtype)).eps
        allowed = torch.where(
            first.abs() <= _LIMIT[dtype], 64 * unit + first.abs() * unit, 1e-5 if unit > 1e-9 else 1e-9
        )
        if kind == "scores":
            allowed = allowed + 4 * unit * first.abs()
        assert bool(((exact - rest.double()).abs() <= allowed).all()), level
        assert bool(out.isfinite().all())


def test_the_operator() -> None:
    q, k = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8)
    bias = torch.full((1, 1, 5, 7), -1e9).index_fill(2, torch.tensor([1, 2]), 0.0)
    lse = torch.where(bias[0, 0, :, 0] < 0, -1e9, 2.0).expand(2, 3, 5).contiguous()
    for given in (bias, bias[..., :1, :], None):
        torch.library.opcheck(torch.ops.fxsp_local.level_and_rest.default, (q, k, given, False, 0.3, lse))
    level, rest = level_and_rest(q, k, bias, False, 0.3, lse)
    assert level[0, 0].tolist()[1:3] == [2.0, 2.0]
    assert rest[0, 0].tolist()[1:3] == [0.0, 0.0]
    torch.testing.assert_close(rest[..., [0, 3, 4]], torch.full((2, 3, 3), math.log(7)))


# Whose gradient.


def test_which_attention_torch_writes_out() -> None:
    """By the function that autograd has for it."""
    q = torch.randn(2, 4, 5, 8, requires_grad=True)
    many, two, one = (torch.randn(2, h, 5, 8) for h in (4, 2, 1))
    strided = torch.randn(2, 4, 8, 5).mT
    masks = [torch.zeros(s) for s in ((5, 5), (1, 5), (2, 1, 5, 5), (2, 4, 5, 5), (1, 4, 1, 5))]
    calls: list[tuple[tuple[Tensor, Tensor, Tensor], Tensor | None, bool]] = [
        *(((q, k, k), None, gqa) for k in (many, one, strided) for gqa in (False, True)),
        ((q, two, two), None, True), ((q, two, one), None, True), ((q, many, many[..., :4]), None, False),
        ((q[:1], many, many), None, False), ((q[0], many[0], many[0]), None, False),
        *(((q, many, many), mask, False) for mask in [*masks, torch.zeros(4, 5, 5), torch.zeros(1, 5, 5)]),
    ]  # fmt: skip
    seen = set()
    for operands, mask, gqa in calls:
        out = F.scaled_dot_product_attention(*operands, attn_mask=mask, enable_gqa=gqa)
        found = "Flash" not in type(out.grad_fn).__name__
        assert written_out(*operands, mask, gqa) == found, [tuple(x.shape) for x in operands]
        seen.add(found)
    assert seen == {False, True}
    with sdpa_kernel(SDPBackend.MATH):
        assert written_out(q, many, many, None, False)


# Blocks on threads, as ranks.


class _Gathering:
    """``collectives.all_gather`` between the threads of this process."""

    def __init__(self, size: int) -> None:
        self.sent: dict[int, Tensor] = {}
        self.barrier = threading.Barrier(size, timeout=60)
        self.own = threading.local()
        self.size = size

    def all_gather(self, x: Tensor, size: int, group: str) -> Tensor:
        self.sent[self.own.rank] = x
        self.barrier.wait()
        return torch.cat([self.sent[rank] for rank in range(size)])

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        def one(rank: int) -> Any:
            self.own.rank = rank
            return function(rank)

        with mock.patch.object(collectives, "all_gather", self.all_gather), ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(one, range(self.size)))


def _masks(n: int, dtype: torch.dtype, level: float) -> dict[str, Tensor]:
    """``[1, 1, n, n]``; ``level`` stands for what is forbidden."""
    low = torch.full((n, n), level, dtype=dtype)
    causal = low.triu(1)
    padded = causal.clone()
    padded[:, : n // 2] = level
    added = causal + low * (torch.arange(n) < n // 2)  # the smallest number twice is -inf
    one = torch.zeros(n, n, dtype=dtype)
    one[n // 2] = level
    blocks = torch.zeros(n, n, dtype=dtype)
    blocks[: n // 2 + 1], blocks[:, n // 3 :] = level, level
    beside = padded.clone()
    beside[::3] = -math.inf
    beside[1::3, ::2] = -math.inf
    uneven = low * torch.linspace(1, 0.5, n, dtype=dtype)
    masks = {"left padding": padded, "added": added, "one row": one, "all": low, "blocks": blocks, "beside": beside}
    masks |= {"uneven": uneven, "random": low * torch.randint(0, 2, (n, n))}
    return {name: mask[None, None] for name, mask in masks.items()}


def _one_device(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, grad: Tensor, causal: bool, mask_grad: bool
) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    if mask_grad:
        assert mask is not None
        mask = mask.detach().clone().requires_grad_()
        leaves.append(mask)
    out = F.scaled_dot_product_attention(*leaves[:3], mask, is_causal=causal, enable_gqa=True)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def _padded(x: Tensor, rows: int) -> Tensor:
    return torch.cat([x, x[..., -1:, :].expand(*x.shape[:-2], rows - x.shape[-2], x.shape[-1])], -2)


def _ring(
    size: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, grad: Tensor, causal: bool, mask_grad: bool
) -> list[Tensor]:
    n, rows = q.shape[2], -(-q.shape[2] // size)
    local = [_padded(x, size * rows).split(rows, 2) for x in (q, k, v)]
    grads = F.pad(grad, [0, 0, 0, size * rows - n]).split(rows, 2)
    masks = [mask] * size if mask is None or mask.shape[2] == 1 else list(_padded(mask, size * rows).split(rows, 2))
    where = ([n], [False], [n], [False], causal, None)

    def one(rank: int) -> Any:
        operands = (*(x[rank] for x in local), masks[rank])
        results = ring_attention(*operands, *where, 1, rank, size, "none")
        return results[0], *ring_attention_backward(
            grads[rank], *operands, *results, *where, mask_grad, 1, rank, size, "none"
        )

    found = list(zip(*_Threads(size).run(one), strict=True))
    together = [torch.cat(x, 2).narrow(2, 0, n) for x in found[:4]]
    if mask_grad:
        assert mask is not None
        together.append(torch.stack(found[4]).sum(0) if mask.shape[2] == 1 else torch.cat(found[4], 2).narrow(2, 0, n))
    return together


def _merged(
    size: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, grad: Tensor, causal: bool, mask_grad: bool
) -> list[Tensor]:
    n, rows = k.shape[2], -(-k.shape[2] // size)
    ks, vs = (_padded(x, size * rows).split(rows, 2) for x in (k, v))
    where = ([n], [False], causal, None)

    def one(rank: int) -> Any:
        operands = (q, ks[rank], vs[rank], mask)
        results = merged_attention(*operands, *where, rank, size, "none")
        return results[0], *merged_attention_backward(grad, *operands, *results, *where, mask_grad, rank, size, "none")

    outs, dq, dk, dv, dmask = zip(*_Gathering(size).run(one), strict=True)
    assert all(torch.equal(out, outs[0]) for out in outs)
    keys = [torch.cat(x, 2).narrow(2, 0, n) for x in (dk, dv)]
    return [outs[0], torch.stack(dq).double().sum(0), *keys, *([torch.stack(dmask).sum(0)] if mask_grad else [])]


WAYS: dict[str, Callable[..., list[Tensor]]] = {"ring": _ring, "merged": _merged}


def _compare(
    way: str, size: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False,
    mask_grad: bool = False, own: float = 0.0,
) -> None:  # fmt: skip
    """``own``: how many times one device's own error, against fp64, is allowed besides."""
    grad = torch.randn_like(q)
    wanted = _one_device(q, k, v, mask, grad, causal, mask_grad)
    found = WAYS[way](size, q, k, v, mask, grad, causal, mask_grad)
    truth = [None] * len(wanted)
    if own:
        wide_mask = None if mask is None else mask.double()
        truth = _one_device(*(x.double() for x in (q, k, v)), wide_mask, grad.double(), causal, mask_grad)
    scale = max(float(x.double().norm()) for x in wanted[1:])
    for name, got, want, exact in zip(("out", "q", "k", "v", "mask"), found, wanted, truth, strict=False):
        least = 1e-3 if name == "out" else max(1e-3, 0.1 * scale)
        bound = EXACT[q.dtype] + (own * _error(want, exact, least) if exact is not None else 0.0)
        assert _error(got, want, least) <= bound, (name, size)


def _operands(dtype: torch.dtype, n: int, heads: int = 2) -> list[Tensor]:
    return [torch.randn(1, h, n, 8, dtype=torch.float64).to(dtype) for h in (2, heads, heads)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_masks_that_forbid_all(way: str, dtype: torch.dtype) -> None:
    """Rows, blocks and everything, at levels that leave nothing, something or much of a score; S below P, and odd."""
    levels = [torch.finfo(dtype).min, -1e9, -1e4] if dtype != torch.float16 else [torch.finfo(dtype).min, -1e4]
    for size, n in ((1, 5), (2, 7), (3, 13), (4, 3), (8, 19)):
        for level in levels:
            for name, mask in _masks(n, dtype, level).items():
                if size in (1, 8) and name not in ("left padding", "blocks", "beside"):
                    continue
                q, k, v = _operands(dtype, n, heads=1 + n % 2)
                # A score's last place is 1e-3 at 1e4: which way a score falls there is rounding, on one device, too.
                _compare(way, size, q, k, v, mask, own=4.0 if level == -1e4 or dtype == torch.float64 else 0.0)


@pytest.mark.parametrize("way", WAYS)
def test_a_wide_mask_beside_half_precision(way: str) -> None:
    """The smallest number of fp32 is no number of bf16; torch takes such a mask as it is."""
    for dtype, name in itertools.product((torch.bfloat16, torch.float16), ("left padding", "all", "beside")):
        mask = _masks(9, torch.float32, torch.finfo(torch.float32).min)[name]
        _compare(way, 3, *_operands(dtype, 9), mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_of_the_mask(way: str, dtype: torch.dtype) -> None:
    """Then torch writes the attention out, and keys share the gradient of a row."""
    for size, level in itertools.product((2, 3, 4), (torch.finfo(dtype).min, -1e9, -1e4)):
        for name, mask in _masks(11, dtype, level).items():
            if name != "beside":  # rows without keys have NaN there, on one device
                mask = mask.masked_fill(mask == -math.inf, level)
                _compare(way, size, *_operands(dtype, 11), mask, mask_grad=True, own=4.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spread", ["apart", "together"])
def test_scores_that_are_large_by_themselves(way: str, dtype: torch.dtype, spread: str) -> None:
    """1e4, of both signs, without a mask: all over the place, or near each other so that keys share."""
    for (size, n), sign, causal in itertools.product(((2, 9), (3, 13), (4, 17), (8, 11)), (1, -1), (False, True)):
        q, k, v = _operands(dtype, n)
        if spread == "apart":
            q, k = q * 1e2, k * (sign * 1e2)
        else:  # exact in every dtype: scores are sums of a few bits
            q, k = (torch.randint(-1, 2, x.shape).to(dtype) for x in (q, k))
            q[..., 0], k[..., 0] = 128, sign * 256
        _compare(way, size, q, k, v, causal=causal, own=4.0)
