"""Attention on split tokens: every mask, head count and length against attention on one device, and what it sends."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

import fxsp
import models
from attention_configs import HEADS, MASKS, TOKENS, Config, D, assert_same, record, run
from fxsp import SequenceParallelInput, SequenceParallelOutput
from fxsp.errors import UnsupportedError
from fxsp.inspection.wire import bytes_sent
from fxsp.offline.partition import partition_offline
from fxsp.passes.attention.decide import SDPA
from fxsp.passes.base import Program
from fxsp.types import Ranks, Sequence, Shard
from rule_recorder import Recorder, T

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("tokens", TOKENS)
def test_every_mask_and_head_count(tokens: str, size: int) -> None:
    configs = [Config(mask, heads, tokens, size) for mask, heads in itertools.product(MASKS, HEADS)]
    recorder = Recorder()
    for config in configs:
        record(recorder, config)
    program = run(recorder, size)
    assert [r.method for r in program.report.attentions] == [c.method for c in configs]
    assert not [g for g in program.report.implicit_gathers if g.kind == "implicit"]
    assert_same(recorder, program.gm, size, 1e-9, training=False, names=list(map(str, configs)))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("tokens", TOKENS)
def test_gradients(tokens: str, size: int) -> None:
    """Of queries, keys, values, and an additive mask, which all ranks use."""
    # Each mask with Ulysses and with gathered keys; all head counts without one.
    pairs = [(m, h) for m, h in itertools.product(MASKS, HEADS) if m == "none" or h in ("gqa", "indivisible")]
    configs = [Config(mask, heads, tokens, size) for mask, heads in pairs]
    recorder = Recorder()
    for config in configs:
        record(recorder, config)
    program = run(recorder, size, training=True)
    assert_same(recorder, program.gm, size, 1e-9, training=True, names=list(map(str, configs)))


@pytest.mark.parametrize("heads", ["gqa", "few_keys"])
def test_single_precision(heads: str) -> None:
    configs = [Config(mask, heads, tokens, 4) for mask, tokens in itertools.product(MASKS, ("odd", "whole_text"))]
    recorder = Recorder()
    for config in configs:
        record(recorder, config, torch.float32)
    program = run(recorder, 4)
    assert_same(recorder, program.gm, 4, 1e-5, training=False, names=list(map(str, configs)))


# Cross-attention.


def _lengths(gm: GraphModule) -> Counter[str]:
    """How often each collective of the graph is called."""
    ranks = Ranks(0, 2, "simulated")
    return Counter(n.target._opname for n in gm.graph.nodes if bytes_sent(n, ranks) is not None)


def _cross(
    mask: str, size: int, keys: int, *, laid: Sequence | None = None, batch: int = 1, heads: int = 4
) -> Recorder:
    recorder = Recorder()
    q = recorder.lay(recorder.input(T((batch, heads, 2 * size + 1, D))), Shard(2, Sequence.of(2 * size + 1)))
    k, v = (recorder.input(T((batch, heads, keys, D))) for _ in "kv")
    if laid is not None:
        k, v = recorder.lay(k, Shard(2, laid)), recorder.lay(v, Shard(2, laid))
    shapes = {
        "bool": (2 * size + 1, keys),
        "padding": (batch, 1, 1, keys),
        "per_head": (batch, heads, 2 * size + 1, keys),
    }
    given = recorder.input(T(shapes[mask], "normal")) if mask in shapes else None
    recorder.outputs.append(recorder.call(SDPA, q, k, v, given, 0.0, mask == "causal"))
    return recorder


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("mask", ["none", "bool", "padding", "per_head", "causal"])
def test_cross_attention_to_whole_keys_is_local(mask: str, size: int) -> None:
    for training in (False, True):
        recorder = _cross(mask, size, 5)
        program = run(recorder, size, training=training)
        (attention,) = program.report.attentions
        assert (attention.method, attention.bytes) == ("local", 0)
        # One gather, of the output.
        assert _lengths(program.gm) == {"gather": 1}
        assert_same(recorder, program.gm, size, 1e-9, training=training, names=[mask])


@pytest.mark.parametrize(("keys", "method"), [(3, "gather_kv"), (60, "ulysses")])
@pytest.mark.parametrize("mask", ["none", "bool", "per_head"])
def test_cross_attention_to_other_split_keys_takes_the_cheaper_way(mask: str, keys: int, method: str) -> None:
    size = 2
    for training in (False, True):
        recorder = _cross(mask, size, keys, laid=Sequence.of(keys))
        program = run(recorder, size, training=training)
        (attention,) = program.report.attentions
        assert attention.method == method
        rejected = dict(attention.rejected)
        assert method not in rejected
        assert all("bytes per rank in" in why for why in rejected.values())
        assert_same(recorder, program.gm, size, 1e-9, training=training, names=[mask])


# What is sent.


def _sent(program: Program) -> list[tuple[str, Any]]:
    return [
        (n.target._opname, bytes_sent(n, program.ranks)) for n in program.graph.nodes if bytes_sent(n, program.ranks)
    ]


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("heads", ["mha", "gqa"])
def test_ulysses_is_two_all_to_alls(heads: str, tokens: str, size: int) -> None:
    """q, k and v travel together; each rank sends (P-1)/P of its rows of q, k, v and the output."""
    config = Config("none", heads, tokens, size)
    recorder = Recorder()
    record(recorder, config)
    program = run(recorder, size, ulysses_degree=size, ring_degree=1)
    # The last one is the gather of the graph's output.
    first, second, _ = _sent(program)
    hq, hkv = config.head_counts
    split = sum(int(s.local_length(size)) for s in config.sequence.segments if s.sharded)
    rows = int(config.sequence.local_length(size))
    row = config.batch * D * 8 * (size - 1)
    assert first == ("all_to_all", split * (hq + 2 * hkv) * row // size)
    assert second == ("all_to_all", rows * hq * row // size)
    (attention,) = program.report.attentions
    assert attention.bytes == first[1] + second[1]
    assert attention.bytes == sum(c.bytes for c in program.report.collectives if c.kind == "all_to_all")
    if tokens == "one_segment":
        # The lower bound 4 N e (P-1)/P for as many key as query heads, N local elements of q.
        local = config.batch * hq * 2 * D
        assert heads != "mha" or attention.bytes == 4 * local * 8 * (size - 1) // size


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("heads", ["indivisible", "few_keys"])
def test_gather_kv_is_one_all_gather(heads: str, tokens: str, size: int) -> None:
    """Each rank sends its rows of k and v to P-1 others."""
    config = Config("causal", heads, tokens, size)
    recorder = Recorder()
    record(recorder, config)
    program = run(recorder, size)
    first, _ = _sent(program)
    split = sum(int(s.local_length(size)) for s in config.sequence.segments if s.sharded)
    assert first == ("gather_used", (size - 1) * split * config.batch * config.head_counts[1] * 2 * D * 8)
    (attention,) = program.report.attentions
    assert attention.bytes == first[1]
    rejected = dict(attention.rejected)
    # One head can be repeated, so that there are enough to exchange, but that is not cheaper.
    assert ("heads do not divide over" if heads == "indivisible" else "bytes per rank in") in rejected["ulysses"]
    assert "ring" in rejected


def test_values_of_another_width_take_two_more_exchanges() -> None:
    recorder = Recorder()
    record(recorder, Config("none", "wide_values", "odd", 2))
    assert [name for name, _ in _sent(run(recorder, 2))] == ["all_to_all"] * 4 + ["gather"]


# Masks and operands that are split themselves.


@pytest.mark.parametrize("heads", [4, 3])
@pytest.mark.parametrize("training", [False, True])
def test_masks_computed_from_split_tokens(heads: int, training: bool) -> None:
    """A mask by query tokens is used as it lies by gathered keys, and is made whole for an exchange of heads."""
    recorder = Recorder()
    tokens = Shard(2, Sequence.of(3, 4))
    q, k, v = (recorder.lay(recorder.input(T((1, heads, 7, D))), tokens) for _ in "qkv")
    scale = recorder.lay(recorder.input(T((1, 7, 1))), Shard(1, tokens.sequence))
    table = recorder.input(T((1, 1, 7)))
    mask = recorder.call(aten.unsqueeze.default, recorder.call(aten.mul.Tensor, scale, table), 1)
    recorder.outputs.append(recorder.call(SDPA, q, k, v, mask))
    program = run(recorder, 2, training=training)
    assert [r.method for r in program.report.attentions] == ["ulysses" if heads == 4 else "gather_kv"]
    assert_same(recorder, program.gm, 2, 1e-9, training=training, names=["out"])


@pytest.mark.parametrize("training", [False, True])
def test_batch_split_attention_is_local(training: bool) -> None:
    """Attention within frames: the tokens are the batch."""
    recorder = Recorder()
    tokens = Shard(0, Sequence.of(5), 1, 2)
    q, k, v = (recorder.lay(recorder.input(T((10, 2, 3, D))), tokens) for _ in "qkv")
    mask = recorder.input(T((10, 1, 1, 3)))
    recorder.outputs.append(recorder.call(SDPA, q, k, v, mask, 0.0, False))
    program = run(recorder, 2, training=training)
    assert _lengths(program.gm) == {"gather": 1}
    assert_same(recorder, program.gm, 2, 1e-9, training=training, names=["out"])


def test_dropout_of_attention_is_refused_with_the_reason() -> None:
    recorder = Recorder()
    tokens = Shard(2, Sequence.of(5))
    q, k, v = (recorder.lay(recorder.input(T((1, 2, 5, D))), tokens) for _ in "qkv")
    recorder.outputs.append(recorder.call(SDPA, q, k, v, None, 0.1))
    with pytest.raises(UnsupportedError, match=r"attention dropout \(dropout_p=0.1\).*model.eval\(\)"):
        run(recorder, 2)


def test_causal_rows_are_made_once() -> None:
    """The mask of a rank's own rows is shared by the attentions of all layers."""
    recorder = Recorder()
    for _ in range(3):
        record(recorder, Config("causal", "few_keys", "odd", 2))
    program = run(recorder, 2)
    assert sum(n.target is torch.ops.fxsp.positions.default for n in program.graph.nodes) == 1


