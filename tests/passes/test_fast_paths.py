"""torch's own transformer modules where they take a fast path: split as any other layer, with the eager numbers."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsp
from fxsp.report import Report
from simulated import Simulated, by_plan

BATCH, TOKENS, WIDTH = 2, 13, 16


def split(model: Any, size: int, plan: dict[str, Any], *args: Any, **kwargs: Any) -> tuple[Any, Any, Report]:
    """What ``model`` gives on ``size`` ranks and eagerly, without gradients, and the report of its one graph."""
    torch.compiler.reset()
    reports: list[Report] = []
    backend = Simulated(size, by_plan({"plan": {"": plan}, "strict": True}, reports))
    with torch.no_grad():
        found, expected = torch.compile(model, backend=backend)(*args, **kwargs), model(*args, **kwargs)
    (report,) = reports
    assert report.unsharded.partition(":")[0] == ("there is nothing to split" if args[0].shape[1] == 1 else "")
    return found, expected, report


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6, equal_nan=True)


def encoder(**options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    whole = {name: options.pop(name) for name in ("mask_check", "enable_nested_tensor") if name in options}
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 24, **{"batch_first": True, "dropout": 0.0, **options})
    return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(WIDTH), **whole).eval()


PADS = torch.tensor([9, 13])[:, None] <= torch.arange(TOKENS)
ALL_PADS = torch.tensor([9, 0])[:, None] <= torch.arange(TOKENS)
SCATTERED = PADS | (torch.arange(TOKENS) == 3)
CAUSAL = nn.Transformer.generate_square_subsequent_mask(TOKENS)
DISTANCES = -0.5 * (torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)).abs().float()

MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "pads": {"src_key_padding_mask": PADS},
    "an entry of pads only": {"src_key_padding_mask": ALL_PADS},
    "pads in between": {"src_key_padding_mask": SCATTERED},
    "pads as numbers": {"src_key_padding_mask": torch.zeros(PADS.shape).masked_fill(PADS, -torch.inf)},
    "causal": {"mask": CAUSAL},
    "causal, as it is said": {"mask": CAUSAL, "is_causal": True},
    "causal and pads, unlike dtypes": {"mask": CAUSAL, "src_key_padding_mask": PADS},
    "causal and pads, booleans": {"mask": CAUSAL.isinf(), "src_key_padding_mask": ALL_PADS},
    "every number that is not zero masks": {"mask": DISTANCES},
    "one for each head": {"mask": CAUSAL.isinf().expand(BATCH * 4, TOKENS, TOKENS)},
}


@pytest.mark.filterwarnings("ignore:Support for mismatched", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize(
    ("masks", "checked"),
    [*((name, True) for name in MASKS), *((name, False) for name in MASKS if "entry" in name or "between" in name)],
)
def test_an_encoder_is_split_and_gives_what_it_gives_eagerly(masks: str, checked: bool) -> None:
    model, x = encoder(mask_check=checked), torch.randn(BATCH, TOKENS, WIDTH)
    plan = {"src": fxsp.SequenceParallelInput(1)}
    found, expected, report = split(model, 3, plan, x, **MASKS[masks])
    close(found, expected)
    assert len(report.attentions) == 2
    assert {r.kind for r in report.collectives} == {"all_gather"}
    assert not [g for g in report.implicit_gathers if g.kind == "implicit"]


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"norm_first": True}, 2),
        ({"activation": "gelu"}, 4),
        ({"batch_first": False}, 8),
        ({"bias": False}, 2),
        ({"activation": nn.SiLU()}, 3),
    ],
    ids=str,
)
def test_variants_of_the_layer(options: dict[str, Any], size: int) -> None:
    x = torch.randn(BATCH, TOKENS, WIDTH)
    dim = 1 if options.get("batch_first", True) else 0
    x = x if dim else x.transpose(0, 1)
    plan = {"src": fxsp.SequenceParallelInput(dim)}
    found, expected, report = split(encoder(**options), size, plan, x, src_key_padding_mask=PADS)
    close(found, expected)
    assert len(report.attentions) == 2


@pytest.mark.parametrize("tokens", [1, 3])
def test_fewer_tokens_than_ranks(tokens: int) -> None:
    plan = {"src": fxsp.SequenceParallelInput(1)}
    found, expected, _ = split(encoder(), 4, plan, torch.randn(BATCH, tokens, WIDTH))
    close(found, expected)


def test_a_mask_of_pads_that_the_plan_splits_too() -> None:
    plan = {"src": fxsp.SequenceParallelInput(1), "src_key_padding_mask": fxsp.SequenceParallelInput(1)}
    x = torch.randn(BATCH, TOKENS, WIDTH)
    found, expected, _ = split(encoder(), 3, plan, x, src_key_padding_mask=PADS)
    close(found, expected)


def test_heads_are_exchanged_under_a_causal_mask() -> None:
    """The mask is computed in the model: it becomes the flag, and long sequences do not gather keys."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder()

        def forward(self, x: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
            return self.encoder(x, mask=mask)

    plan = {"x": fxsp.SequenceParallelInput(1)}
    found, expected, report = split(Own().eval(), 2, plan, torch.randn(BATCH, 64, WIDTH))
    close(found, expected)
    assert [a.method for a in report.attentions] == ["ulysses", "ulysses"]


def test_a_decoder_with_a_causal_mask_is_one_graph() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(WIDTH, 4, 24, batch_first=True, dropout=0.0)
    model, x, memory = nn.TransformerDecoder(layer, 2).eval(), torch.randn(2, TOKENS, WIDTH), torch.randn(2, 7, WIDTH)
    plan = {"tgt": fxsp.SequenceParallelInput(1)}
    found, expected, report = split(model, 3, plan, x, memory, tgt_mask=CAUSAL)
    close(found, expected)
    assert len(report.attentions) == 4


def test_gradients_of_an_encoder_with_a_causal_mask() -> None:
    """In training there is no fast path, but asking whether the mask is causal would break the graph all the same."""
    torch.compiler.reset()
    model, reports = encoder().train(), []
    backend = Simulated(3, by_plan({"plan": {"": {"src": fxsp.SequenceParallelInput(1)}}}, reports))
    x = torch.randn(BATCH, TOKENS, WIDTH)
    grads = []
    for call in (torch.compile(model, backend=backend), model):
        model.zero_grad()
        call(x, mask=CAUSAL).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)
    assert [len(r.attentions) for r in reports] == [2]


