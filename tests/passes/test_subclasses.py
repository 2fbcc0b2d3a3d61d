"""Parameters that are tensor subclasses: what uses them is split, with the values and gradients of one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsp
from running import error_of
from subclasses import KINDS, Block, Calling, Dispatching, Dynamic, Straight, quantize

PLAN = {"": {"x": fxsp.SequenceParallelInput(1)}}


def tokens(count: int, *, requires_grad: bool = False) -> Tensor:
    """Tokens of which one, the last, is larger than all others: a scale for all of them must know it."""
    x = torch.randn(2, count, 32)
    x[:, -1] *= 30
    return x.requires_grad_(requires_grad)


def block(kind: type[Dispatching], **how: Any) -> Block:
    torch.manual_seed(0)
    model = Block()
    quantize(model, kind, **how)
    return model


def gathered(evidence: fxsp.offline.verify.Evidence) -> set[str]:
    """The operators for which tokens were gathered."""
    gathers = [g for graph in evidence.graphs for g in graph.report.implicit_gathers if g.kind == "implicit"]
    return {str(g).partition(" ")[0] for g in gathers}


def check(evidence: fxsp.offline.verify.Evidence) -> None:
    assert evidence.graphs
    for graph in evidence.graphs:
        assert not graph.unsharded
        assert max((*graph.outputs, *graph.gradients)) < 1e-5, str(graph)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [13, 3])
def test_inference(kind: str, count: int) -> None:
    with torch.no_grad():
        evidence = fxsp.verify(
            block(KINDS[kind]), tokens(count), world_size=(2, 3, 4, 8) if count == 3 else (2, 3), plan=PLAN
        )
    check(evidence)
    # The largest number of all tokens has to be known to all ranks; nothing else has.
    assert gathered(evidence) <= ({"aten.max.default"} if kind == "Dynamic" else set())


@pytest.mark.parametrize("kind", ["Dispatching", "Calling"])
def test_training_beside_frozen_weights(kind: str) -> None:
    """Every row is treated alone, as is proven for what is differentiated as one operator."""
    evidence = fxsp.verify(block(KINDS[kind]), tokens(13, requires_grad=True), world_size=(2, 3, 8), plan=PLAN)
    check(evidence)
    assert all(graph.gradients for graph in evidence.graphs)
    assert gathered(evidence) == set()


def test_training_with_a_scale_for_all_tokens() -> None:
    """Its gradient is that of the operator on the subclass, so it is not opened: it runs on all tokens."""
    evidence = fxsp.verify(block(Dynamic), tokens(13, requires_grad=True), world_size=(2, 3), plan=PLAN)
    check(evidence)
    assert gathered(evidence) == {"aten.linear.default"}


def test_training_of_a_subclass() -> None:
    model = block(Dispatching, frozen=False, names=("mlp.0",))
    evidence = fxsp.verify(model, tokens(13, requires_grad=True), world_size=(2, 3), plan=PLAN)
    check(evidence)
    assert "the gradient of mlp.0.weight" in evidence.graphs[0].names
    assert gathered(evidence) == {"aten.linear.default"}


def test_a_subclass_in_training_cannot_be_deferred() -> None:
    model = block(Dispatching, frozen=False)
    options = {"plan": PLAN, "grad_reduce": "defer"}
    with pytest.raises(fxsp.UnsupportedError, match=r"is a Dispatching that requires grad.*freeze it"):
        fxsp.verify(model, tokens(5), world_size=2, options=options)


def test_frozen_weights_with_deferred_gradients() -> None:
    evidence = fxsp.verify(block(Dispatching), tokens(13), world_size=2, options={"plan": PLAN, "grad_reduce": "defer"})
    check(evidence)


def test_a_custom_function_inside_is_not_lost() -> None:
    """A trace would not see its backward pass."""
    x = tokens(13, requires_grad=True)
    evidence = fxsp.verify(block(Straight), x, world_size=2, plan=PLAN)
    assert "runs _Product.apply, the backward pass of which a trace does not see" in evidence.graphs[0].unsharded


class Outside(nn.Module):
    """Subclasses that are a buffer, a global constant, and half of a sum; one is returned."""

    def __init__(self, *, returns: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.returns = returns
        self.inner = nn.Linear(32, 32)
        self.register_buffer("table", Dispatching.of(torch.randn(32, 32)))

    def forward(self, x: Tensor) -> Any:
        y = self.inner(x) @ self.table + x @ CONSTANT
        y = y + self.table.mean(0)
        with torch.no_grad():
            y = y * (x @ CONSTANT).relu().mean()
        return (y, self.table.detach()) if self.returns else y


CONSTANT = Dispatching.of(torch.eye(32) + 0.5)


@pytest.mark.parametrize("training", [False, True])
def test_buffers_and_constants(training: bool) -> None:
    with torch.set_grad_enabled(training):
        evidence = fxsp.verify(Outside(), tokens(13, requires_grad=training), world_size=(2, 3), plan=PLAN)
    check(evidence)
    assert gathered(evidence) == set()


def test_a_subclass_that_is_made_and_returned_leaves_the_graph_whole() -> None:
    with torch.no_grad():
        evidence = fxsp.verify(Outside(returns=True), tokens(5), world_size=2, plan=PLAN)
    assert "is a Dispatching that the traced code makes" in evidence.graphs[0].unsharded


def test_autocast() -> None:
    """Casts act on the operator before the subclass does, and inside it."""
    for kind in (Dispatching, Calling):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            evidence = fxsp.verify(block(kind), tokens(13), world_size=2, plan=PLAN)
        assert not evidence.graphs[0].unsharded
        assert evidence.ok, str(evidence)


def test_explain() -> None:
    with torch.no_grad():
        report = fxsp.explain(block(Calling), tokens(13), world_size=4, plan=PLAN)
    assert [a.method for a in report.attentions] == ["ulysses"]
    assert "int8" in report.graph("partitioned") or "i8" in report.graph("partitioned")


#: Kinds on real ranks, and whether gradients are compared.
_ON_RANKS: tuple[tuple[type[Dispatching], bool, bool], ...] = (
    (Dynamic, False, True),
    (Dispatching, True, True),
    (Dispatching, True, False),
    (Straight, True, True),
)


def _on_ranks(rank: int, size: int) -> list[float]:
    errors = []
    for kind, training, frozen in _ON_RANKS:
        torch.compiler.reset()
        model, x = block(kind, frozen=frozen), tokens(13, requires_grad=training)
        with torch.set_grad_enabled(training):
            expected = model(x)
            found = torch.compile(model, backend="sp", options={"plan": PLAN, "inner": "aot_eager"})(x)
        errors.append(error_of(found, expected))
        if training:
            inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
            seed = torch.randn_like(expected)
            pairs = zip(*(torch.autograd.grad(y, inputs, seed) for y in (found, expected)), strict=True)
            errors += [error_of(a, b) for a, b in pairs]
    return errors


@pytest.mark.filterwarnings("ignore::fxsp.errors.FxspWarning")
def test_on_real_ranks(ranks: Any) -> None:
    for errors in ranks(2).run(_on_ranks, timeout=240.0):
        assert max(errors) < 1e-5, errors
