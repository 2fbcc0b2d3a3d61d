"""What is gathered because the graph returns it: listed by name, and said where it is much of all that is sent."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxsp
from simulated import Simulated, by_plan

WIDTH, VOCABULARY = 32, 512
PLAN = {"": {"ids": fxsp.SequenceParallelInput(1), "labels": fxsp.SequenceParallelInput(1)}}


class Cache:
    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, 8, -1)).permute(2, 0, 3, 1, 4).unbind()
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).flatten(2)), k, v


class Language(nn.Module):
    """A causal language model in small."""

    def __init__(self, layers: int = 2, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(vocabulary, WIDTH), nn.Linear(WIDTH, vocabulary)
        self.layers = nn.ModuleList(Block() for _ in range(layers))

    def forward(
        self, ids: Tensor, labels: Tensor | None = None, returns: str = "logits", cache: Cache | None = None
    ) -> dict[str, Any]:
        x, pairs, states = self.embed(ids), [], []
        for layer in self.layers:
            states.append(x)
            x, k, v = layer(x)
            pairs.append((k, v))
        logits = self.head(x[:, -1:] if "last" in returns else x)
        found: dict[str, Any] = {}
        if labels is not None:
            found["loss"] = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        if "logits" in returns or "last" in returns:
            found["logits"] = logits
        if "cache" in returns:
            found["past_key_values"] = pairs
        if "hidden" in returns:
            found["hidden_states"] = states
        if "state" in returns:
            found["state"] = x
        if cache is not None:
            cache.layers = pairs
        return found


def explained(*, strict: bool = False, model: nn.Module | None = None, **arguments: Any) -> fxsp.Explanation:
    torch.manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (1, 21))
    options = {"plan": {"": {"ids": PLAN[""]["ids"]}} if "labels" not in arguments else PLAN, "strict": strict}
    with torch.no_grad():
        return fxsp.explain(model or Language(), world_size=4, options=options, ids=ids, **arguments)


def outputs(found: fxsp.Explanation) -> dict[str, Any]:
    """Names of the outputs that are gathered, and bytes."""
    records = [g for r in found.results for g in r.report.implicit_gathers if g.kind == "output"]
    return {record.name: record.bytes for record in records}


LABELS = torch.zeros(1, 21, dtype=torch.int64)


@pytest.mark.parametrize("labels", [None, LABELS])
def test_logits_are_named_with_their_bytes(labels: Tensor | None) -> None:
    given = {} if labels is None else {"labels": labels}
    found = explained(returns="logits", **given)
    assert outputs(found) == {"logits": 3 * 6 * VOCABULARY * 4}
    assert "output logits, of " in str(found)
    with pytest.raises(fxsp.StrictError, match=r"(?s)logits, of .*return the loss alone.*logits_to_keep"):
        explained(strict=True, returns="logits", **given)


@pytest.mark.parametrize("returns", ["last", "state", "nothing"])
def test_what_avoids_it_does_not_warn(returns: str) -> None:
    explained(strict=True, returns=returns, **({} if returns != "nothing" else {"labels": LABELS}))


def test_keys_and_values_that_are_returned() -> None:
    found = explained(returns="last cache")
    sent = 3 * 6 * WIDTH * 4
    assert outputs(found) == {f"past_key_values[{i}][{j}]": sent for i in range(2) for j in range(2)}
    assert [(a.method, a.bytes) for a in found.attentions] == [("local", 2 * sent)] * 2
    assert "its keys and values are outputs of the graph" in str(found)
    gathers = [r for r in found.collectives if r.kind == "all_gather"]
    assert [r.bytes for r in gathers] == [sent] * 4, "one gather serves attention and output"
    with pytest.raises(fxsp.StrictError, match=r"(?s)past_key_values\[0\]\[0\].*use_cache=False"):
        explained(strict=True, returns="last cache")


def test_keys_and_values_that_are_left_in_an_object() -> None:
    found = explained(returns="last", cache=Cache())
    assert set(outputs(found)) == {f"cache.layers[{i}][{j}]" for i in range(2) for j in range(2)}


def test_the_states_of_all_layers() -> None:
    with pytest.raises(fxsp.StrictError, match=r"(?s)hidden_states\[.*return what is computed of it"):
        explained(strict=True, model=Language(6), returns="last hidden")


def test_a_warning_for_each_compile_and_the_values_are_right() -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    model, ids = Language(), torch.randint(0, VOCABULARY, (1, 21))
    function = torch.compile(model, backend=Simulated(3, by_plan({"plan": {"": {"ids": PLAN[""]["ids"]}}})))
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [function(ids, returns="logits cache"), function(ids, returns="logits cache")][-1]
        expected = model(ids, returns="logits cache")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    (said,) = [str(w.message) for w in caught if issubclass(w.category, fxsp.OutputGatherWarning)]
    assert "5 outputs are" in said
    assert "use_cache=False" in said
    assert "logits_to_keep" in said


def test_a_model_that_sends_nothing_else() -> None:
    """A hidden state has to be returned once: that is no waste."""
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    options = {"plan": {"": {"input": fxsp.SequenceParallelInput(1)}}, "strict": True}
    with torch.no_grad():
        found = fxsp.explain(model, torch.randn(1, 9, 8), world_size=2, options=options)
    assert outputs(found) == {"the result": 1 * 5 * 8 * 4}
