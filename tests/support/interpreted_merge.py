"""Run by ``test_merge.py`` in a process of its own: the kernels under Triton's interpreter, which is chosen once.

Prints one line of JSON: for each case the errors against the reference.  What a kernel writes to
was filled with NaN before, and lies between guards that must stay NaN.
"""

from __future__ import annotations

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch

from fxsp.kernels.attention.merge import merge_eager, merge_operator, wide

#: Batch, heads, tokens, head dimension, dtype of each side, dtype of the result, and how the operands lie.
CASES = [
    (1, 1, 2000, 128, "float32", "float32", "float32", "plain"),
    (2, 48, 1, 64, "float32", "bfloat16", "float32", "plain"),
    (1, 3, 63, 40, "bfloat16", "bfloat16", "bfloat16", "tokens_first"),
    (2, 2, 100, 120, "float16", "float16", "float32", "sliced"),
    (1, 24, 5, 72, "float32", "float16", "float16", "tokens_first"),
    (2, 2, 63, 36, "float32", "float32", "float32", "every_other"),
    (3, 2, 7, 40, "float64", "float64", "float64", "sliced"),
    (2, 3, 33, 72, "float32", "float32", "float32", "expanded"),
    (1, 2, 3, 1, "float32", "float32", "float32", "plain"),
]
_guarded: list[tuple[torch.Tensor, int]] = []


def _guarded_empty(size, dtype=None, device=None):
    count = 1
    for n in size:
        count *= n
    whole = torch.full([count + 128], float("nan"), dtype=dtype)
    _guarded.append((whole, count))
    return whole[64 : 64 + count].view(size)


def _rows(layout, batch, heads, tokens, width, dtype):
    if layout == "tokens_first":
        return torch.randn(batch, tokens, heads, width).to(dtype).transpose(1, 2)
    if layout == "sliced":
        return torch.randn(batch, heads + 2, tokens + 3, width).to(dtype)[:, 1:-1, 2:-1]
    if layout == "every_other":
        return torch.randn(batch, heads, tokens, 2 * width).to(dtype)[..., ::2]
    if layout == "expanded":
        return torch.randn(1, heads, 1, width).to(dtype).expand(batch, heads, tokens, width)
    return torch.randn(batch, heads, tokens, width).to(dtype)


def _operands(batch, heads, tokens, width, left, right, layout):
    """Rows with keys on both sides, on one, and on none; where there was none, the output holds NaN."""
    operands = []
    for side, name in enumerate((left, right)):
        dtype = getattr(torch, name)
        x = _rows(layout, batch, heads, tokens, width, dtype)
        lse = 10 * torch.randn(batch, tokens, heads, dtype=wide(dtype)).transpose(1, 2)
        rows = torch.arange(batch * heads * tokens).view(batch, heads, tokens)
        blind = (rows % 7 == 3 + side) | (rows % 11 == 5)
        if layout == "expanded":
            lse = lse[..., :1].expand(batch, heads, tokens)
            blind = torch.zeros_like(blind)
        else:
            lse = lse.masked_fill(blind, float("-inf"))
            x[blind] = float("nan")
        operands += [x, lse]
    return operands


def _error(got, expected):
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return f"{got.dtype} {tuple(got.shape)} instead of {expected.dtype} {tuple(expected.shape)}"
    both = (got == float("-inf")) & (expected == float("-inf"))
    got, expected = (x.double().masked_fill(both, 0) for x in (got, expected))
    return ((got - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def _run(batch, heads, tokens, width, left, right, result, layout):
    operands = _operands(batch, heads, tokens, width, left, right, layout)
    dtype = getattr(torch, result)
    _guarded.clear()
    got = merge_operator()(*operands, dtype)
    expected = merge_eager(*operands, dtype)
    guards = all(g.isnan().all() for whole, n in _guarded for g in (whole[:64], whole[64 + n :]))
    return {
        "case": f"{batch}x{heads}x{tokens}x{width} {left} {right} {result} {layout}",
        "forward": [_error(a, b) for a, b in zip(got, expected, strict=True)],
        "guards": bool(guards),
        "written": len(_guarded) == 2,
    }


def _far():
    """Rows more than 2^31 elements apart: of 4 GiB that are reserved, a few pages are touched."""
    step = 2**31
    room = torch.empty_strided((step + 4096,), (1,), dtype=torch.int16).view(torch.bfloat16)
    x = room.as_strided((1, 2, 3, 16), (0, step, 16, 1))
    x.copy_(torch.randn(1, 2, 3, 16))
    lse = torch.randn(1, 2, 3)
    got = merge_operator()(x, lse, x, lse + 1, torch.float32)
    expected = merge_eager(x, lse, x, lse + 1, torch.float32)
    return {"case": "far apart", "forward": [_error(a, b) for a, b in zip(got, expected, strict=True)]}


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    import fxsp.kernels.attention.triton_merge

    class _Torch:
        """``torch`` for the module under test, with an ``empty`` that is watched."""

        empty = staticmethod(_guarded_empty)

        def __getattr__(self, name):
            return getattr(torch, name)

    fxsp.kernels.attention.triton_merge.torch = _Torch()
    results = [_run(*case) for case in CASES]
    sys.stdout.write(json.dumps([*results, _far()]) + "\n")
