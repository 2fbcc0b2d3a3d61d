"""Causal losses that cut the scores and shift the targets: no score is gathered, values and gradients are the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_losses import BATCH, CLASSES, WIDTH, compare, implicit, split
from torch import Tensor, nn

from fxsp import SequenceParallelInput
from simulated import Simulated, by_plan

Loss = Callable[[Tensor, Tensor], Tensor]
V = CLASSES


def _rows(x: Tensor, y: Tensor, **how: object) -> Tensor:
    return F.cross_entropy(x[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1), **how)


def _masked(x: Tensor, y: Tensor) -> Tensor:
    mask = (y[:, 1:] > 2).reshape(-1)
    return (_rows(x, y, reduction="none") * mask).sum() / mask.sum()


#: Spellings, and the sums over ranks that each takes: of a count, of a loss.
SPELLINGS: dict[str, tuple[Loss, int]] = {
    "reshape": (_rows, 2),
    "view": (
        lambda x, y: F.cross_entropy(x[..., :-1, :].contiguous().view(-1, V), y[..., 1:].contiguous().view(-1)),
        2,
    ),
    "flatten": (lambda x, y: F.cross_entropy(x[:, :-1].flatten(0, 1), y[:, 1:].flatten()), 2),
    "classes second": (lambda x, y: F.cross_entropy(x[:, :-1].transpose(1, 2), y[:, 1:]), 2),
    "upcast, soft cap": (lambda x, y: _rows((x / 3).tanh() * 3, y), 2),
    "cap of the rest": (
        lambda x, y: F.cross_entropy((x[:, :-1] / 3).tanh().mul(3).double().flatten(0, 1), y[:, 1:].flatten()),
        2,
    ),
    "weights": (
        lambda x, y: _rows(x, y.clamp(min=0), weight=torch.arange(1.0, V + 1).double(), label_smoothing=0.1),
        2,
    ),
    "ignored class": (lambda x, y: _rows(x, y.clamp(min=0), ignore_index=3), 2),
    "sum": (lambda x, y: _rows(x, y, reduction="sum"), 1),
    "log-softmax": (lambda x, y: F.nll_loss(F.log_softmax(x[:, :-1], -1).reshape(-1, V), y[:, 1:].reshape(-1)), 2),
    "loss mask": (_masked, 1),
    "loss mask by sequence": (
        lambda x, y: (_rows(x, y, reduction="none").view(len(x), -1) * (y[:, 1:] > 2).double()).sum(1).mean(),
        1,
    ),
    "mean by sequence": (
        lambda x, y: F.cross_entropy(x[:, :-1].transpose(1, 2), y[:, 1:], reduction="none").mean(1).sum(),
        1,
    ),
    "two ahead, and backwards": (
        lambda x, y: (
            F.cross_entropy(x[:, :-2].reshape(-1, V), y[:, 2:].reshape(-1))
            + F.cross_entropy(x[:, 1:].reshape(-1, V), y[:, :-1].reshape(-1))
        ),
        3,  # of two counts, and of the sum of both losses
    ),
}


def _labels(length: int) -> Tensor:
    labels = torch.randint(0, CLASSES, (BATCH, length), generator=torch.Generator().manual_seed(length))
    labels[0, : length // 2] = -100
    labels[1, 1:3] = 4
    return labels


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("length", [5, 6, 9])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_no_score_is_gathered(spelling: str, length: int, size: int) -> None:
    loss, sums = SPELLINGS[spelling]
    x = torch.randn(BATCH, length, WIDTH, dtype=torch.float64, requires_grad=True)
    head = torch.randn(CLASSES, WIDTH, dtype=torch.float64, requires_grad=True)
    program = compare(lambda x, w, y: loss(F.linear(split(x), w), y), [x, head, _labels(length)], size)
    assert implicit(program) == []
    assert [c.kind for c in program.report.collectives] == ["all_reduce"] * sums


def test_scores_of_joined_segments() -> None:
    """Text behind an image prefix: the loss is of the text alone, of more than half of the rows."""
    image, text = (torch.randn(BATCH, n, WIDTH, dtype=torch.float64, requires_grad=True) for n in (3, 8))
    head = torch.randn(CLASSES, WIDTH, dtype=torch.float64, requires_grad=True)

    def loss(image: Tensor, text: Tensor, head: Tensor, y: Tensor) -> Tensor:
        scores = F.linear(torch.cat([split(image), split(text)], 1), head)
        return F.cross_entropy(scores[:, 2:-1].reshape(-1, V), y.reshape(-1))

    program = compare(loss, [image, text, head, _labels(8)], 3)
    assert implicit(program) == []


def test_a_few_rows_of_many_are_gathered() -> None:
    """Scores of all rows would be computed for the sake of the last ones."""
    x = torch.randn(BATCH, 12, WIDTH, dtype=torch.float64, requires_grad=True)
    head = torch.randn(CLASSES, WIDTH, dtype=torch.float64, requires_grad=True)

    def loss(x: Tensor, head: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(split(x)[:, -4:-1], head).flatten(0, 1), y[:, -3:].flatten())

    program = compare(loss, [x, head, _labels(12)], 2)
    assert len(implicit(program)) == 1


class Language(nn.Module):
    """A causal language model with the loss that older models have in their forward."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.qkv, self.head = nn.Embedding(V, 16), nn.Linear(16, 48), nn.Linear(16, V, bias=False)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.words(ids)
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4).unbind()
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        logits = self.head(x).float()
        shift_logits, shift_labels = logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous()
        return F.cross_entropy(shift_logits.view(-1, V), shift_labels.view(-1))


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_language_model(size: int, dynamic: bool | None) -> None:
    """Labels split or whole, lengths symbolic or not: one graph without an implicit gather, under ``strict``."""
    torch.manual_seed(0)
    model, reports = Language(), []
    for labels in ({}, {"labels": SequenceParallelInput(1)}):
        torch.compiler.reset()
        options = {"plan": {"": {"ids": SequenceParallelInput(1), **labels}}, "strict": True}
        fast = torch.compile(model, backend=Simulated(size, by_plan(options, reports)), dynamic=dynamic)
        for length in (7, 9) if dynamic else (7,):
            given = torch.randint(0, V, (2, length)), _labels(length)
            wanted, got = model(*given), fast(*given)
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
            pairs = [torch.autograd.grad(loss, list(model.parameters())) for loss in (got, wanted)]
            for a, b in zip(*pairs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not [r.implicit_gathers for r in reports if any(g.kind == "implicit" for g in r.implicit_gathers)]
