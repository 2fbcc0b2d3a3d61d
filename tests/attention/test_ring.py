"""Ring attention, and Ulysses within a ring: every mask, head count and length, and what is sent."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from attention_configs import HEADS, MASKS, TOKENS, Config, assert_same, record
from fxsp.config import Options
from fxsp.inspection.wire import bytes_sent
from fxsp.passes.base import Program
from fxsp.passes.graph import facts
from fxsp.passes.pipeline import partition_program
from fxsp.types import Ranks, Sequence, Shard
from rule_recorder import Recorder, T

#: Number of ranks, and ranks that exchange heads.
PLACES = ((2, 1), (3, 1), (4, 1), (8, 1), (4, 2), (8, 4), (8, 2))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def run(recorder: Recorder, size: int, ulysses: int, *, training: bool = False) -> Program:
    program = Program(
        recorder.finish(),
        Ranks(0, size, "simulated"),
        training=training,
        options=Options(ulysses_degree=ulysses, ring_degree=size // ulysses),
    )
    return partition_program(program)


def _method(config: Config, ulysses: int) -> str:
    heads, kv_heads = config.head_counts
    # One key head is repeated, so that there are enough to exchange.
    divide = heads % ulysses == 0 and (kv_heads % ulysses == 0 or kv_heads == 1)
    if not divide:
        return "ulysses" if all(heads % config.size == 0 for heads in config.head_counts) else "gather_kv"
    return "ring" if ulysses == 1 else "hybrid"


@pytest.mark.parametrize(("size", "ulysses"), PLACES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_every_mask_and_head_count(tokens: str, size: int, ulysses: int) -> None:
    configs = [Config(mask, heads, tokens, size) for mask, heads in itertools.product(MASKS, HEADS)]
    recorder = Recorder()
    for config in configs:
        if config.head_counts[0] % config.head_counts[1] == 0:
            record(recorder, config)
    program = run(recorder, size, ulysses)
    assert [r.method for r in program.report.attentions] == [_method(c, ulysses) for c in configs]
    assert not [g for g in program.report.implicit_gathers if g.kind == "implicit"]
    assert_same(recorder, program.gm, size, 1e-9, training=False, names=list(map(str, configs)))


@pytest.mark.parametrize(("size", "ulysses"), [(2, 1), (3, 1), (4, 2)])
@pytest.mark.parametrize("tokens", TOKENS)
def test_gradients(tokens: str, size: int, ulysses: int) -> None:
    """Of queries, keys, values, and an additive mask."""
    configs = [Config(mask, heads, tokens, size) for mask, heads in itertools.product(MASKS, ("gqa", "wide_values"))]
    recorder = Recorder()
    for config in configs:
        record(recorder, config)
    program = run(recorder, size, ulysses, training=True)
    assert {r.method for r in program.report.attentions} == {"ring" if ulysses == 1 else "hybrid"}
    assert_same(recorder, program.gm, size, 1e-9, training=True, names=list(map(str, configs)))


@pytest.mark.parametrize(("size", "ulysses"), [(3, 1), (4, 2)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keys", [1, 5, 17])
def test_cross_attention_to_other_tokens(keys: int, causal: bool, size: int, ulysses: int) -> None:
    recorder = Recorder()
    q = recorder.lay(recorder.input(T((1, 4, 7, 4))), Shard(2, Sequence.of(7)))
    k, v = (recorder.lay(recorder.input(T((1, 2, keys, 4))), Shard(2, Sequence.of(keys))) for _ in "kv")
    out = recorder.call(
        torch.ops.aten.scaled_dot_product_attention.default, q, k, v, None, 0.0, causal, enable_gqa=True
    )
    recorder.outputs.append(out)
    for training in (False, True):
        program = run(recorder, size, ulysses, training=training)
        assert program.report.attentions[0].method == ("ring" if ulysses == 1 else "hybrid")
        assert_same(recorder, program.gm, size, 1e-9, training=training, names=["out"])


# What is sent, and what is held.


def _sent(program: Program) -> list[tuple[str, Any]]:
    return [
        (n.target._opname, bytes_sent(n, program.ranks)) for n in program.graph.nodes if bytes_sent(n, program.ranks)
    ]


@pytest.mark.parametrize(("size", "ulysses"), PLACES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("heads", ["mha", "gqa"])
def test_bytes(heads: str, tokens: str, size: int, ulysses: int) -> None:
    """Local keys and values once for each other place; before and after it the heads of ``u`` ranks."""
    config = Config("none", heads, tokens, size)
    recorder = Recorder()
    record(recorder, config)
    program = run(recorder, size, ulysses)
    hq, hkv = config.head_counts
    split = sum(int(s.local_length(size)) for s in config.sequence.segments if s.sharded)
    rows = int(config.sequence.local_length(size))
    row = config.batch * 4 * 8
    kv = split * 2 * hkv * row
    rotations = [c for c in program.report.collectives if c.kind == "rotation"]
    assert [c.bytes for c in rotations] == [kv] * (size // ulysses - 1)
    exchanged = [split * (hq + 2 * hkv) * row * (ulysses - 1) // ulysses, rows * hq * row * (ulysses - 1) // ulysses]
    ring = ("ring_attention", kv * (size // ulysses - 1))
    expected = [("all_to_all_within", exchanged[0]), ring, ("all_to_all_within", exchanged[1])]
    # The last one is the gather of the graph's output.
    assert _sent(program)[:-1] == (expected if ulysses > 1 else [ring])
    (attention,) = program.report.attentions
    assert attention.bytes == sum(n for _, n in _sent(program)[:-1])


def test_a_degree_that_heads_do_not_allow_falls_back_and_says_why() -> None:
    recorder = Recorder()
    record(recorder, Config("none", "indivisible", "odd", 4))
    program = run(recorder, 4, 2)
    (attention,) = program.report.attentions
    assert attention.method == "gather_kv"
    assert dict(attention.rejected)["hybrid 2 x 2"] == "5 query heads do not divide over 2 ranks"


@pytest.mark.parametrize("training", [False, True])
def test_no_rank_holds_all_keys(training: bool) -> None:
    """Only the graph's own inputs and outputs are as long as the sequence."""
    size, length = 4, 64
    recorder = Recorder()
    q, k, v = (recorder.lay(recorder.input(T((1, 2, length, 4))), Shard(2, Sequence.of(length))) for _ in "qkv")
    out = recorder.call(torch.ops.aten.scaled_dot_product_attention.default, q, k, v, None, 0.0, True)
    recorder.outputs.append(out)
    program = run(recorder, size, 1, training=training)
    for node in program.graph.nodes:
        value = facts(node).local
        if isinstance(value, torch.Tensor) and length in value.shape:
            assert node.op == "placeholder" or node.target._opname == "gather"
