"""fxsp.verify: equal where the compiler is right, and the first difference where it is not."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._pytree import tree_leaves

import fxsp
import models
import small
from fxsp.kernels import collectives
from fxsp.offline.partition import partition_offline
from fxsp.passes.builder import Builder
from fxsp.passes.special import sums
from fxsp.simulation import divergence as differences
from fxsp.simulation.compare import random_seeds
from fxsp.simulation.divergence import first_difference
from fxsp.types import product

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


def test_a_wrong_rule_is_found_and_its_place_is_named() -> None:
    """A mean that divides by the local count: wrong by the rule, in one line of the model."""

    class Pooled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = small.Model(), torch.nn.Linear(5, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.inner(x).mean(1))

    wrong = mock.patch.object(sums, "product", lambda sizes: 2 * product(sizes))
    with wrong, torch.no_grad():
        evidence = fxsp.verify(Pooled(), small.inputs(), world_size=2, plan=small.SPLIT)
    assert not evidence
    assert "P of mean (the root module, test_verification.py:" in evidence.first_difference
    assert evidence.graphs[0].errors["output 0"] > 0.1
    assert "output 0: error" in str(evidence)


def test_a_wrong_gradient_is_found_and_its_place_is_named() -> None:
    """Values are right and one adjoint is not: the scores are used with shards, and their gradients are not summed."""

    def not_used(self: Builder, x: torch.fx.Node) -> torch.fx.Node:
        return x if x.op != "placeholder" else use(self, x)

    class Scaled(small.Model):
        def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
            assert scale is not None
            factor = torch.nn.functional.gelu(scale)
            return super().forward(x, factor)

    use = Builder.use
    scale = torch.randn(8, requires_grad=True)
    with mock.patch.object(Builder, "use", not_used):
        evidence = fxsp.verify(Scaled(), small.inputs(), scale, world_size=2, plan=small.SPLIT)
    assert not evidence
    assert max(evidence.graphs[0].outputs) < 1e-5
    assert evidence.graphs[0].errors["the gradient of scale"] > 0.01
    assert (
        "the gradient of l_scale_: R of l_scale_ (the root module, test_verification.py:" in evidence.first_difference
    )


@pytest.mark.parametrize("name", ["flux", "small"])
def test_no_difference_is_seen_where_there_is_none(name: str) -> None:
    model, inputs = models.flux(image=5, text=3) if name == "flux" else (small.Model(mix=True), {"x": small.inputs()})
    results = partition_offline(
        model, (), inputs, world_size=2, options={} if name == "flux" else {"plan": small.SPLIT}
    )
    (result,) = results
    assert result.program is not None
    outputs = [x for x in tree_leaves(result.whole(*result.inputs)) if isinstance(x, torch.Tensor)]
    seeds = random_seeds(outputs)
    program = result.program
    arguments = program.gm, program.whole, 2, result.inputs, seeds
    assert first_difference(*arguments, 1e-4) == ""
    assert "the gradient of" not in first_difference(*arguments, -1.0)
    with mock.patch.object(differences, "_value", return_value=""):
        assert "the gradient of" in first_difference(*arguments, -1.0)


def test_written_inputs_random_numbers_and_meta_tensors() -> None:
    class Counting(small.Model):
        def __init__(self) -> None:
            super().__init__(mix=True)
            self.register_buffer("seen", torch.zeros(8))

        def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
            self.seen.add_(x.mean((0, 1)).detach())
            return super().forward(torch.nn.functional.dropout(x, 0.5), scale)

    evidence = fxsp.verify(Counting(), small.inputs(), world_size=3, options={"plan": small.SPLIT})
    assert evidence.ok, str(evidence)
    assert "seen after the call" in evidence.graphs[0].errors
    deferred = {"plan": small.SPLIT, "grad_reduce": "defer"}
    assert fxsp.verify(small.Model(), small.inputs(), world_size=3, options=deferred).ok
    with torch.device("meta"):
        model, x = small.Model(), torch.empty(2, 5, 8)
    with pytest.raises(fxsp.OptionError, match="meta device"):
        fxsp.verify(model, x, world_size=2, plan=small.SPLIT)
    with pytest.raises(fxsp.OptionError, match="world_size is 0"):
        fxsp.verify(small.Model(), small.inputs(), world_size=0)


def _checked(rank: int, size: int, how: str, inner: str) -> dict[str, Any]:
    """A step with ``verify``, of a right program or of one that is wrong in some way."""
    wrong: Any = contextlib.nullcontext()
    if how == "output":
        wrong = mock.patch.object(sums, "product", lambda sizes: 2 * product(sizes))
    elif how == "gradient":
        wrong = mock.patch.object(Builder, "use", lambda self, x: x)
    elif how == "transport" and rank == 1:
        wrong = mock.patch.object(collectives, "_moved", lambda y, like: 2 * collectives.wait(y))
    torch.manual_seed(0)
    model, x = small.Model(), small.inputs()
    options = {"plan": small.SPLIT, "verify": True, "inner": inner}
    options["grad_reduce"] = "defer" if how == "deferred" else "all_reduce"
    with wrong:
        step = torch.compile(lambda x: model(x).mean(1), backend="sp", options=options)
        try:
            for tokens in (x, x + 1):
                step(tokens).sum().backward()
        except fxsp.VerificationError as error:
            return {"error": str(error)}
    return {"error": "", "grad": [p.grad for p in model.parameters()]}


@pytest.mark.parametrize("inner", ["aot_eager", "eager"])
@pytest.mark.parametrize(
    ("how", "parts"),
    [
        ("right", []),
        ("deferred", []),
        ("output", ["output 0 (", "test_verification.py:", "simulated ranks: ", "P of mean"]),
        ("gradient", ["the gradient of ", "blocks.0.qkv.weight", "simulated ranks: the gradient of", "small.py:"]),
        ("transport", ["output 0", "the plan and the partitioning are"]),
    ],
)
def test_on_real_ranks(how: str, parts: list[str], inner: str, ranks: Any) -> None:
    if inner == "eager" and how in ("transport", "deferred"):
        return  # they differ in what is patched only
    found = ranks(2).run(_checked, how, inner)
    for rank in found:
        assert all(part in rank["error"] for part in parts), rank["error"]
        assert bool(rank["error"]) == bool(parts)
    if not parts and how == "right":
        for a, b in zip(found[0]["grad"], found[1]["grad"], strict=True):
            torch.testing.assert_close(a, b)


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


def test_a_graph_with_nothing_to_split_is_not_split() -> None:
    evidence = fxsp.verify(torch.nn.Linear(3, 3), torch.randn(1, 3), world_size=2)
    assert evidence.ok
    assert "nothing to split" in str(evidence)


def test_a_wrong_plan_raises() -> None:
    model, inputs = models.llama(tokens=7, layers=1)
    with pytest.raises(fxsp.PlanError, match="embed_token"):
        fxsp.verify(model, world_size=2, options={"plan": {"embed_token": fxsp.SequenceParallelOutput(1)}}, **inputs)
