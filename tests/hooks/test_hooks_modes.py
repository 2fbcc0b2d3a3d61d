"""One plan, two modes: a hooked model that is compiled, and what becomes of it where a compiler gives up."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from typing import Any, ClassVar

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

import fxsp
from fxsp.hooks.sequence_parallel import enable_sequence_parallel_for_model, remove_sequence_parallel, report_of
from hook_parts_base import Block, Deep, In, Out, x
from running import error_of, recorded

ASIDE = "hooks of sequence parallelism stand aside: the plan is compiled"
TOOK_OVER = "hooks run this call eagerly"


class Whole(Deep):
    """Nothing stops a compiler."""

    _sp_plan: ClassVar = {"body.blocks.0": {"x": In(1)}, "out": Out(1)}


class BreakInRoot(Whole):
    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        torch._dynamo.graph_break()
        return self.out(y)


class _Breaks(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.attn(x)
        torch._dynamo.graph_break()
        return x + self.ff(y)


class _Disabled(Block):
    @torch._dynamo.disable
    def forward(self, x: Tensor) -> Tensor:
        return x + self.ff(self.attn(x))


class BreakInBlock(Whole):
    def __init__(self, block: type[Block] = _Breaks) -> None:
        super().__init__()
        self.body.blocks[1] = block()


class DisabledBlock(BreakInBlock):
    def __init__(self) -> None:
        super().__init__(_Disabled)


class DisabledRoot(Whole):
    @torch._dynamo.disable
    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x))


def _run(rank: int, size: int, kind: type[Whole], backend: str, limit: int | None) -> dict[str, Any]:
    torch.manual_seed(0)
    model = kind().double()
    whole = copy.deepcopy(model)
    enable_sequence_parallel_for_model(model)
    before = len(fxsp.reports())
    options = {"options": {"inner": "eager"}} if backend == "sp" else {}
    compiled = torch.compile(model, backend=backend, dynamic=False, **options)
    limited = nullcontext() if limit is None else torch._dynamo.config.patch(recompile_limit=limit)
    worst = 0.0
    with recorded() as warnings, limited:
        for n in (7, 2):
            ours, theirs = (x(n).double().requires_grad_() for _ in range(2))
            out, expected = compiled(ours), whole(theirs)
            (out * out).sum().backward()
            (expected * expected).sum().backward()
            pairs = [(out, expected), (ours.grad, theirs.grad)]
            pairs += [(p.grad, q.grad) for p, q in zip(model.parameters(), whole.parameters(), strict=True)]
            worst = max(worst, *(error_of(a, b) for a, b in pairs if float(b.norm()) > 1e-9))
    notes = [note for report in fxsp.reports()[before:] for note in report.notes]
    return {
        "error": worst,
        "compiled": [len(report.attentions) for report in fxsp.reports()[before:] if ASIDE in report.notes],
        "took over": sum(note.startswith(TOOK_OVER) for note in notes),
        "warned": sum(TOOK_OVER in warning for warning in warnings),
        "eager": [record.method for record in report_of(model).attentions],
    }


GIVEN_UP = {"compiled": [], "took over": 1, "warned": 1, "eager": ["ulysses"] * 3}
#: Model, backend, recompile limit -> what happens to two lengths.
MODES = [
    (Whole, "sp", None, {"compiled": [3, 3], "took over": 0, "warned": 0, "eager": []}),
    (Whole, "sp", 1, {"compiled": [3], "took over": 1, "warned": 1, "eager": ["ulysses"] * 3}),
    (BreakInRoot, "sp", None, GIVEN_UP),
    (BreakInBlock, "sp", None, GIVEN_UP),
    (DisabledBlock, "sp", None, GIVEN_UP),
    (DisabledRoot, "sp", None, GIVEN_UP),
    (Whole, "eager", None, {"compiled": [3, 3], "took over": 0, "warned": 0, "eager": []}),
    (Whole, "eager", 1, {"compiled": [3], "took over": 1, "warned": 1, "eager": ["ulysses"] * 3}),
    (BreakInBlock, "eager", None, GIVEN_UP),
]


@pytest.mark.parametrize(("kind", "backend", "limit", "expected"), MODES)
def test_right_and_reported_whoever_runs_it(ranks, kind: Any, backend: str, limit: Any, expected: Any) -> None:
    for seen in ranks(2).run(_run, kind, backend, limit):
        assert seen.pop("error") <= 1e-12
        assert seen == expected


def _in_other_code(rank: int, size: int, how: str) -> tuple[float, int, list[str], list[str]]:
    """A hooked model that is called by a function, which another backend compiles."""
    torch.manual_seed(0)
    first, second = Whole().double(), Whole().double()
    wholes = copy.deepcopy(first), copy.deepcopy(second)
    enable_sequence_parallel_for_model(first)
    if how == "two models":
        enable_sequence_parallel_for_model(second)
    elif how == "a part of the plan is removed":
        remove_sequence_parallel(first, {"out": Out(1)})
    elif how == "a copy":
        first = pickle.loads(pickle.dumps(copy.deepcopy(first)))
    compiled = torch.compile(lambda x: second(x) - 2 * first(x), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        error = error_of(compiled(x(5).double()), wholes[1](x(5).double()) - 2 * wholes[0](x(5).double()))
    report = fxsp.reports()[-1]
    entries = [record.entry.partition(":")[0] for record in report.plan]
    return error, len(report.attentions), report.notes, entries


OTHERS = [
    ("one model", ["body.blocks.0[x]", "out"]),
    ("a copy", ["body.blocks.0[x]", "out"]),
    ("two models", ["body.blocks.0[x]", "out"]),
    ("a part of the plan is removed", ["body.blocks.0[x]"]),
]


@pytest.mark.parametrize(("how", "entries"), OTHERS)
def test_another_backend_gets_what_the_hooks_would_do(ranks, how: str, entries: list[str]) -> None:
    for error, attentions, notes, planned in ranks(2).run(_in_other_code, how):
        assert error <= 1e-12
        assert attentions == 3  # of one model: the other one is computed whole, and the report says so
        assert planned == entries
        assert "the plan of Whole is not used: one graph follows one plan" in notes
        assert ASIDE in notes


# --- what hooks cannot follow -----------------------------------------------------------------------------------------


class Custom(torch.autograd.Function):
    """The mean over tokens of a local value is not that of all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad - grad.mean(1, keepdim=True)


