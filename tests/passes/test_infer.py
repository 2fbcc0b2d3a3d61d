"""Plans that are found: where they come from, what they are made of, what is said of them, and what they never do."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fuzzing
import fxsp
import models
import small
import zoo
from distributed import Pool
from fuzzing import Input, check
from fxsp import SequenceParallelInput, SequenceParallelOutput
from fxsp.offline.partition import partition_offline
from running import Case, run_case, simulate_case
from unplanned import MODULES, Block

Ranks = Callable[[int], Pool]


def report_of(model: Callable[..., Any], *args: Any, size: int = 2, **options: Any) -> Any:
    """The report of the only graph of ``model(*args)``."""
    torch.compiler.reset()
    (result,) = partition_offline(model, args, world_size=size, options=options)
    return result.report


def entries(report: Any) -> list[str]:
    return [record.entry.partition(":")[0] for record in report.plan if record.applied]


class TestSources:
    """Options, then the model's own plan, then what is found."""

    def test_the_plan_of_the_options_wins(self) -> None:
        model = small.Model()
        model._sp_plan = {"": {"x": SequenceParallelInput(1)}}
        plan = {"blocks.1": {"hidden": SequenceParallelInput(1)}}
        report = report_of(model, small.inputs(), plan=plan)
        assert entries(report) == ["blocks.1[hidden]"]
        assert report.inferred is None

    @pytest.mark.parametrize("name", ["_sp_plan", "_cp_plan"])
    def test_the_model_s_own_is_next(self, name: str) -> None:
        model = small.Model()
        setattr(model, name, {"blocks.0": {"hidden": SequenceParallelInput(1)}})
        assert entries(report_of(model, small.inputs())) == ["blocks.0[hidden]"]
        assert entries(report_of(model, small.inputs(), plan=None)) == ["blocks.0[hidden]"]
        assert entries(report_of(model, small.inputs(), plan="infer")) == ["<root>[x]"]

    def test_without_any_one_is_found(self) -> None:
        report = report_of(small.Model(), small.inputs())
        assert entries(report) == ["<root>[x]"]
        (record,) = report.plan
        assert "queries of 2 attentions in blocks.*; an input" in record.detail
        assert any(note.startswith("the plan is inferred:") for note in report.notes)

    def test_none_is_a_plan(self) -> None:
        report = report_of(small.Model(), small.inputs(), plan="none")
        assert report.unsharded == "the plan is 'none'"

    def test_other_words_are_refused(self) -> None:
        with pytest.raises(fxsp.OptionError, match=r"'infr'.*one of 'infer', 'none'.*Did you mean \"infer\""):
            report_of(small.Model(), small.inputs(), plan="infr")

    @pytest.mark.parametrize(
        "plan",
        [{"blocks.7": {"hidden": SequenceParallelInput(1)}}, {"blocks.0": {"x": SequenceParallelInput(9)}}, "text"],
    )
    def test_an_own_plan_that_does_not_fit_is_a_warning(self, plan: Any) -> None:
        model = small.Model()
        model._cp_plan = plan
        torch.compiler.reset()
        backend = fxsp.offline.partition._Offline(fxsp.config.Options(), fxsp.types.Ranks(0, 2, "offline"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.compile(model, backend=backend)(small.inputs())
        (told,) = (w for w in caught if issubclass(w.category, fxsp.OwnPlanWarning))
        assert "another is inferred" in str(told.message)
        assert entries(backend.results[0].report) == ["<root>[x]"]

    def test_a_user_s_plan_that_does_not_fit_is_an_error(self) -> None:
        with pytest.raises(fxsp.PlanError, match=r'no module "7"'):
            report_of(small.Model(), small.inputs(), plan={"blocks.7": {"hidden": SequenceParallelInput(1)}})

    def test_a_better_one_than_the_model_s_own_is_told(self) -> None:
        """A plan that splits the second block alone; one that is as good as what is found is not spoken of."""
        model = small.Model()
        model._sp_plan = {"blocks.1": {"hidden": SequenceParallelInput(1)}}
        told = fxsp.explain(model, small.inputs(8), world_size=2).results[0].report.notes
        assert any(note.startswith("the model's own plan is used: ") for note in told)
        model._sp_plan = small.SPLIT
        found = fxsp.explain(model, small.inputs(8), world_size=2)
        assert "inferred" not in str(found)
        assert found.results[0].report.inferred is None


class TestNothing:
    """What is not worth it, or cannot be, runs whole; that is no error and no warning."""

    class Few(nn.Module):
        """Much is returned, and little computed."""

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(1, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x)

    @pytest.mark.parametrize("strict", [False, True])
    def test_two_numbers_say_why(self, strict: bool) -> None:
        with torch.no_grad():
            report = report_of(self.Few(), torch.randn(1, 2, 1), strict=strict)
        assert report.unsharded == (
            "there is too little to split: each rank would save 128 of 256 operations, and send 256 bytes"
        )
        assert not report.plan

    def test_a_number_has_no_tokens(self) -> None:
        assert "nothing to split" in report_of(lambda x: x * 2, torch.randn(3)).unsharded

    def test_dropout_that_cannot_be_drawn_alike(self) -> None:
        model = small.Model(dropout=0.5).train()
        assert "attention dropout" in report_of(model, small.inputs()).unsharded

    def test_one_rank(self) -> None:
        assert report_of(small.Model(), small.inputs(), size=1).unsharded == "one rank"


class TestChoice:
    def test_a_short_text_stays_whole(self) -> None:
        module, inputs = MODULES["ShortText"]()
        torch.compiler.reset()
        with torch.no_grad():
            (result,) = partition_offline(module, (), inputs, world_size=2, options={"plan": "infer"})
        assert entries(result.report) == ["<root>[x]"]
        assert any("with <root>[text] split, too" in note for note in result.report.notes)
        torch.compiler.reset()
        inputs["text"] = torch.randn(1, 40, 16)
        (result,) = partition_offline(module, (), inputs, world_size=2, options={"plan": "infer"})
        assert entries(result.report) == ["<root>[x]", "<root>[text]"]

    def test_equal_sizes_mean_nothing(self) -> None:
        """Batch, tokens, heads and width are of one size: the tokens are found all the same."""
        torch.manual_seed(0)
        attention = nn.MultiheadAttention(4, 4, batch_first=True).eval()

        def model(x: Tensor) -> Tensor:
            return attention(x, x, x, need_weights=False)[0]

        report = report_of(model, torch.randn(4, 4, 4), size=2, bandwidth=1e12)
        assert [record.detail.partition(":")[0] for record in report.plan] == ["[4, 4, 4] along 1"]

    def test_it_is_the_same_every_time(self) -> None:
        module, inputs = MODULES["VideoAndAudio"]()
        plans = [fxsp.infer_plan(module, world_size=4, **inputs) for _ in range(2)]
        assert plans[0] == plans[1]
        assert plans[0].notes == plans[1].notes

    def test_training_counts_the_backward_pass(self) -> None:
        model = small.Model()
        with torch.no_grad():
            forward = report_of(model, small.inputs()).notes[0]
        assert forward != report_of(model, small.inputs()).notes[0]

    def test_ends_are_gathers_of_the_plan(self) -> None:
        """A picture that is put together at the end is no implicit gather, and no error under ``strict``."""
        model, inputs = models.wan()
        torch.compiler.reset()
        with torch.no_grad():
            options = {"plan": "infer", "strict": True}
            (result,) = partition_offline(model, (), inputs, world_size=2, options=options)
        assert SequenceParallelOutput(1, expected_dims=3) in [entry.spec for entry in result.report.inferred or ()]


REPEATED = """
def program(x1, w10):
    x1.fill_(0.25)
    t11 = F.linear(x1, w10)
    t14 = x1.unflatten(2, (4, -1)).transpose(1, 2)
    t17 = t11.unflatten(2, (1, -1)).transpose(1, 2).repeat_interleave(4, dim=1)
    t18 = x1.unflatten(2, (1, -1)).transpose(1, 2).repeat_interleave(4, dim=1)
    return F.scaled_dot_product_attention(t14, t17, t18)
"""


def test_whole_values_beside_split_keys_whose_heads_are_repeated() -> None:
    """The values are a constant, which is whole; the keys are computed of tokens that are split."""
    check(fuzzing.Case(REPEATED, (Input("x1", (1, "S0", 8)), Input("w10", (2, 8))), {"S0": 2}, size=2, infer=True))


class TestGraphs:
    def test_each_graph_of_several_is_inferred(self) -> None:
        blocks = nn.ModuleList(Block() for _ in range(2)).eval()

        def step(x: Tensor) -> Tensor:
            x = blocks[0](x)
            torch._dynamo.graph_break()
            return blocks[1](x)

        torch.compiler.reset()
        with torch.no_grad():
            results = partition_offline(step, (torch.randn(1, 24, 16),), world_size=2)
        assert [bool(result.report.inferred) for result in results] == [True, True]

    @pytest.mark.parametrize("dynamic", [None, True])
    def test_lengths_may_vary(self, dynamic: bool | None) -> None:
        calls = ({"tokens": 9}, {"tokens": 14})
        found = simulate_case(2, Case("bert", {"tokens": 12, "layers": 1}, calls=calls, dynamic=dynamic))
        assert max(found.errors) <= 1e-5
        assert sum(found.compiles) <= 2
        assert not found.unsharded
        assert found.ran["all_to_all"] == 2


class TestNames:
    """The plan's language: results of functions, and units of tokens."""

    def test_the_result_of_a_function(self) -> None:
        module, inputs = MODULES["ConvolutionFirst"]()
        plan = {"": {"flatten#0": SequenceParallelInput(2)}}
        explained = fxsp.explain(module, world_size=2, plan=plan, **inputs)
        assert explained.plan[0].applied
        wrong = fxsp.explain(module, world_size=2, plan={"": {"flatten#3": SequenceParallelInput(2)}}, **inputs)
        assert not wrong.plan[0].applied
        assert wrong.plan[0].detail == "the module calls flatten 1 times here"

    def test_units(self) -> None:
        module, inputs = MODULES["TokenPyramid"]()
        plan = {"": {"x": SequenceParallelInput(1, unit=2)}}
        explained = fxsp.explain(module, world_size=2, plan=plan, **inputs)
        assert "S(1, 1*[12]*2)" in explained.graph("propagate") or "24 by 2" in explained.graph("propagate")
        odd = fxsp.explain(
            small.Model(), small.inputs(), world_size=2, plan={"": {"x": SequenceParallelInput(1, unit=2)}}
        )
        assert odd.plan[0].detail == "dimension 1 of the tensor [2, 5, 8] does not consist of units of 2"
        with pytest.raises(fxsp.PlanError, match="unit is 0"):
            fxsp.explain(module, world_size=2, plan={"": {"x": SequenceParallelInput(1, unit=0)}}, **inputs)

    def test_blocks_are_one_line(self) -> None:
        class Restarting(nn.Module):
            """Every block needs all tokens at its start."""

            def __init__(self) -> None:
                super().__init__()
                self.blocks = nn.ModuleList(small.Attention() for _ in range(3))

            def forward(self, x: Tensor) -> Tensor:
                for block in self.blocks:
                    x = block(x.flip(1))
                return x

        plan = fxsp.infer_plan(Restarting(), small.inputs(8), world_size=2)
        assert set(plan) <= {"", "blocks.*"}, str(plan)


#: Whole models on real processes, without a plan: name -> arguments of the builder.
DOZEN: dict[str, dict[str, Any]] = {
    "flux": {}, "flux2": {}, "wan": {}, "qwen_image": {}, "sd3": {"layers": 1}, "pixart": {}, "cogvideox": {},
    "ltx": {}, "llama": {"layers": 1}, "gpt2": {"layers": 1}, "bert": {"layers": 1}, "vit": {}, "mixtral": {},
}  # fmt: skip


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", DOZEN)
def test_models_on_processes(ranks: Ranks, name: str, size: int) -> None:
    case = Case(name, DOZEN[name], {"plan": "infer", "inner": "eager"})
    for found in ranks(size).run(run_case, case, timeout=300.0):
        assert max(found.errors) <= 1e-5
        assert not found.unsharded
        assert found.attentions
        assert found.ran == found.planned


#: Beside a text, so many more tokens that the text does not matter.
LARGER: dict[str, dict[str, Any]] = {
    "flux": {}, "flux2": {}, "qwen_image": {}, "wan": {"height": 16, "width": 16},
    "wan_i2v": {"height": 32, "width": 32, "frames": 5}, "ltx": {"size": 8}, "cogvideox": {},
}  # fmt: skip


@pytest.mark.parametrize("name", LARGER)
def test_no_worse_than_the_plan_by_hand(name: str) -> None:
    """It sends at most as much, and a rank computes at most as much, up to a text that stays whole."""
    model, inputs = (getattr(models, name, None) or getattr(zoo, name))(**LARGER[name])
    with torch.no_grad():
        hand = fxsp.explain(model, world_size=2, plan=zoo.PLANS.get(name), **inputs)
        found = fxsp.explain(model, world_size=2, options={"plan": "infer"}, **inputs)
    assert max(found.flops_per_rank) <= max(hand.flops_per_rank)
    total = [sum(size for _, size in each.communication.values()) for each in (found, hand)]
    assert total[0] <= total[1]
