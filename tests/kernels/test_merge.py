"""Two attentions as one: the reference against attention itself, the kernels against the reference, and their code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from crosscompile import TARGETS, compile_for, fake_gpu, launches
from fxsp.kernels.attention.merge import merge, merge_eager, merge_operator
from fxsp.passes.emit.emit import emit, is_kernel
from fxsp.torch_internals import inductor_decompositions, kernel_calls

INFINITY = float("inf")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def attention(q, k, v, allowed):
    scores = (q @ k.mT).masked_fill(~allowed, -INFINITY)
    lse = scores.logsumexp(-1)
    return scores.softmax(-1).masked_fill((lse == -INFINITY).unsqueeze(-1), 0) @ v, lse


def parts(dtype=torch.float64):
    """Queries that see keys of both parts, of one, and of none."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, dtype=dtype) for n in (6, 9, 9))
    allowed = torch.rand(6, 9) > 0.3
    allowed[1, :4] = allowed[2, 4:] = allowed[3] = False
    return q, k, v, allowed


def test_the_reference_is_attention_over_both():
    q, k, v, allowed = parts()
    whole, whole_lse = attention(q, k, v, allowed)
    halves = [attention(q, k[:, :, s], v[:, :, s], allowed[:, s]) for s in (slice(0, 4), slice(4, 9))]
    out, lse = merge(*halves[0], *halves[1])
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(lse, whole_lse)
    assert (lse[..., 3] == -INFINITY).all()
    assert (out[..., 3, :] == 0).all()


def test_what_no_key_was_seen_for_counts_for_nothing():
    x, lse = torch.full((1, 1, 3, 4), float("nan")), torch.full((1, 1, 3), -INFINITY)
    y, other = torch.randn(1, 1, 3, 4), torch.tensor([[[1.0, -200.0, -INFINITY]]])
    y[..., 2, :] = float("nan")
    for first, second in (((x, lse), (y, other)), ((y, other), (x, lse))):
        out, total = merge_eager(*first, *second, torch.float32)
        torch.testing.assert_close(out[..., :2, :], y[..., :2, :])
        assert (out[..., 2, :] == 0).all()
        assert torch.equal(total, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_sum_is_rounded_once(dtype):
    x, y = torch.randn(1, 2, 5, 8).to(dtype), torch.randn(1, 2, 5, 8).to(dtype)
    a, b = torch.randn(1, 2, 5), torch.randn(1, 2, 5)
    out, lse = merge(x, a, y, b, dtype)
    wide, _ = merge(x, a, y, b)
    assert (out.dtype, wide.dtype, lse.dtype) == (dtype, torch.float32, torch.float32)
    assert torch.equal(out, wide.to(dtype))
    weights = torch.stack([a, b]).softmax(0).unsqueeze(-1)
    torch.testing.assert_close(wide, weights[0] * x.float() + weights[1] * y.float())


def test_kernels_under_the_interpreter():
    """Odd sizes, any strides, guards around what is written; in a process whose Triton is the interpreter."""
    script = Path(__file__).parents[1] / "support" / "interpreted_merge.py"
    run = subprocess.run([sys.executable, "-W", "ignore", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout)
    assert len(results) == 10
    for result in results:
        # The interpreter cuts fp32 to bf16 instead of rounding: one unit in the last place.
        limits = {"bfloat16": 2**-7, "float16": 2**-10}
        limit = max((limit for name, limit in limits.items() if name in result["case"]), default=1e-6)
        errors = result["forward"]
        assert all(isinstance(e, float) and e <= limit for e in errors), result
        assert result.get("guards", True), f"written outside of the results: {result['case']}"
        assert result.get("written", True), "the results were not made where the test looks"


def operands_on_a_gpu(batch, heads, tokens, width, dtype):
    x = torch.empty(batch, tokens, heads, width, device="cuda", dtype=dtype).transpose(1, 2)
    return x, torch.empty(batch, heads, tokens, device="cuda")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("width", [40, 64, 72, 120, 128])
def test_machine_code(target, width):
    """Rows are moved 16 bytes at a time, and nothing is spilled."""
    with fake_gpu():
        x, a = operands_on_a_gpu(2, 6, 100, width, torch.bfloat16)
        (launch,) = launches(merge_operator(), x.float(), a, x, a, torch.bfloat16)
    assert launch.kernel.__name__ == "merge_kernel"
    code = compile_for(launch, target)
    # Single numbers of 4 bytes are log-sum-exps.
    assert set(code.loads) == set(code.stores) == {4, 16}, code
    assert code.spilled == 0, code


def test_offsets_are_64_bits_wide():
    with fake_gpu():
        x = torch.empty_strided((2, 3, 100, 64), (2**33, 2**31, 64, 1), device="cuda", dtype=torch.bfloat16)
        a = torch.empty(2, 3, 100, device="cuda")
        (launch,) = launches(merge_operator(), x, a, x, a, torch.float32)
    assert (launch.arguments["s_xb"], launch.arguments["UNIT"]) == (2**30, 8)
    assert compile_for(launch, "sm_90").spilled == 0


def ring_graph(size, rows=50):
    """A ring on a GPU that is not there, traced as AOTAutograd leaves it."""
    q = torch.empty(1, 4, rows, 64, device="cuda")

    def ring(q):
        length = q.shape[2] * size
        arguments = ([length], [False], [length], [False], False, None, 1, 0, size, "0")
        return torch.ops.fxsp.ring_attention(q, q, q, None, *arguments)[0]

    return make_fx(ring)(q).graph


@pytest.mark.parametrize("size", [2, 4])
def test_emitted_graphs_merge_by_one_kernel_a_step(size):
    with fake_gpu():
        graph = ring_graph(size)
        emit(graph)
        assert sum(is_kernel(node.target) for node in graph.nodes) == size - 1
        graph = ring_graph(size)
        emit(graph, decompositions=inductor_decompositions())
    graph.lint()
    assert not any(is_kernel(node.target) for node in graph.nodes)
    assert [kernel.__name__ for kernel, _ in kernel_calls(graph)] == ["merge_kernel"] * (size - 1)
    results = [node.kwargs["tensors_to_clone"] for node in graph.nodes if "tensors_to_clone" in node.kwargs]
    assert results == [["out", "lse"]] * (size - 1)


def test_a_symbolic_length_adds_no_guard():
    example = torch.empty(50, device="meta")
    with fake_gpu(symbolic=True) as mode:
        rows = mode.from_tensor(example, static_shapes=False).shape[0]
        graph = ring_graph(2, rows)
        before = len(mode.shape_env.guards)
        emit(graph, decompositions=inductor_decompositions())
    (call,) = kernel_calls(graph)
    assert isinstance(call[1]["M"], torch.SymInt)
    assert len(mode.shape_env.guards) == before


def test_neither_triton_nor_a_gpu_is_needed_on_the_cpu():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fxsp.kernels.ops\n"
        "from fxsp.kernels.attention.merge import merge\n"
        "x, a = torch.ones(1, 1, 2, 4), torch.zeros(1, 1, 2)\n"
        "assert torch.equal(merge(x, a, x, a)[0], x)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