def _operators(program: Program) -> str:
    """The operators from the last shard of an input to the gather of the output."""
    names = [n.target._opname for n in program.graph.nodes if n.op == "call_function" and hasattr(n.target, "_opname")]
    start = max(i for i, name in enumerate(names) if name == "shard")
    return " ".join(names[start : names.index("gather") + 1])


#: To heads: q, k and v apart by destination, side by side; from heads: by destination again.
_OUT = "pack_heads all_to_all"
_BACK = "all_to_all unpack_heads transpose gather"


_SDPA = "scaled_dot_product_attention"
_Q, _KV = "permute narrow unsqueeze", "permute narrow unsqueeze narrow unsqueeze"
_QKV, _SENT = f"{_KV} narrow unsqueeze", "permute reshape contiguous"
#: Mask, tokens -> what becomes of them, of two batch entries.
GRAPHS = {
    # No pads, one segment: what arrives is the global order by strides, and a reshape packs the output.
    ("none", "one_segment"): f"{_OUT} flatten {_QKV} {_SDPA} {_SENT} {_BACK}",
    # A tail of pads is a narrow of the outermost dimension; queries keep it, unless their rows have meaning.
    ("none", "odd"): f"{_OUT} flatten {_Q} narrow flatten narrow {_KV} {_SDPA} {_SENT} {_BACK}",
    ("bool", "odd"): f"{_OUT} flatten narrow {_QKV} {_SDPA} permute pack flatten {_BACK}",
    # Behind the last token the causal flag hides all pads.
    ("causal", "odd"): f"{_OUT} flatten {_QKV} {_SDPA} {_SENT} {_BACK}",
    ("causal", "two_segments"): f"cat {_OUT} unpack {_QKV} {_SDPA} permute pack flatten {_BACK}",
    # Several segments with pads: keys and values are put in order, queries need none.
    ("none", "two_segments"): f"cat {_OUT} flatten {_Q} narrow unpack {_KV} {_SDPA} {_SENT} {_BACK}",
    ("bool", "two_segments"): f"cat {_OUT} unpack {_QKV} {_SDPA} permute pack flatten {_BACK}",
    # A mask that differs between batch entries: they stay apart.
    ("padding", "two_segments"): f"cat {_OUT} flatten {_Q} narrow unpack {_KV} {_SDPA} {_SENT} {_BACK}".replace(
        "unsqueeze", "unflatten"
    ),
}


