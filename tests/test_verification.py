"""fxsp.verify: equal where the compiler is right, and the first difference where it is not."""

from __future__ import annotations

from unittest import mock

import models
import pytest
import torch

import fxsp
from fxsp.passes.builder import Builder

PLAN = {"": {"input_ids": fxsp.SequenceParallelInput(split_dim=1)}}


def test_values_and_gradients_on_several_numbers_of_ranks() -> None:
    model, inputs = models.llama(tokens=7, layers=1)
    evidence = fxsp.verify(model, world_size=(2, 3), options={"plan": PLAN}, **inputs)
    assert evidence.ok
    assert [graph.world_size for graph in evidence.graphs] == [2, 3]
    assert all(max(graph.outputs) < 1e-5 for graph in evidence.graphs)
    assert all(0 < max(graph.gradients) < 1e-5 for graph in evidence.graphs)
    assert "2 ranks: equal, outputs " in str(evidence)


def test_a_wrong_exchange_is_found_and_its_place_is_named() -> None:
    model, inputs = models.flux(image=6, text=3)
    unpack = Builder.unpack

    def reversed_segments(self: Builder, x: torch.fx.Node, sequence: fxsp.types.Sequence) -> torch.fx.Node:
        return unpack(self, x, type(sequence)(sequence.segments[::-1]))

    with mock.patch.object(Builder, "unpack", reversed_segments), torch.no_grad():
        evidence = fxsp.verify(model, world_size=2, **inputs)
    assert not evidence
    difference = evidence.graphs[0].first_difference
    assert "S(1, [3|6])" in difference
    assert "transformer_blocks.0.attn" in difference
    assert ".py:" in difference


def test_gradients_that_are_zero_but_for_rounding_and_masks_with_infinities() -> None:
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)  # ends in a norm

    class Padded(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor, pads: torch.Tensor) -> torch.Tensor:
            return self.layer(x, src_key_padding_mask=pads)

    x, pads = torch.randn(2, 11, 16, requires_grad=True), torch.arange(11).expand(2, 11) > 7
    plan = {"": {"x": fxsp.SequenceParallelInput(split_dim=1)}}
    evidence = fxsp.verify(Padded(), x, pads, world_size=(3, 8), options={"plan": plan})
    assert evidence.ok, str(evidence)
    assert not any(graph.unsharded for graph in evidence.graphs)


def test_a_graph_without_a_plan_is_not_split() -> None:
    evidence = fxsp.verify(torch.nn.Linear(3, 3), torch.randn(2, 3), world_size=2)
    assert evidence.ok
    assert "no plan" in str(evidence)


def test_a_wrong_plan_raises() -> None:
    model, inputs = models.llama(tokens=7, layers=1)
    with pytest.raises(fxsp.PlanError, match="embed_token"):
        fxsp.verify(model, world_size=2, options={"plan": {"embed_token": fxsp.SequenceParallelOutput(1)}}, **inputs)
