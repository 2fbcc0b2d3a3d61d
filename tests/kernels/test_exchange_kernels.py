"""The Triton kernels of the exchange without a GPU: interpreted, and compiled for GPUs that are not here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import interpreted
from crosscompile import fake_gpu
from fxsp.passes.emit.emit import emit

triton = pytest.importorskip("triton")


@pytest.fixture(scope="module")
def errors() -> dict[str, str]:
    """Case -> what went wrong."""
    path = Path(__file__).parents[1] / "support" / "interpreted.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, path], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("case", interpreted.cases())
def test_interpreted(errors, case):
    if errors[case]:
        pytest.fail(errors[case], pytrace=False)


# Compiled for GPUs that are not here.

#: Kernel -> (pointers, strides that are one in an aligned tensor, other constants).
KERNELS = {
    "pack_heads_kernel": ("q k v out", "qd kd vd", {"HQ": 3, "HK": 1, "HV": 1, "ZERO": False}),
    "unpack_heads_kernel": ("x out", "xd", {"HQ": 3, "HK": 1, "HV": 1}),
    "pack_rows_kernel": ("x out", "xd od", {"H": 3, "WHOLE": 2, "ZERO": True}),
    "unpack_rows_kernel": ("x out", "xd od", {"H": 3, "WHOLE": 2}),
}
WIDTHS = [("bf16", 2, 128), ("bf16", 2, 40), ("fp32", 4, 72), ("fp16", 2, 64), ("bf16", 2, 120)]


def compiled(name, dtype, itemsize, width, target):
    """The kernel as it is launched for aligned tensors of this dtype and head dimension."""
    from triton.compiler import ASTSource

    from fxsp.kernels.exchange import triton_heads, triton_rows
    from fxsp.kernels.triton_ops import tile, unit

    kernel = getattr(triton_heads, name, None) or getattr(triton_rows, name)
    pointers, ones, constants = KERNELS[name]
    rows, across = tile(3 * width, itemsize)
    per = unit(itemsize, width, (9 * width, 1))
    constants = {**constants, "D": width, "UNIT": per, "BLOCK_L": rows, "BLOCK_E": across}
    constants |= dict.fromkeys(ones.split(), 1)
    kinds = {
        n: "constexpr" if n in constants else f"*{dtype}" if n in pointers.split() else "i32" for n in kernel.arg_names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n in pointers.split()}
    return triton.compile(ASTSource(kernel, kinds, constants, aligned), target=target)


def targets():
    from triton.backends.compiler import GPUTarget

    return {
        "sm_80": GPUTarget("cuda", 80, 32),
        "sm_90": GPUTarget("cuda", 90, 32),
        "sm_100": GPUTarget("cuda", 100, 32),
        "gfx942": GPUTarget("hip", "gfx942", 64),
    }


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    # No kernel here multiplies and adds floating-point numbers; Triton wants the choice to be made.
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


@pytest.mark.parametrize("width", WIDTHS, ids=lambda w: f"{w[0]}-{w[2]}")
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("name", KERNELS)
def test_compiled_for_nvidia(name, target, width, tmp_path):
    """16 bytes at each load and store, and no register spills."""
    binary = compiled(name, *width, targets()[target])
    moves = re.findall(r"(?:ld|st)\.global\S*", binary.asm["ptx"])
    assert {m.split(".")[0] for m in moves} == {"ld", "st"}
    assert all(re.search(r"\.v4\.[bfu]32|\.v2\.[bfu]64", m) for m in moves), moves
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    usage = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    assert re.search(r"STACK:0 .*LOCAL:0 ", usage), usage


@pytest.mark.parametrize("name", KERNELS)
def test_compiled_for_amd(name):
    binary = compiled(name, "bf16", 2, 128, targets()["gfx942"])
    moves = re.findall(r"(?:global|buffer)_(?:load|store)_\w+", binary.asm["amdgcn"])
    assert moves
    assert all(m.endswith("dwordx4") for m in moves), moves
    assert re.search(r"\.vgpr_spill_count:\s+0\b", binary.asm["amdgcn"])


def test_an_unaligned_tensor_moves_less_at_a_time(tmp_path):
    """What the test above looks at does tell: three elements of bf16 side by side are no 16 bytes."""
    binary = compiled("pack_heads_kernel", "bf16", 2, 3, targets()["sm_90"])
    moves = re.findall(r"(?:ld|st)\.global\S*", binary.asm["ptx"])
    assert not any(".v4.b32" in m for m in moves)


# Graphs of a GPU that is not here.

_SEGMENTS = [3, 8], [False, False]
#: Operator, what it is called with, and rows -> our kernels in what is emitted for two ranks.
EMITTED = {
    "gather of two segments": ("gather", (*_SEGMENTS, 0, 2, "0"), 6, ["unpack_rows"]),
    "gather of one": ("gather", ([9], [False], 0, 2, "0"), 5, []),
    "shard with pads": ("shard", ([9], [False], False, 1, 2, "0"), 9, ["pack_rows"]),
    "shard without": ("shard", ([8], [False], False, 1, 2, "0"), 8, []),
    "shard of the rank without pads": ("shard", ([9], [False], False, 0, 2, "0"), 9, []),
    "shard of two segments": ("shard", (*_SEGMENTS, False, 1, 2, "0"), 11, ["pack_rows"]),
    "reduce-scatter with pads": ("reduce_scatter", ([9], [False], 0, 2, "0"), 9, ["pack_rows"]),
}


@pytest.mark.parametrize("case", EMITTED)
def test_activations_are_moved_once(case):
    """By one kernel where there are pads or several segments, else by nothing."""
    name, arguments, rows, kernels = EMITTED[case]
    with fake_gpu():
        x = torch.empty(rows, 2, 64, device="cuda").transpose(0, 1)  # tokens outermost, as a gather wants them
        graph = make_fx(lambda x: getattr(torch.ops.fxsp, name)(x, 1, *arguments).neg())(x).graph
        emit(graph)
    names = [node.target._opname for node in graph.nodes if node.op == "call_function"]
    copies = ("pack_rows", "unpack_rows", "clone", "cat", "index_select", "constant_pad_nd", "copy_")
    assert [n for n in names if n in copies] == kernels
