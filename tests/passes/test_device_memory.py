"""What attentions move through memory, counted from the graph; packs that are left to the compiler."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxsp
import models
from crosscompile import fake_gpu
from fxsp.cost.formula import memory_formulas
from fxsp.kernels.exchange import exchange
from fxsp.passes.base import Program
from fxsp.passes.emit.emit import emit
from fxsp.report import Memory
from fxsp.torch_internals import inductor_decompositions
from tracing import partition, shard

D = 8


def attention(tokens: tuple[int, ...], mask: str, heads: tuple[int, int], batch: int) -> tuple[Any, list[Any]]:
    """An attention over segments of these lengths, and its inputs."""
    length, times = sum(tokens), heads[0] // heads[1]

    def function(*parts: Tensor) -> Tensor:
        rows = len(tokens)
        q, k, v = (torch.cat([shard(x, 2) for x in parts[i * rows : (i + 1) * rows]], 2) for i in range(3))
        if times > 1:
            k, v = (x.repeat_interleave(times, 1) for x in (k, v))
        given = parts[-1] if mask in ("rows", "keys") else None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=given, is_causal=mask == "causal")

    inputs = [torch.randn(batch, h, n, D) for h in (heads[0], heads[1], heads[1]) for n in tokens]
    if mask in ("rows", "keys"):
        inputs.append(torch.randn(batch, 1, length if mask == "rows" else 1, length))
    return function, inputs


def counted(
    tokens: tuple[int, ...],
    mask: str = "none",
    size: int = 2,
    heads: tuple[int, int] = (4, 4),
    batch: int = 1,
    **options: Any,
) -> Program:
    function, inputs = attention(tokens, mask, heads, batch)
    return partition(function, *inputs, size=size, **options)


def memory_of(program: Program) -> Memory:
    (record,) = program.report.attentions
    assert record.memory is not None
    return record.memory


def steps(memory: Memory) -> str:
    return ", ".join(f"{move.op} {move.tensors} {move.reads + move.writes}" for move in memory.moves)


_IN, _OUT = "pack_heads qkv 6, all_to_all qkv 6", "all_to_all o 2, unpack_heads o 2"
#: Lengths of the segments, mask, ranks -> what moves, and the passes in all.
GOLDEN: dict[tuple[Any, ...], tuple[str, int]] = {
    ((8,), "none", 2): (f"{_IN}, {_OUT}", 16),
    ((8,), "causal", 2): (f"{_IN}, {_OUT}", 16),
    ((8,), "rows", 2): (f"{_IN}, {_OUT}", 16),
    # Pads at the end, one segment: still nothing but the two exchanges.
    ((7,), "none", 4): (f"{_IN}, {_OUT}", 16),
    ((7,), "causal", 4): (f"{_IN}, {_OUT}", 16),
    ((7,), "keys", 4): (f"{_IN}, {_OUT}", 16),
    ((1,), "none", 4): (f"{_IN}, {_OUT}", 16),
    # A mask for each query: pads have no row in it, so the output gets them back by a pass.
    ((7,), "rows", 4): (f"{_IN}, pack o 2, {_OUT}", 18),
    # Two segments: without pads their order does not matter, with pads keys and values are put in order.
    ((4, 8), "none", 4): (f"{_IN}, {_OUT}", 16),
    ((3, 8), "none", 4): (f"{_IN}, unpack kv 4, {_OUT}", 20),
    ((3, 8), "keys", 4): (f"{_IN}, unpack kv 4, {_OUT}", 20),
    ((4, 8), "causal", 4): (f"{_IN}, unpack qkv 6, pack o 2, {_OUT}", 24),
    ((3, 8), "rows", 4): (f"{_IN}, unpack qkv 6, pack o 2, {_OUT}", 24),
}


@pytest.mark.parametrize(("tokens", "mask", "size"), GOLDEN)
def test_golden(tokens: tuple[int, ...], mask: str, size: int) -> None:
    program = counted(tokens, mask, size)
    memory = memory_of(program)
    assert (steps(memory), memory.passes) == GOLDEN[tokens, mask, size]
    assert sum(record.kind == "all_to_all" for record in program.report.collectives) == 2


@pytest.mark.parametrize(
    ("mask", "passes"),
    [("none", 16), ("causal", 16), pytest.param("keys", 18, id="keys of each entry"), ("rows", 18)],
)
def test_batches(mask: str, passes: int) -> None:
    """Two entries count as one with more heads; where a mask tells them apart, the output is copied to be sent."""
    assert memory_of(counted((8,), mask, batch=2)).passes == passes


def test_bytes() -> None:
    memory = memory_of(counted((8,)))
    rows = 1 * 4 * 4 * D * 4  # batch, heads, local tokens, head dimension, bytes
    assert [move.bytes for move in memory.moves] == [6 * rows, 6 * rows, 2 * rows, 2 * rows]
    assert memory.bytes == 16 * rows
    # Grouped: keys and values have a half of the heads; pads are moved too.
    memory = memory_of(counted((7,), size=4, heads=(8, 4)))
    rows = 1 * 8 * 2 * D * 4
    assert memory.passes == 16
    assert memory.bytes == 4 * (rows + rows // 2 + rows // 2) + 4 * rows


def test_repeated_heads_are_repeated_by_the_kernel() -> None:
    """Unless there is a mask, which kernels with fewer key heads do not take."""
    assert "flatten" not in steps(memory_of(counted((8,), heads=(8, 4), ulysses_degree=2)))
    assert "flatten k 2, flatten v 2" in steps(memory_of(counted((8,), "rows", heads=(8, 4), ulysses_degree=2)))


@pytest.mark.parametrize("size", [2, 4])
def test_rings(size: int) -> None:
    """Each step keys and values are packed and sent, and outputs are merged."""
    memory = memory_of(counted((8,), size=size, ring_degree=size))
    n = size - 1
    assert steps(memory) == f"ring_attention kv {8 * n}, ring_attention o {3 * n}"
    each = 4 * (8 // size) * D * 4
    assert memory.bytes == 8 * n * each + 3 * n * each  # fp32: the sums are no wider


def test_gathered_keys() -> None:
    """Heads that do not divide: keys and values side by side, tokens to the front, and gathered."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(shard(x, 2) for x in (q, k, v)))

    program = partition(function, *(torch.randn(1, 3, 8, D) for _ in range(3)), size=2)
    assert program.report.attentions[0].method == "gather_kv"
    assert steps(memory_of(program)) == "cat kv 4, gather_used kv 4, gather_used kv 6"


