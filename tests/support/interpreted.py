"""Cases for Triton's interpreter, each kernel against its eager twin, in a process of their own.

The interpreter takes as long for a small tile as for a large one: where many tokens, or gradients, are moved, tiles are
taller than those of a GPU.

``TRITON_INTERPRET=1`` has to be set before Triton is imported, so ``test_exchange_kernels.py`` runs this file as a
program: it prints one line of JSON, case -> error (empty: the case passed).  What a kernel does not write is NaN.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

import fxsp.kernels.ops  # noqa: F401
import twins
from fxsp.kernels import collectives, lowering
from fxsp.kernels.exchange import exchange, place

F32, BF16 = torch.float32, torch.bfloat16
#: (tokens, rows of a block, ranks, batch, heads of q, k, v on a rank, head dimension, layout, dtype): every length,
#: head count, head dimension, layout and dtype that is promised, in small products.
HEADS = {
    "one token": (1, 1, 2, 2, (1, 1, 1), 40, "tokens", F32),
    "one token, pads": (1, 4, 3, 1, (2, 1, 1), 64, "heads", BF16),
    "63 tokens, 48 heads": (63, 63, 2, 1, (24, 24, 24), 72, "tokens", BF16),
    "63 tokens, pads": (63, 70, 4, 2, (1, 2), 120, "expanded", F32),
    "100 tokens, grouped": (100, 100, 2, 2, (4, 1, 1), 128, "fused", BF16),
    "100 tokens, one tensor": (100, 101, 8, 1, (3,), 40, "odd", F32),
    "100 tokens, fp16": (100, 103, 1, 1, (5, 5, 5), 120, "turned", torch.float16),
    "2000 tokens": (2000, 2000, 4, 1, (1, 1, 1), 64, "tokens", BF16),
    "2000 tokens, pads": (2000, 2003, 1, 1, (1,), 72, "heads", torch.float64),
}
SEGMENTS = {
    "one token": ([1], [False], 3),
    "one of 63": ([63], [False], 4),
    "one of 100": ([100], [False], 2),
    "one of 2000": ([2000], [False], 8),
    "two": ([7, 63], [False, False], 4),
    "fewer tokens than ranks": ([2, 5, 1], [False, False, False], 4),
    "whole ones": ([5, 100, 3], [True, False, True], 3),
    "seven": ([3, 1, 4, 1, 5, 9, 2], [False, True, False, False, False, True, False], 2),
    "one rank": ([3, 4], [False, True], 1),
    "an empty one": ([3, 0, 4], [False, False, False], 2),
}
#: Inner dimensions, where the rows stand in the results, layout and dtype.
ROWS = {
    "hidden": ((72,), 0, "plain", F32),
    "batch": ((2, 40), 1, "plain", F32),
    "heads": ((2, 3, 8), 0, "turned", BF16),
    "heads in front": ((2, 3, 40), 2, "turned", BF16),
    "odd": ((3, 5), 1, "odd", torch.float64),
    "expanded": ((4, 6), 0, "expanded", torch.float16),
    "scalars": ((), 0, "plain", F32),
}


def tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def heads_tensor(batch: int, heads: int, tokens: int, width: int, layout: str, dtype: torch.dtype) -> torch.Tensor:
    """``[batch, heads, tokens, width]``, with strides as models have them, and as they should not."""
    if layout == "tokens":  # a linear layer's result
        return tensor((batch, tokens, heads, width), dtype).transpose(1, 2)
    if layout == "fused":  # a part of the result of one linear layer for q, k and v
        return tensor((batch, tokens, 3, heads, width), dtype)[:, :, 1].transpose(1, 2)
    if layout == "expanded":
        return tensor((batch, 1, tokens, width), dtype).expand(batch, heads, tokens, width)
    if layout == "odd":
        return tensor((batch, heads, tokens + 1, 2 * width + 1), dtype)[:, :, 1:, 1::2]
    if layout == "turned":
        return tensor((batch, heads, width, tokens), dtype).mT
    return tensor((batch, heads, tokens, width), dtype)


def rows_tensor(rows: int, inner: tuple[int, ...], layout: str, dtype: torch.dtype) -> torch.Tensor:
    """``[rows, *inner]``."""
    if layout == "turned":
        return tensor((*inner, rows), dtype).movedim(-1, 0)
    if layout == "odd":
        return tensor((2 * rows, *inner[:-1], 3 * inner[-1]), dtype)[::2, ..., ::3]
    if layout == "expanded":
        return tensor((rows, 1, *inner[1:]), dtype).expand(rows, *inner)
    return tensor((rows, *inner), dtype)


def equal(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.is_contiguous()
    assert not expected.isnan().any()
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def check_heads(case: str) -> None:
    tokens, rows, size, batch, heads, width, layout, dtype = HEADS[case]
    xs = [heads_tensor(batch, size * h, tokens, width, layout, dtype) for h in heads]
    ops = place.kernels(xs[0], (width,))
    for zero_pads in (False, True) if rows > tokens else (False,):
        packed = ops.pack_heads(xs, rows, zero_pads, size)
        equal(packed, twins.pack_heads(xs, rows, zero_pads, size))
    equal(ops.unpack_heads(packed, list(heads), tokens), torch.cat([x.transpose(1, 2) for x in xs], 2).contiguous())
    odd = torch.cat([packed, packed], -1)[..., ::2]
    equal(ops.unpack_heads(odd, list(heads), tokens), twins.unpack_heads(odd, heads, tokens))


def check_rows(case: str, segments: str) -> None:
    inner, dim, layout, dtype = ROWS[case]
    lengths, whole, size = SEGMENTS[segments]
    x = rows_tensor(sum(lengths), inner, layout, dtype)
    ops = place.kernels(x, inner)
    args = (x, lengths, whole, size)
    equal(ops.pack_rows(*args, True, 0, size, dim), twins.pack_rows(*args, True, 0, size, dim))
    packed = ops.pack_rows(*args, False, 0, size, dim)
    equal(packed, twins.pack_rows(*args, False, 0, size, dim))
    last = size - 1
    equal(ops.pack_rows(*args, False, last, 1, dim), packed[last:])
    back = ops.unpack_rows(packed.movedim(dim + 1, 1), lengths, whole, size, last, dim)
    equal(back, x.movedim(0, dim).contiguous())
    equal(back, twins.unpack_rows(packed.movedim(dim + 1, 1), lengths, whole, size, last, dim))


#: Shape, dimension of the tokens, lengths, whole, ranks, dtype: activations around their collectives.
ACTIVATIONS = {
    "one segment, pads": ((2, 7, 40), 1, [7], [False], 3, F32),
    "two segments, middle dimension": ((2, 3 + 8, 72), 1, [3, 8], [False, False], 4, BF16),
    "heads in front": ((2, 3, 5 + 4, 8), 2, [5, 4], [False, False], 2, F32),
    "fewer tokens than ranks": ((2 + 1, 64), 0, [2, 1], [False, False], 4, torch.float16),
    "a whole one": ((1, 5 + 9, 64), 1, [5, 9], [True, False], 2, F32),
}


def check_activations(case: str) -> None:
    """Shard, gather and reduce-scatter by the kernels are those by plain operations, forward and backward."""
    shape, dim, lengths, whole, size, dtype = ACTIVATIONS[case]
    x = tensor(shape, dtype)
    sent: list[torch.Tensor] = []

    def all_gather(send: torch.Tensor, size: int, group: str) -> torch.Tensor:
        sent.append(send)
        return torch.cat(blocks) if blocks else torch.cat([send] * size)

    def reduce_scatter(send: torch.Tensor, size: int, group: str) -> torch.Tensor:
        sent.append(send)
        return send.contiguous().unflatten(0, (size, -1))[size - 1]

    found = []
    fakes = {"all_gather": all_gather, "reduce_scatter": reduce_scatter}
    with mock.patch.multiple(collectives, **fakes):
        for interpreted in (True, False):
            with mock.patch.object(place, "_INTERPRETED", interpreted):
                results = []
                for zero_pads in (False, True):
                    args = (dim, lengths, whole, zero_pads)
                    results += [lowering.shard(x, *args, r, size, "") for r in range(size)]
                blocks: list[torch.Tensor] = []
                sent.clear()
                local = results[:size]
                for lane in local:
                    lowering.gather(lane, dim, lengths, whole, 0, size, "")
                blocks = [send.contiguous() for send in sent]
                whole_again = lowering.gather(local[0], dim, lengths, whole, 0, size, "")
                torch.testing.assert_close(whole_again, x, rtol=0, atol=0)
                results += [whole_again, lowering.reduce_scatter(x, dim, lengths, whole, 0, size, "")]
                found.append(results)
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def check_gradients(case: str) -> None:
    """The differentiable operators, by the kernels forward and backward, against plain operations."""
    tokens, rows, size, batch, heads, width, layout, dtype = HEADS[case]
    xs = [heads_tensor(batch, size * h, tokens, width, layout, dtype).detach().requires_grad_() for h in heads]
    for fuse in (False, True):
        packed = torch.ops.fxsp.pack_heads(xs, rows, True, size, fuse)
        given = tensor(tuple(packed.shape), dtype)
        grads = torch.autograd.grad(packed, xs, given)
        with mock.patch.object(place, "_INTERPRETED", False):
            plain = exchange.pack_heads(xs, rows, True, size)
        for got, expected in zip(grads, torch.autograd.grad(plain, xs, given), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
        received = packed.detach().requires_grad_()
        back = torch.ops.fxsp.unpack_heads(received, list(heads), tokens, fuse)
        given = tensor(tuple(back.shape), dtype)
        (grad,) = torch.autograd.grad(back, received, given)
        with mock.patch.object(place, "_INTERPRETED", False):
            plain = exchange.unpack_heads(received, list(heads), tokens)
        torch.testing.assert_close(grad, torch.autograd.grad(plain, received, given)[0], rtol=0, atol=0)


def check_row_gradients(segments: str) -> None:
    lengths, _, size = SEGMENTS[segments]
    x = rows_tensor(sum(lengths), (2, 3, 8), "turned", F32).requires_grad_()
    for op in ("pack", "unpack"):
        arguments = (lengths, size, True) if op == "pack" else (lengths, size)
        run = getattr(torch.ops.fxsp, op)
        out = run(x, *arguments)
        given = tensor(tuple(out.shape), F32)
        (grad,) = torch.autograd.grad(out, x, given)
        with mock.patch.object(place, "_INTERPRETED", False):
            plain = getattr(exchange, op)(x, *arguments)
        torch.testing.assert_close(out, plain, rtol=0, atol=0)
        torch.testing.assert_close(grad, torch.autograd.grad(plain, x, given)[0], rtol=0, atol=0)
        x = out.detach().requires_grad_()


def check_poison() -> None:
    """What is not written is NaN: the other cases would see it."""
    assert torch.zeros(3).new_empty(3, 4).isnan().all()


#: Cases whose tiles have that many times the rows of a GPU's.
TALL = {"2000 tokens": 16, "one of 2000": 16, "gradients of heads": 4}


def tiles(case: str) -> Any:
    """A context in which the kernels' tiles are as tall as is right for the case."""
    from fxsp.kernels import triton_ops

    times = max((times for part, times in TALL.items() if part in case), default=1)
    usual = triton_ops.tile

    def tall(elements: Any, itemsize: int) -> tuple[int, int]:
        rows, across = usual(elements, itemsize)
        return rows * times, across

    return mock.patch.object(triton_ops, "tile", tall)


