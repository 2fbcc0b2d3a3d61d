"""What each rank computes in a ring, with threads as ranks and a table as network, against attention on one device."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fxsp.kernels import collectives
from fxsp.kernels.attention.merge import join, merge
from fxsp.kernels.attention.ring import ring_attention, ring_attention_backward
from fxsp.kernels.attention.ring_blocks import chunks_of, meetings
from fxsp.kernels.attention.ring_kernels import block_forward
from fxsp.simulation.reference import ops as meaning
from fxsp.simulation.reference import table as oracle

MASKS = ("none", "bool", "additive", "per_head", "padding", "causal", "no_key", "smallest")
HEADS = ((4, 4, 4), (4, 2, 4), (3, 1, 4), (2, 2, 3))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def _tokens(size: int) -> list[tuple[list[int], list[bool]]]:
    return [
        ([2 * size], [False]),
        ([2 * size + 1], [False]),
        ([3, 2 * size + 1], [False, False]),
        ([3, 2 * size - 1], [True, False]),
        ([2 * size - 1, 3], [False, True]),
        ([max(size - 1, 1)], [False]),
        ([1], [False]),
    ]


class Network:
    """Messages between threads; in the place of the two collectives that a ring uses."""

    def __init__(self) -> None:
        self.box: dict[tuple[int, int], Tensor] = {}
        self.came = threading.Condition()
        self.mine = threading.local()
        self.elements: list[int] = []

    def start_shift(self, x: Tensor, by: int, rank: int, size: int, group: str) -> Any:
        number = self.mine.sent = getattr(self.mine, "sent", -1) + 1
        with self.came:
            self.box[number, (rank + by) % size] = x.clone()
            self.elements.append(x.numel())
            self.came.notify_all()
        return number, rank

    def wait(self, pending: Any) -> Tensor:
        with self.came:
            assert self.came.wait_for(lambda: pending in self.box, 30)
            return self.box.pop(pending)


def on_ranks(size: int, function: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], Network]:
    network = Network()
    monkeypatch.setattr(collectives, "start_shift", network.start_shift)
    monkeypatch.setattr(collectives, "wait", network.wait)
    results: list[Any] = [None] * size
    failures: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            results[rank] = function(rank)
        except BaseException as error:  # shown by the test  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results, network


def _mask(kind: str, heads: int, length: int) -> Tensor | None:
    if kind == "additive":
        return torch.randn(2, 1, length, length, requires_grad=True)
    if kind == "smallest":
        # As transformers writes masks; the last row may attend to nothing, and so attends equally to all keys.
        mask = torch.zeros(1, 1, length, length).masked_fill(torch.rand(length, length) > 0.5, torch.finfo().min)
        mask[..., -1, :] = torch.finfo().min
        return mask
    shapes = {
        "bool": (length, length),
        "per_head": (heads, length, length),
        "padding": (2, 1, 1, length),
        "no_key": (length, length),
    }
    if kind not in shapes:
        return None
    allowed = torch.rand(shapes[kind]) > 0.5
    allowed[..., 0] = True
    if kind == "no_key":
        allowed[0] = False
    return allowed


def _error(a: Tensor, b: Tensor, least: float = 1e-3) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=least))


def check(
    size: int, tokens: tuple[list[int], list[bool]], kind: str, heads: tuple[int, int, int], dtype: torch.dtype,
    tolerance: float, monkeypatch: pytest.MonkeyPatch,
) -> Network:  # fmt: skip
    """Output and gradients of every rank against one device in fp32."""
    lengths, whole = tokens
    length = sum(lengths)
    hq, hkv, width = heads
    q, k, v = (torch.randn(2, h, length, w) for h, w in ((hq, 4), (hkv, 4), (hkv, width)))
    leaves = [x.to(dtype).float().requires_grad_() for x in (q, k, v)]
    mask, causal = _mask(kind, hq, length), kind == "causal"
    if kind == "additive":
        assert mask is not None
        leaves.append(mask)
    # As one device does, by the kernel that torch takes.
    want = F.scaled_dot_product_attention(*leaves[:3], mask, 0.0, causal, enable_gqa=True)
    grad = torch.randn_like(want)
    wanted = torch.autograd.grad(want, leaves, grad)

    def local(x: Tensor, dim: int, zero_pads: bool = False) -> oracle.Lanes:
        return meaning.shard(oracle.Lanes([x.detach()] * size), dim, lengths, whole, zero_pads, size=size)

    qs, ks, vs = (local(x.to(dtype), 2) for x in leaves[:3])
    rows = mask is not None and (kind != "padding")
    masks = local(mask, mask.dim() - 2) if mask is not None and rows else [mask] * size
    # Of rows that are whole on every rank each has a summand: here rank 0 all of it.
    grads = meaning.mask_pads(local(grad.to(dtype), 2, True), 2, lengths, whole, size=size)

    def one(rank: int) -> Any:
        with torch.no_grad():
            operands = (qs[rank], ks[rank], vs[rank], masks[rank])
            layout = (lengths, whole, lengths, whole, causal, None)
            place = (1, rank, size, "")
            out, *sums = ring_attention(*operands, *layout, *place)
            back = ring_attention_backward(grads[rank], *operands, out, *sums, *layout, kind == "additive", *place)
            return out, back

    results, network = on_ranks(size, one, monkeypatch)
    out = meaning.gather(oracle.Lanes([r[0] for r in results]), 2, lengths, whole, size=size)[0]
    assert _error(out, want) <= tolerance
    for i, expected in enumerate(wanted):
        found = meaning.gather_sum(oracle.Lanes([r[1][i] for r in results]), 2, lengths, whole, size=size)[0]
        # Where all rows see one key the gradient of the scores is zero, but for the rounding of the processor's kernel.
        assert _error(found, expected, max(0.1 * float(wanted[2].norm()), 1e-3)) <= tolerance, "qkvm"[i]
    return network


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", MASKS)
def test_every_length_and_head_count(kind: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32; ``no_key`` has a row that may attend to nothing: zeros, as on one device."""
    for tokens, heads in itertools.product(_tokens(size), HEADS if size < 8 else HEADS[1:2]):
        check(size, tokens, kind, heads, torch.float32, 1e-5, monkeypatch)


