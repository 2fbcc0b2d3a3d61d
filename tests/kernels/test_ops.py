"""Registration of the fxsp ops: schemas, shapes and strides, dtypes, no aliasing.  Meaning: see ``test_adjoints``."""

from __future__ import annotations

import pytest
import torch

from fxsp.kernels.attention.ops import ATTENTIONS
from fxsp.kernels.exchange import exchange
from fxsp.kernels.exchange.exchange import HEADS
from fxsp.kernels.extremes import EXTREMES
from fxsp.kernels.lowering import known_dense
from fxsp.kernels.ops import OPS
from fxsp.simulation.reference import ops as meaning
from fxsp.simulation.reference import table as oracle

fx = torch.ops.fxsp
GROUP = "0"
SEGMENTS = ([3, 4], [True, False])

ALONE = {
    "annotate": lambda x: (x, "shard", 1, -1, "entry"),
    "shard": lambda x: (x, 1, *SEGMENTS, False, 0, 1, ""),
    "gather": lambda x: (x, 1, *SEGMENTS, 0, 1, ""),
    "gather_used": lambda x: (x, 1, *SEGMENTS, 0, 1, ""),
    "gather_sum": lambda x: (x, 1, *SEGMENTS, 0, 1, ""),
    "reduce_scatter": lambda x: (x, 1, *SEGMENTS, 0, 1, ""),
    "all_reduce": lambda x: (x, ""),
    "reduce_grad": lambda x: (x, ""),
    "use": lambda x: (x, ""),
    "scale_grad": lambda x: (x, 2),
    "all_to_all": lambda x: (x[None], ""),
    "all_to_all_within": lambda x: (x[None], 0, 1, ""),
    "mask_pads": lambda x: (x, 1, *SEGMENTS, 0, 1),
    "scale_whole": lambda x: (x, 1, *SEGMENTS, 1),
    "positions": lambda x: (*SEGMENTS, 0, 1, x.device),
    "place_positions": lambda x: (*SEGMENTS, 1, 0, 1, x.device),
    "deal": lambda x: (x, 1, [3, 4], [False, True], False, 1),
    "undeal": lambda x: (x, 1, [3, 4], [False, True], 1),
    "take": lambda x: (x, 1, 0, 1),
    "put": lambda x: (x, 1, 0, 1),
    "pack": lambda x: (x.transpose(0, 1), [3, 4], 1, False),
    "unpack": lambda x: (x.transpose(0, 1)[None], [3, 4], 1),
}


def test_every_op_has_a_meaning_and_a_check():
    """The others have tests of their own: below, and maxima where passes write them (``test_extremes``)."""
    assert {op.name for op in OPS} == set(ALONE) | {op.name for op in (*HEADS, *ATTENTIONS, *EXTREMES)}


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck_ring_attention(masked):
    q, k, v = (torch.randn(2, h, 7, w, requires_grad=True) for h, w in ((4, 8), (2, 8), (2, 6)))
    mask = torch.randn(7, 7, requires_grad=True) if masked else None
    args = (q, k, v, mask, *SEGMENTS, *SEGMENTS, not masked, None, 1, 0, 1, "")
    torch.library.opcheck(fx.ring_attention.default, args)


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck_merged_attention(masked):
    q, k, v = (torch.randn(2, h, n, w, requires_grad=True) for h, n, w in ((4, 3, 8), (2, 7, 8), (2, 7, 6)))
    mask = torch.randn(3, 7, requires_grad=True) if masked else None
    torch.library.opcheck(fx.merged_attention.default, (q, k, v, mask, *SEGMENTS, not masked, None, 0, 1, ""))


