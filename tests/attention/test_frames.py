"""Frames that are split along a dimension of their own, and then become tokens: tokens in units of a frame."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from test_attention_matrix import WAYS, Way
from torch import nn

from attention_configs import Config, assert_same, record, run
from fxsp.types import Segment, Sequence, Shard
from rule_recorder import Recorder, T

F = nn.functional
KINDS = ("even", "odd", "few", "text_behind", "text_around", "two_units")


@dataclass(frozen=True)
class Frames(Config):
    """An attention whose tokens, or some of them, are frames."""

    @property
    def sequence(self) -> Sequence:
        return tokens_of(self.tokens, self.size)


def tokens_of(kind: str, p: int) -> Sequence:
    """``even``: no pads; ``odd``: pads; ``few``: fewer frames than ranks; text beside frames, whole and split."""
    return Sequence(
        {
            "even": (Segment(6 * p, unit=3),),
            "odd": (Segment(2 * (p + 1), unit=2),),
            "few": (Segment(3 * max(2, p - 2), unit=3),),
            "text_behind": (Segment(2 * (p + 1), unit=2), Segment(5)),
            "text_around": (Segment(3, False), Segment(4), Segment(2 * (p + 1), unit=2), Segment(3)),
            "two_units": (Segment(2 * p, unit=2), Segment(9, unit=3)),
        }[kind]
    )


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    "way", [*WAYS, Way("ring", 3, ulysses=1, ring=3), Way("ulysses", 2, ulysses=2, ring=1)], ids=str
)
@pytest.mark.parametrize("tokens", KINDS)
def test_every_way_and_mask(tokens: str, way: Way) -> None:
    """fp32, each output and gradient within 1e-5 of one device, with pads that are copies and others."""
    masks = ("none", "bool", "additive", "per_head", "padding", "causal", "causal_padding")
    heads = ("mha", "gqa", "few_keys", "indivisible")
    turn = WAYS.index(way) if way in WAYS else 0
    pairs = [(mask, heads[(i + turn) % 2 if i % 3 else (i + turn) % 4]) for i, mask in enumerate(masks)]
    recorder = Recorder()
    for mask, count in pairs:
        record(recorder, Frames(mask, count, tokens, way.size, entries=2), torch.float32)
    program = way.partition(recorder)
    assert not [g for g in program.report.implicit_gathers if g.kind == "implicit"]
    found = [
        r.method for (_, count), r in zip(pairs, program.report.attentions, strict=True) if count in ("mha", "gqa")
    ]
    assert set(found) == {way.method}
    assert_same(recorder, program.gm, way.size, 1e-5, training=True, names=list(map(str, pairs)))


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("heads", ["mha", "few_keys"])
def test_frames_attend_to_others(heads: str, size: int) -> None:
    """Queries and keys of unlike units and lengths: text and frames, frames and latents of another granule."""
    recorder, names = Recorder(), []
    pairs = [(a, b) for a, b in itertools.permutations(("odd", "few", "text_behind"), 2)]
    for (queries, keys), mask in itertools.product(pairs, ("none", "bool", "padding", "causal")):
        record(recorder, Frames(mask, heads, queries, size), torch.float32, tokens_of(keys, size))
        names.append(f"{queries} to {keys}, {mask}")
    program = run(recorder, size, training=True)
    assert len(program.report.attentions) == len(names)
    assert not [g for g in program.report.implicit_gathers if g.kind == "implicit"]
    assert_same(recorder, program.gm, size, 1e-5, training=True, names=names)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("tokens", KINDS)
def test_whole_queries(tokens: str, size: int) -> None:
    """A few learned queries attend to frames: merged, and with keys gathered."""
    recorder, keys = Recorder(), tokens_of(tokens, size)
    for masked, causal in ((False, False), (True, False), (False, True)):
        q = recorder.input(T((1, 2, 3, 4)))
        k, v = (recorder.lay(recorder.input(T((1, 2, int(keys.length), 4))), Shard(2, keys)) for _ in "kv")
        k, v = (recorder.call(torch.ops.aten.softmax.int, x, -1) for x in (k, v))  # an input is had whole for nothing
        mask = recorder.input(T((3, int(keys.length)))) if masked else None
        recorder.outputs.append(
            recorder.call(torch.ops.aten.scaled_dot_product_attention.default, q, k, v, mask, 0.0, causal)
        )
    program = run(recorder, size, training=True)
    assert {r.method for r in program.report.attentions} <= {"merged", "gather_kv"}
    if tokens == "even":
        assert "merged" in {r.method for r in program.report.attentions}
    assert_same(recorder, program.gm, size, 1e-9, training=True, names=["plain", "mask", "causal"])