@pytest.mark.parametrize("kind", ["none", "bool", "causal"])
def test_half_precision(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for tokens in _tokens(4)[1:4]:
        check(4, tokens, kind, (4, 2, 4), torch.bfloat16, 1e-2, monkeypatch)


def test_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values P-1 times forward and again backward, their gradients P-1 times; on every rank."""
    size = 4
    network = check(size, ([9], [False]), "none", (4, 2, 4), torch.float32, 1e-5, monkeypatch)
    local = 2 * 3 * 2 * (4 + 4)
    assert network.elements == [local] * (size * 3 * (size - 1))


def test_merging_blocks_is_attention_over_both() -> None:
    q, k, v = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
    want, *sums = block_forward(q, k, v, None, False, 0.3)
    halves = [block_forward(q, k[:, :, s], v[:, :, s], None, False, 0.3) for s in (slice(0, 3), slice(3, 7))]
    out, level, rest = join(*halves[0], *halves[1])
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(level + rest, sum(sums))


def test_merging_with_blocks_that_nobody_sees() -> None:
    """``-inf`` in one of them is the other; in both it is zeros and ``-inf``, and no NaN."""
    out, lse = torch.randn(2, 3), torch.tensor([0.5, float("-inf")])
    nothing, never = torch.zeros(2, 3), torch.full((2,), float("-inf"))
    for a, b in (((out, lse), (nothing, never)), ((nothing, never), (out * torch.tensor([[1.0], [0.0]]), lse))):
        merged, total = merge(*a, *b)
        torch.testing.assert_close(merged[0], out[0])
        assert not merged[1].any()
        assert total.tolist() == [0.5, float("-inf")]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_keys_of_the_future_are_skipped(size: int) -> None:
    """One call for the rank itself and one for each rank before it; none for a rank after it."""
    lengths, whole = [4 * size], [False]
    for place in range(size):
        mine = chunks_of(lengths, whole, 1, size, place)
        calls = [meetings(mine, chunks_of(lengths, whole, 1, size, other), True, True) for other in range(size)]
        assert [[m.how for m in c] for c in calls] == [
            ["full"] if other < place else ["causal"] if other == place else [] for other in range(size)
        ]