@pytest.mark.parametrize("rows", [7, 9])
@pytest.mark.parametrize(("heads", "fuse"), [((4,), False), ((4, 2, 2), True)])
def test_opcheck_heads(heads, fuse, rows):
    xs = [torch.randn(2, 7, h, 3).transpose(1, 2).requires_grad_() for h in heads]
    torch.library.opcheck(fx.pack_heads.default, (xs, rows, False, 2, fuse))
    packed = torch.randn(2, rows, 2 * sum(heads) // 2, 3, requires_grad=True)
    torch.library.opcheck(fx.unpack_heads.default, (packed, [h // 2 for h in heads], 7, fuse))


@pytest.mark.parametrize("rows", [7, 9])
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("heads", [(4,), (4, 2, 2)])
def test_heads_mean_what_the_oracle_says(heads, rows, fuse):
    """Values, and gradients by duality: both only move elements."""
    xs = [torch.randn(2, h, 7, 3, dtype=torch.float64, requires_grad=True) for h in heads]
    local = [h // 2 for h in heads]
    for zero_pads in (True, False):
        packed = fx.pack_heads(xs, rows, zero_pads, 2, fuse)
        for expected in (
            meaning.pack_heads([oracle.Lanes([x]) for x in xs], rows, zero_pads, 2)[0],
            exchange.pack_heads(xs, rows, zero_pads, 2),
        ):
            torch.testing.assert_close(packed, expected, rtol=0, atol=0)
    grad = torch.randn_like(packed)
    for x, g in zip(xs, torch.autograd.grad(packed, xs, grad), strict=True):
        # Pads are dropped, so that the adjoint is that of the rows that are no pads.
        expected = torch.autograd.grad(exchange.pack_heads(xs, rows, True, 2), x, grad)[0]
        torch.testing.assert_close(g, expected, rtol=0, atol=0)
    unpacked = fx.unpack_heads(packed, local, 7, fuse)
    torch.testing.assert_close(unpacked, torch.cat([x.transpose(1, 2) for x in xs], 2), rtol=0, atol=0)
    received = packed.detach().requires_grad_()
    back = fx.unpack_heads(received, local, 7, fuse)
    torch.testing.assert_close(back, meaning.unpack_heads(oracle.Lanes([received]), local, 7)[0], rtol=0, atol=0)
    plain = exchange.unpack_heads(received, local, 7)
    torch.testing.assert_close(back, plain, rtol=0, atol=0)
    grad = torch.randn_like(back)
    found, expected = (torch.autograd.grad(y, received, grad)[0] for y in (back, plain))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(ALONE))
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_opcheck_alone(name, layout):
    x = torch.randn(2, 7, 3) if layout == "contiguous" else torch.randn(3, 7, 2).permute(2, 1, 0)
    args = tuple(a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in ALONE[name](x))
    torch.library.opcheck(getattr(fx, name).default, args)


@pytest.mark.parametrize("name", sorted(set(ALONE) - {"positions", "place_positions"}))
def test_alone_every_op_is_a_copy(name):
    x, *rest = ALONE[name](torch.randn(2, 7, 3))
    y = getattr(fx, name)(x, *rest)
    assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    torch.testing.assert_close(y.view(x.shape), x)


def test_identity_keeps_strides_of_any_tensor():
    for x in (torch.randn(3, 1).expand(3, 4), torch.randn(4, 6)[:, 1:5:2], torch.randn(2, 3).mT, torch.randn(0, 3)):
        y = fx.use(x, GROUP)
        assert (y.shape, y.stride()) == (x.shape, x.stride())
        torch.testing.assert_close(y, x)


def test_known_dense():
    assert known_dense(torch.empty(2, 3, 4).permute(2, 0, 1))
    assert known_dense(torch.empty(1, 3).as_strided((1, 3), (100, 1)))
    assert not known_dense(torch.empty(4, 6)[:, :3])
    assert not known_dense(torch.empty(3, 1).expand(3, 2))


def run_shapes(rank, size):
    """What the fakes promise is what the kernels return."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for lengths, whole in (([7], [False]), ([1], [False]), ([3, 4], [True, False]), ([2, 5, 4], [False, True, False])):
        local = sum(n if w else -(-n // size) for n, w in zip(lengths, whole, strict=True))
        at = (1, lengths, whole)
        for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
            whole_x, local_x = (
                torch.randn(*(shape[i] for i in order)).permute(*(order.index(i) for i in range(3)))
                for shape in ((2, sum(lengths), 6), (2, local, 6))
            )
            calls = [
                (fx.shard, whole_x, *at, False, rank, size, GROUP),
                (fx.shard, whole_x, *at, True, rank, size, GROUP),
                (fx.reduce_scatter, whole_x, *at, rank, size, GROUP),
                (fx.gather, local_x, *at, rank, size, GROUP),
                (fx.gather_used, local_x, *at, rank, size, GROUP),
                (fx.gather_sum, local_x, *at, rank, size, GROUP),
                (fx.mask_pads, local_x, *at, rank, size),
                (fx.scale_whole, local_x, *at, size),
                (fx.all_reduce, local_x, GROUP),
                (fx.use, local_x, GROUP),
                (fx.take, whole_x, 2, rank, size),
                (fx.put, whole_x, 2, rank, size),
            ]
            for op, x, *rest in calls:
                y = op(x, *rest)
                with FakeTensorMode() as mode:
                    fake = op(mode.from_tensor(x), *rest)
                assert (fake.shape, fake.dtype) == (y.shape, y.dtype), (op, lengths, whole, order)
                assert strides(fake) == strides(y), (op, lengths, whole, order)
                assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def strides(x):
    return [s for n, s in zip(x.shape, x.stride(), strict=True) if n != 1]


@pytest.mark.parametrize("size", [2, 3])
def test_fakes_promise_what_kernels_return(ranks, size):
    ranks(size).run(run_shapes)


def run_dtypes(rank, size):
    results = {}
    at = (0, [5], [False], rank, size)
    for dtype in (torch.bool, torch.int64, torch.bfloat16, torch.float16, torch.float64):
        x = (torch.arange(5) % 2 if dtype == torch.bool else torch.arange(5)).to(dtype)
        mine = fx.shard(x, *at[:3], False, *at[3:], GROUP)
        results[dtype] = (
            fx.gather(mine, *at, GROUP),
            fx.all_reduce(x, GROUP),
            fx.reduce_scatter(x, *at, GROUP),
            fx.all_to_all(x[:size, None], GROUP),
        )
    # 256 + 1 is 256 in bf16: summed one after the other the ones would be lost.
    results["sum"] = fx.all_reduce(torch.tensor([256.0 if rank == 0 else 1.0]).bfloat16(), GROUP)
    return results


def test_dtypes(ranks):
    size = 3
    for rank, results in enumerate(ranks(size).run(run_dtypes)):
        assert results.pop("sum").item() == 258
        for dtype, (gathered, summed, scattered, exchanged) in results.items():
            x = (torch.arange(5) % 2 if dtype == torch.bool else torch.arange(5)).to(dtype)
            total = x if dtype == torch.bool else x * size
            assert {t.dtype for t in (gathered, summed, scattered, exchanged)} == {dtype}
            torch.testing.assert_close(gathered, x)
            torch.testing.assert_close(summed, total)
            expected = torch.cat([total, total.new_zeros(1)])[2 * rank : 2 * rank + 2]
            torch.testing.assert_close(scattered, expected)
            torch.testing.assert_close(exchanged, x[rank].expand(size, 1))