def test_nothing_is_moved_where_keys_are_whole() -> None:
    program = partition(lambda q, k: F.scaled_dot_product_attention(shard(q, 2), k, k), *(torch.randn(1, 2, 8, D),) * 2)
    assert memory_of(program) == Memory()


def test_formulas_hold_at_other_lengths() -> None:
    def measured(image: int, text: int) -> tuple[Any, Memory]:
        model, inputs = models.flux(image=image, text=text)
        with torch.no_grad():
            e = fxsp.explain(model, world_size=2, **inputs)
        record = e.attentions[0]
        assert record.memory is not None
        return memory_formulas(record.memory, int, 2), record.memory

    (formulas, rest), _ = measured(25, 7)
    _, other = measured(31, 5)
    assert rest == 0
    lengths = {"<root>[hidden_states]": 31, "<root>[encoder_hidden_states]": 5}
    assert sum(formula(2, lengths) for formula in formulas) == other.bytes
    assert all(isinstance(formula.per_token, Fraction) for formula in formulas)


# Producers.


class Projected(nn.Module):
    """What models do between the projection and the attention."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.qkv, self.out, self.what = nn.Linear(16, 48), nn.Linear(16, 16), what
        self.norm = nn.RMSNorm(D)

    def turned(self, x: Tensor) -> Tensor:
        if self.what == "half-split":
            a, b = x.chunk(2, -1)
            return x * 0.5 + torch.cat([-b, a], -1) * 0.25
        if self.what == "interleaved":
            a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
            return x * 0.5 + torch.stack([-b, a], -1).flatten(-2) * 0.25
        if self.what == "norm":
            return self.norm(x)
        if self.what == "spelled norm":
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        if self.what == "tanh":
            return x.tanh()
        return x

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, D)).permute(2, 0, 3, 1, 4).unbind()
        y = F.scaled_dot_product_attention(self.turned(q), k, v)
        return self.out(y.transpose(1, 2).flatten(2))


PRODUCERS = {
    "none": (),
    "half-split": ("q: rotary (half-split)",),
    "interleaved": ("q: rotary (interleaved)",),
    "norm": ("q: rms_norm",),
    "spelled norm": ("q: norm",),
    "tanh": ("q: elementwise",),
}


def projected(what: str) -> tuple[fxsp.Explanation, torch.fx.Node]:
    plan = {"": {"x": fxsp.SequenceParallelInput(split_dim=1)}}
    with torch.no_grad():
        e = fxsp.explain(Projected(what), torch.randn(1, 8, 16), world_size=2, plan=plan)
    program = e.results[0].program
    assert program is not None
    return e, next(n for n in program.graph.nodes if n.target is torch.ops.fxsp.pack_heads.default)


@pytest.mark.parametrize("what", PRODUCERS)
def test_producers(what: str) -> None:
    e, pack = projected(what)
    (record,) = e.attentions
    assert record.producers == PRODUCERS[what]
    # Whoever makes what is packed writes it in place; else the pack is a kernel of ours.
    assert pack.args[4] is bool(record.producers)
    assert record.memory is not None
    assert record.memory.passes == 16
    assert f"16 passes over q, k, v, o in memory, {fxsp.inspection.format_bytes(record.memory.bytes)} each" in str(e)
    assert e.to_dict()["graphs"][0]["attentions"][0]["memory"]["passes"] == 16


@pytest.mark.parametrize("fuse", [False, True])
def test_a_compiler_gets_what_it_can_fuse(fuse: bool) -> None:
    """On a GPU: one kernel of ours, or plain operations; without a compiler behind, the kernel in any case."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def kernels(decompositions: Any) -> int:
        with fake_gpu():
            xs = [torch.empty(1, 7, 4, 64, device="cuda").transpose(1, 2) for _ in range(3)]
            graph = make_fx(lambda *xs: torch.ops.fxsp.pack_heads(list(xs), 8, False, 2, fuse))(*xs).graph
            emit(graph, decompositions=decompositions)
        names = [str(node.target) for node in graph.nodes]
        return sum("triton" in name or "fxsp_kernels" in name for name in names)

    assert kernels(inductor_decompositions()) == (0 if fuse else 1)
    assert kernels(None) == 1


def test_inductor_writes_what_it_makes_into_the_send_buffer() -> None:
    """Two buffers: what the projection gives, and what is sent; a third would be q or k, to be read once more."""
    from torch._inductor.utils import run_and_get_code

    def function(x: Tensor, weight: Tensor, table: Tensor) -> Tensor:
        q, k, v = F.linear(x, weight).unflatten(-1, (3, 4, D)).permute(2, 0, 3, 1, 4).unbind()
        q, k = (F.silu(x) * table for x in (q, k))
        return exchange.pack_heads([q, k, v], 6, False, 2, fuse=True)

    args = torch.randn(2, 6, 16), torch.randn(12 * D, 16), torch.randn(6, D)
    out, (code,) = run_and_get_code(torch.compile(function), *args)
    torch.testing.assert_close(out, function(*args))
    assert code.partition("def call")[2].partition("return (")[0].count("empty_strided") == 2
