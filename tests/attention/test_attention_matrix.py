"""Every way to attend x masks x head counts x lengths: gradients on four and eight ranks, and in low precision.

Values on every number of ranks, and what is sent, are in :mod:`test_attention` and :mod:`test_ring`; real processes in
:mod:`test_ring_processes` and :mod:`test_bench_attention`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch

from attention_configs import MASKS, Config, D, assert_same, record
from fxsp.config import Options
from fxsp.passes.base import Program
from fxsp.passes.pipeline import partition_program
from fxsp.types import Ranks, Sequence
from lockstep import gradients
from replicated import check_replicated
from rule_recorder import Recorder

ALL_MASKS = (*MASKS, "causal_padding")
HEADS = ("mha", "gqa", "few_keys", "indivisible")
TOKENS = ("fewer_than_ranks", "fewer_than_two_each", "odd", "two_segments")


@dataclass(frozen=True)
class Way:
    """Degrees that fix a lowering; where heads do not divide, another one takes over, and must be right too."""

    method: str
    size: int
    ulysses: int | None = None
    ring: int | None = None
    allgather: int | None = None

    def __str__(self) -> str:
        return f"{self.method}-{self.size}"

    def partition(self, recorder: Recorder) -> Program:
        degrees = {"ulysses_degree": self.ulysses, "ring_degree": self.ring, "allgather_degree": self.allgather}
        ranks = Ranks(0, self.size, "simulated")
        return partition_program(Program(recorder.finish(), ranks, training=True, options=Options(**degrees)))


WAYS = [
    *(Way("ulysses", p, ulysses=p, ring=1) for p in (4, 8)),
    *(Way("ring", p, ulysses=1, ring=p) for p in (4, 8)),
    *(Way("gather_kv", p, allgather=p) for p in (2, 4, 8)),
    Way("hybrid", 4, ulysses=2, ring=2),
    Way("hybrid", 8, ulysses=2, ring=4),
]

JOINT = [
    Way("ulysses", 3, ulysses=3, ring=1),
    Way("ring", 3, ulysses=1, ring=3),
    Way("gather_kv", 3, allgather=3),
    Way("hybrid", 4, ulysses=2, ring=2),
    Way("ring", 8, ulysses=1, ring=8),
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_gradients(tokens: str, way: Way) -> None:
    """fp32, each output and gradient within 1e-5 of one device; all masks, with head counts in turn."""
    # Every mask with two of the head counts, every head count with three or four of the masks.
    turn = WAYS.index(way) + TOKENS.index(tokens)
    pairs = [(mask, HEADS[(i + turn + extra) % 4]) for i, mask in enumerate(ALL_MASKS) for extra in (0, 2)]
    recorder = Recorder()
    for mask, heads in pairs:
        record(recorder, Config(mask, heads, tokens, way.size, entries=2), torch.float32)
    program = way.partition(recorder)
    assert not [g for g in program.report.implicit_gathers if g.kind == "implicit"]
    found = {heads: r.method for (_, heads), r in zip(pairs, program.report.attentions, strict=True)}
    assert all(found[heads] == way.method for heads in ("mha", "gqa") if heads in found)
    assert_same(recorder, program.gm, way.size, 1e-5, training=True, names=list(map(str, pairs)))


@pytest.mark.parametrize("way", JOINT, ids=str)
def test_joint_attention(way: Way) -> None:
    """Text that is whole before split tokens, or was before it is put behind or around them: gradients, and bytes."""
    texts = ("whole_text", "text_behind", "text_around", "whole_text_short_image")
    configs = [
        Config(mask, HEADS[(i + j) % 4], tokens, way.size, entries=2)
        for i, mask in enumerate(ALL_MASKS)
        for j, tokens in enumerate(texts)
    ]
    recorder = Recorder()
    for config in configs:
        record(recorder, config, torch.float32)
    program = way.partition(recorder)
    assert not [g for g in program.report.implicit_gathers if g.kind == "implicit"]
    assert_same(recorder, program.gm, way.size, 1e-5, training=True, names=list(map(str, configs)))
    dealt = program.head_tail
    for config, attention in zip(configs, program.report.attentions, strict=True):
        heads, kv_heads = config.head_counts
        if attention.method != way.method:
            assert config.heads in ("indivisible", "few_keys"), config
            continue
        # Text that is put beside split tokens by a cat is split too: its rows are there for nothing.
        whole = config.tokens.startswith("whole_text")
        segments = [s if whole else replace(s, sharded=True) for s in config.sequence.segments]
        tokens = Sequence(
            tuple(replace(s, layout="head-tail") if s.sharded and s.length in dealt else s for s in segments)
        )
        split = int(tokens.split_length(way.size)) * 2 * D * 4
        rows = int(tokens.local_length(way.size)) * 2 * D * 4
        u, r = {"ring": (1, way.size), "hybrid": (2, way.size // 2)}.get(way.method, (way.size, 1))
        # Of whole segments only the output travels, of the other ranks' heads.
        kv = 2 * (kv_heads if kv_heads % u == 0 else u) * split
        sent = (heads * (split + rows) + kv) * (u - 1) // u + kv * (r - 1)
        assert attention.bytes == (2 * kv_heads * split * (way.size - 1) if way.method == "gather_kv" else sent), config


@pytest.mark.parametrize("way", [way for way in WAYS if way.size == 4], ids=str)
def test_low_precision(way: Way) -> None:
    """bf16, outputs and gradients within 1e-2 of fp32 on one device (2-norm)."""
    recorder = Recorder()
    for mask, heads in itertools.product(("none", "bool", "padding", "causal"), ("mha", "gqa")):
        record(recorder, Config(mask, heads, "two_segments", way.size, entries=2), torch.bfloat16)
    program = way.partition(recorder)
    values = [x.meta["val"] for x in recorder.inputs]
    given = [torch.randn(y.meta["val"].shape).to(torch.bfloat16) for y in recorder.outputs]
    outputs, grads = gradients(program.gm, way.size, values, given, poison_pads=True)
    got = check_replicated([[*o, *g] for o, g in zip(outputs, grads, strict=True)])

    wide = iter([x.detach().float().requires_grad_() if x.is_floating_point() else x for x in values])
    leaves, wanted = [], []
    for mask, _ in itertools.product(("none", "bool", "padding", "causal"), ("mha", "gqa")):
        q, k, v = next(wide), next(wide), next(wide)
        allowed = next(wide) if mask in ("bool", "padding") else None
        leaves += [q, k, v]
        options = {"is_causal": mask == "causal", "scale": 0.7, "enable_gqa": q.shape[1] != k.shape[1]}
        wanted.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, allowed, **options))
    wanted += torch.autograd.grad(wanted, leaves, [g.float() for g in given])
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert a.dtype == torch.bfloat16
        assert float((a.detach().float() - b.detach()).norm() / b.detach().norm()) <= 1e-2, i