def cases() -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {"poison": check_poison}
    for case in HEADS:
        found[f"heads, {case}"] = lambda case=case: check_heads(case)
    for case in ROWS:
        for segments in SEGMENTS:
            if segments in ("two", "whole ones") or case == ("hidden" if "2000" in segments else "heads in front"):
                found[f"rows, {case}, {segments}"] = lambda case=case, segments=segments: check_rows(case, segments)
    for case in ACTIVATIONS:
        found[f"activations, {case}"] = lambda case=case: check_activations(case)
    for case in ("one token, pads", "63 tokens, pads", "100 tokens, grouped"):
        found[f"gradients of heads, {case}"] = lambda case=case: check_gradients(case)
    for case in ("one of 63", "two", "fewer tokens than ranks"):
        found[f"gradients of rows, {case}"] = lambda case=case: check_row_gradients(case)
    return found


def main(only: list[str]) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    errors = {}
    with mock.patch.object(place, "_INTERPRETED", True):
        for name, run in cases().items():
            if only and name not in only:
                continue
            torch.manual_seed(0)
            try:
                with tiles(name):
                    run()
            except Exception:  # noqa: BLE001  reported by the test of this case
                errors[name] = traceback.format_exc()
            else:
                errors[name] = ""
    print(json.dumps(errors))


if __name__ == "__main__":
    main(sys.argv[1:])