@pytest.mark.filterwarnings("ignore::fxsp.ImplicitGatherWarning")  # whoever asks for the weights needs all keys
@pytest.mark.parametrize(("weights", "average"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("mask", [None, (ALL_PADS, 1), (CAUSAL.isinf(), 0), (DISTANCES.expand(BATCH, 4, -1, -1), 2)])
def test_the_operator_of_self_attention(mask: tuple[Tensor, int] | None, weights: bool, average: bool) -> None:
    torch.manual_seed(0)
    parts = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
    blocked, kind = mask or (None, None)

    def attend(x: Tensor) -> Any:
        projections = parts.in_proj_weight, parts.in_proj_bias, parts.out_proj.weight, parts.out_proj.bias
        return torch._native_multi_head_attention(x, x, x, WIDTH, 4, *projections, blocked, weights, average, kind)

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return attend(x)

    torch.compiler.reset()
    reports: list[Report] = []
    backend = Simulated(3, by_plan({"plan": {"": {"x": fxsp.SequenceParallelInput(1)}}}, reports))
    x = torch.randn(BATCH, TOKENS, WIDTH)
    # The weights of each head are wider than a hidden state, and they are returned.
    wide = pytest.warns(fxsp.OutputGatherWarning, match="2 outputs are") if weights and not average else nullcontext()
    with torch.no_grad(), wide:
        found = torch.compile(Model(), backend=backend)(x)
    with torch.no_grad():
        expected = Model()(x)
    close(found[0], expected[0])
    assert (found[1] is None) == (not weights)
    if weights:
        close(found[1], expected[1])
    assert [a.method for r in reports for a in r.attentions][:1] == ["gather_kv"]


def test_other_backends_see_nothing_of_this() -> None:
    model, x = encoder(), torch.randn(BATCH, TOKENS, WIDTH)
    torch.compiler.reset()
    seen: list[Any] = []

    def backend(gm: Any, inputs: Any) -> Any:
        seen.extend(gm.graph.nodes)
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=backend)(x, src_key_padding_mask=PADS)
    assert torch._transformer_encoder_layer_fwd in [node.target for node in seen]
    assert "arange" not in {getattr(node.target, "__name__", "") for node in seen}