@pytest.mark.parametrize(("mask", "tokens"), GRAPHS)
def test_graphs(mask: str, tokens: str) -> None:
    """Nothing but views, two exchanges, and what pads and segments need."""
    recorder = Recorder()
    record(recorder, Config(mask, "mha", tokens, 2))
    assert _operators(run(recorder, 2)) == f"shard {GRAPHS[mask, tokens]}"


def test_the_graph_of_gathered_keys() -> None:
    recorder = Recorder()
    record(recorder, Config("causal", "few_keys", "odd", 2))
    expected = f"shard cat gather_used split_with_sizes positions unsqueeze arange ge {_SDPA} gather"
    assert _operators(run(recorder, 2)) == expected


@pytest.mark.parametrize("grouped", [False, True])
def test_keys_and_values_that_are_outputs_are_gathered_once(grouped: bool) -> None:
    """A language model with a cache returns its keys and values whole: attention takes these, and says what they cost.

    ``strict`` refuses that: much of what is sent need not be.
    """
    model, inputs = models.llama(tokens=11, layers=1, kv_heads=2 if grouped else 8)
    inputs["use_cache"] = True
    plan = {"model.layers.0": {"hidden_states": SequenceParallelInput(1)}, "model.norm": SequenceParallelOutput(1)}
    (result,) = partition_offline(model, (), inputs, world_size=3, options={"plan": plan})
    report = result.report
    assert [g.kind for g in report.implicit_gathers] == ["output", "output"]
    sent = sum(g.bytes for g in report.implicit_gathers)
    assert [(a.method, a.bytes) for a in report.attentions] == [("local", sent)]
    with pytest.raises(fxsp.StrictError, match="use_cache=False"):
        partition_offline(model, (), inputs, world_size=3, options={"plan": plan, "strict": True})
    assert [record.kind for record in report.collectives] == ["all_gather"] * 3
    evidence = fxsp.verify(model, world_size=3, options={"plan": plan}, **inputs)
    assert evidence.ok, str(evidence)
    assert len(evidence.graphs[0].outputs) == 3