class Centred(nn.Module):
    _sp_plan: ClassVar = {"": {"x": In(1)}}

    def __init__(self, how: str) -> None:
        super().__init__()
        self.lin, self.how = nn.Linear(8, 8), how

    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        if self.how == "function":
            y = Custom.apply(y)
        elif self.how == "list":
            y = torch.cat([Custom.apply(y), y], -1)
        elif self.how == "output":
            return Custom.apply(y)
        elif self.how == "products":
            y = (y @ y.transpose(1, 2)).softmax(-1) @ y + torch.einsum("bsd,btd->bst", y, y).sum(-1, keepdim=True)
            y = y + (y.unsqueeze(2) - y.unsqueeze(1)).square().sum(2)
        else:
            y = torch.fft.fft(y, dim=1).real + torch.cdist(y, y).sum(-1, keepdim=True)
        return y * 2


def _centred(rank: int, size: int, how: str, gradients: bool) -> tuple[float, list[str]]:
    torch.manual_seed(0)
    model = Centred(how).double()
    whole = copy.deepcopy(model)
    enable_sequence_parallel_for_model(model)
    with recorded() as warnings, torch.set_grad_enabled(gradients):
        out, expected = model(x(5).double()), whole(x(5).double())
    if gradients:
        out.square().sum().backward()
        expected.square().sum().backward()
        expected, out = expected + whole.lin.weight.grad.sum(), out + model.lin.weight.grad.sum()
    return error_of(out, expected), [text for text in warnings if "ImplicitGather" in text]


def _refused(rank: int, size: int, how: str) -> str:
    with pytest.raises(fxsp.UnsupportedError) as error:
        _centred(rank, size, how, True)
    return str(error.value)


@pytest.mark.parametrize("how", ["function", "list", "output"])
def test_a_custom_function_is_refused_in_training(ranks, how: str) -> None:
    for error, _ in ranks(2).run(_centred, how, False):
        assert error <= 1e-12
    for message in ranks(2).run(_refused, how):
        assert message.startswith("hooks: `Custom.apply`")
        assert "Gather before it" in message


def test_an_operator_without_a_rule_runs_whole_and_is_reported(ranks) -> None:
    for error, warnings in ranks(2).run(_centred, "operators", True):
        assert error <= 1e-12
        assert any("fft" in text for text in warnings)
        assert any("cdist" in text for text in warnings)


def test_an_operand_that_is_gathered_has_the_gradient_of_one_process(ranks) -> None:
    for error, warnings in ranks(3).run(_centred, "products", True):
        assert error <= 1e-12
        for name in ("matmul", "einsum", "sub"):
            assert any(f"gathered for {name} " in text for text in warnings)
