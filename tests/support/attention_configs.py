"""Attentions of every mask, head count and length: recorded, partitioned, and compared with one device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxsp.config import Options
from fxsp.passes.attention.decide import SDPA
from fxsp.passes.base import Program
from fxsp.passes.pipeline import partition_program
from fxsp.types import Ranks, Segment, Sequence, Shard
from lockstep import gradients
from poisoning import simulate
from replicated import check_replicated
from rule_recorder import Recorder, T

__all__ = ["HEADS", "MASKS", "TOKENS", "Config", "D", "assert_same", "record", "run"]

aten = torch.ops.aten
D = 4

MASKS = ("none", "bool", "additive", "per_head", "padding", "causal")
HEADS = ("mha", "gqa", "indivisible", "few_keys", "wide_values")
TOKENS = ("one_segment", "odd", "two_segments", "whole_text", "fewer_than_ranks", "one_token")


@dataclass(frozen=True)
class Config:
    """One attention over ``size`` ranks; ``keys`` is another sequence than the queries' for a cross-attention."""

    mask: str
    heads: str
    tokens: str
    size: int
    #: Batch entries; 0: two on two ranks, else one.
    entries: int = 0

    @property
    def head_counts(self) -> tuple[int, int]:
        p = self.size
        return {
            "mha": (p, p),
            "gqa": (2 * p, p),
            "indivisible": (p + 1, p + 1),
            "few_keys": (p, 1),
            "wide_values": (p, p),
        }[self.heads]

    @property
    def width(self) -> int:
        """Of the values and the output."""
        return D - 1 if self.heads == "wide_values" else D

    @property
    def sequence(self) -> Sequence:
        p = self.size
        if self.tokens == "whole_text":
            return Sequence((Segment(3, False), Segment(2 * p - 1)))
        if self.tokens == "text_behind":
            return Sequence((Segment(p + 1), Segment(3, False)))
        if self.tokens == "text_around":
            return Sequence((Segment(2, False), Segment(p + 1), Segment(2 * p), Segment(1, False)))
        if self.tokens == "whole_text_short_image":
            return Sequence((Segment(3, False), Segment(p - 1)))
        lengths = {
            "one_segment": (2 * p,),
            "odd": (2 * p + 1,),
            "two_segments": (3, 2 * p + 1),
            "fewer_than_ranks": (p - 1,),
            "fewer_than_two_each": (p + 1,),
            "one_token": (1,),
        }
        return Sequence.of(*lengths[self.tokens])

    @property
    def method(self) -> str:
        # Half as many key heads, and two ranks: keys and values are fewer bytes than what an exchange moves.
        # So they are where text that is whole on both is longer than the rest: its output is exchanged too.
        text = self.tokens == "whole_text"
        ranks = {("gqa", False): (2,), ("gqa", True): (2, 3), ("mha", True): (2,)}.get((self.heads, text), ())
        cheap = self.size in ranks and self.mask != "causal"
        return "gather_kv" if self.heads in ("indivisible", "few_keys") or cheap else "ulysses"

    @property
    def batch(self) -> int:
        return self.entries or (2 if self.size == 2 else 1)


def _mask(config: Config, recorder: Recorder, rows: int, columns: int, dtype: torch.dtype) -> Node | None:
    batch, heads = config.batch, config.head_counts[0]
    shapes = {
        "bool": (rows, columns),
        "additive": (batch, 1, rows, columns),
        "per_head": (heads, rows, columns),
        "padding": (batch, 1, 1, columns),
        "causal_padding": (batch, 1, rows, columns),
    }
    if config.mask not in shapes:
        return None
    kind = "normal" if config.mask == "additive" else "bool"
    node = recorder.input(T(shapes[config.mask], kind))
    value = node.meta["val"]
    if config.mask == "causal_padding":
        value = value[:, :, :1] & torch.ones(rows, columns, dtype=torch.bool).tril()
    # The first key is always allowed: a row without any is not a number.
    node.meta["val"] = (
        value.detach().to(dtype).requires_grad_() if kind == "normal" else value.index_fill(-1, torch.tensor([0]), True)
    )
    return node


def record(
    recorder: Recorder, config: Config, dtype: torch.dtype = torch.float64, keys: Sequence | None = None
) -> Node:
    """The attention of ``config`` on tokens that are split."""
    heads, kv_heads = config.head_counts
    queries, keys = config.sequence, keys or config.sequence
    laid = []
    for count, tokens, width in ((heads, queries, D), (kv_heads, keys, D), (kv_heads, keys, config.width)):
        x = recorder.input(T((config.batch, count, int(tokens.length), width)))
        x.meta["val"] = x.meta["val"].detach().to(dtype).requires_grad_()
        laid.append(recorder.lay(x, Shard(2, tokens)))
    mask = _mask(config, recorder, int(queries.length), int(keys.length), dtype)
    out = recorder.call(SDPA, *laid, mask, 0.0, config.mask == "causal", scale=0.7, enable_gqa=heads != kv_heads)
    recorder.outputs.append(out)
    return out


def run(recorder: Recorder, size: int, *, training: bool = False, **options: Any) -> Program:
    program = Program(recorder.finish(), Ranks(0, size, "simulated"), training=training, options=Options(**options))
    return partition_program(program)


def assert_same(
    recorder: Recorder, gm: GraphModule, size: int, tolerance: float, *, training: bool, names: list[str]
) -> None:
    """Values, with pads that are copies and others, and gradients."""
    values = [x.meta["val"] for x in recorder.inputs]
    wanted = [y.meta["val"] for y in recorder.outputs]
    count = len(wanted)
    if not training:
        for poison in (False, True):
            got = check_replicated(simulate(gm, size, values, poison_pads=poison))
            for name, a, b in zip(names, got, wanted, strict=True):
                assert _error(a, b) <= tolerance, f"{name}, other pads: {poison}"
        return
    given = [torch.randn(y.shape, generator=recorder.generator, dtype=torch.float64).to(y.dtype) for y in wanted]
    leaves = [x for x in values if x.requires_grad]
    wanted += torch.autograd.grad(wanted, leaves, given)
    outputs, grads = gradients(gm, size, values, given, poison_pads=True)
    got = check_replicated([[*o, *g] for o, g in zip(outputs, grads, strict=True)])
    names = [*names, *(f"gradient {i - count} of {names}" for i in range(count, len(wanted)))]
    for name, a, b in zip(names, got, wanted, strict=True):
        assert _error(a, b) <= tolerance, name


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    return float((got - want.detach()).abs().max() / want.detach().abs().max().clamp(min=1e-3))
