"""What ranks compare: which graphs draw random numbers, digests of weights, and what they cost."""

from __future__ import annotations

import timeit
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxsp.ranks.alike import draws
from fxsp.ranks.checks import value_topics


def _graph(function: Callable[..., Any], *args: Tensor) -> torch.fx.GraphModule:
    found = []
    torch.compile(function, backend=lambda gm, _: found.append(gm) or gm.forward)(*args)
    return found[0]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: nn.functional.dropout(x, 0.5), ("cpu",)),
        (lambda x: nn.functional.dropout(x, 0.5, training=False), ()),
        (lambda x: nn.functional.dropout(x, 0.0), ()),
        (lambda x: x + torch.randn_like(x), ("cpu",)),
        (lambda x: x + torch.rand(3, 8), ("cpu",)),
        (lambda x: torch.ops.aten.bernoulli.p(x, 0.5), ("cpu",)),
        (lambda x: x.clone().normal_(), ("cpu",)),
        (lambda x: nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.1), ("cpu",)),
        (lambda x: nn.functional.scaled_dot_product_attention(x, x, x), ()),
        (lambda x: torch.utils.checkpoint.checkpoint(nn.functional.dropout, x, 0.5, use_reentrant=False), ("cpu",)),
        (lambda x: x.sin(), ()),
    ],
)
def test_graphs_that_draw_are_known(function: Callable[..., Any], expected: tuple[str, ...]) -> None:
    assert draws(_graph(function, torch.randn(3, 8))) == expected


def test_a_sample_of_weights_sees_another_seed_and_a_small_change() -> None:
    weights = [("w", nn.Parameter(torch.randn(300, 40))), ("b", nn.Parameter(torch.randn(64)))]
    before = value_topics(weights, weights_in_full=False)
    with torch.no_grad():
        weights[1][1][17] += 1
    after = value_topics(weights, weights_in_full=False)["weights"].split("\n")
    assert before["weights"].split("\n")[0] == after[0]
    assert before["weights"].split("\n")[1] != after[1]
    weights[0][1].data.normal_()
    assert value_topics(weights, weights_in_full=False)["weights"].split("\n")[0] != after[0]


def test_digests_cost_less_than_a_hundredth_of_a_forward_pass_of_4096_tokens() -> None:
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), torch.randn(1, 4096, 256)
    inputs = [("x", x), *model.named_parameters()]
    with torch.no_grad():
        forward = min(timeit.repeat(lambda: model(x), number=1, repeat=2))
    assert min(timeit.repeat(lambda: value_topics(inputs, weights_in_full=False), number=1, repeat=10)) < forward / 100
