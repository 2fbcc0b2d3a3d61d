"""What a user gets to read when something is wrong: the type of the error, where, what exists, and what would work."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxsp
from distributed import Pool
from fxsp import SequenceParallelInput, SequenceParallelOutput, SequenceParallelPartialInput
from running import compiled, recorded
from small import SPLIT, Model, inputs

Ranks = Callable[[int], Pool]


def failure(run: Callable[[], Any]) -> tuple[str, str]:
    """Type and message of the error that ``run`` raises."""
    try:
        run()
    except Exception as error:  # noqa: BLE001  the test looks at what it is
        return type(error).__name__, str(error)
    return "", ""


# --- plans ------------------------------------------------------------------------------------------------------------

WRONG_PLANS = {
    "module": (
        {"bloks.0": {"hidden": SequenceParallelInput(1)}},
        ["`bloks.0[hidden]: SequenceParallelInput(split_dim=1)`", 'no module "bloks"', "blocks, head", '"blocks.0"'],
    ),
    "deep module": (
        {"blocks.0.qvk": SequenceParallelOutput(1)},
        ["`blocks.0.qvk: SequenceParallelOutput(gather_dim=1)`", "qkv, out", '"blocks.0.qkv"'],
    ),
    "argument": (
        {"blocks.*": {"hiden": SequenceParallelInput(1)}},
        ["`blocks.0[hiden]:", "Attention.forward has no argument", "It has: hidden", 'Did you mean "hidden"'],
    ),
    "dimension": (
        {"": {"x": SequenceParallelInput(3)}},
        ["`<root>[x]: SequenceParallelInput(split_dim=3)`", "dimension 3 is out of range", "[2, 5, 8]"],
    ),
    "output": (
        {"blocks.0": {1: SequenceParallelInput(1, split_output=True)}},
        ["`blocks.0[1]:", "there is no output 1"],
    ),
    "contradiction": (
        {"blocks.*": {"hidden": SequenceParallelInput(1)}, "blocks.1": {"hidden": SequenceParallelInput(2)}},
        ["blocks.1[hidden]: SequenceParallelInput(split_dim=2)", "contradicts", "blocks.*[hidden]"],
    ),
    "text length": (
        {"": {"x": SequenceParallelPartialInput(1, text_len_source="txt")}},
        ['text_len_source names no argument of Model.forward, nor of the model: "txt"', "x, scale"],
    ),
    "no list": ({"blocks": {"hidden": SequenceParallelInput(1)}}, ["never called itself", "`blocks.*[hidden]"]),
    "not a spec": ({"head": 3}, ["int is not a spec", "SequenceParallelOutput"]),
}


@pytest.mark.parametrize("name", WRONG_PLANS)
def test_a_wrong_plan_is_a_plan_error_with_one_rank_too(name: str) -> None:
    plan, parts = WRONG_PLANS[name]
    with pytest.raises(fxsp.PlanError) as error:
        compiled(Model(), plan=plan)(inputs())
    assert type(error.value).__name__ == "PlanError"
    for part in parts:
        assert part in str(error.value)


def test_a_model_may_be_corrected_after_an_error() -> None:
    model = Model()
    with pytest.raises(fxsp.PlanError):
        compiled(model, plan={"bloks": SequenceParallelOutput(1)})(inputs())
    torch.testing.assert_close(compiled(model, plan=SPLIT)(inputs()), model(inputs()))


def test_a_wrong_option_is_an_option_error() -> None:
    for options, parts in [
        (
            {"degree": 2},
            ["unknown option 'degree'", "Valid options: ulysses_degree, ring_degree, allgather_degree, plan"],
        ),
        ({"inner": "inductr"}, ["'inductor', 'aot_eager', 'eager'", 'Did you mean "inductor"']),
        ({"print": "partitoin"}, ['Did you mean "partition"', "capture, annotate"]),
        ({"ulysses_degree": 2}, ["ulysses_degree=2 does not match", "the group has 1 rank", "torchrun"]),
    ]:
        with pytest.raises(fxsp.OptionError) as error:
            torch.compile(Model(), backend="sp", options={"plan": SPLIT, **options})(inputs())
        assert type(error.value).__name__ == "OptionError"
        for part in parts:
            assert part in str(error.value)


# --- one rank ---------------------------------------------------------------------------------------------------------


def _one_rank(size: int) -> None:
    model = Model(mix=True)
    with contextlib.redirect_stdout(io.StringIO()):
        out = compiled(model, plan=SPLIT, print=["captured", "annotated"])(inputs())
    report = fxsp.reports()[-1]
    assert report.unsharded == "one rank"
    assert report.stages["captured"] == report.stages["annotated"]
    assert report.timings.keys() == {"capture", "annotate", "inner"}, "no other pass ran"
    assert [(record.applied, "nothing to split" in record.detail) for record in report.plan] == [(True, True)]
    assert not report.collectives
    assert not report.attentions
    torch.testing.assert_close(out, model(inputs()), rtol=0, atol=0)


def test_without_a_process_group_the_graph_is_unchanged() -> None:
    _one_rank(1)


def _group_of_one(rank: int, size: int) -> None:
    _one_rank(size)
    assert failure(lambda: compiled(Model(), plan=WRONG_PLANS["module"][0])(inputs()))[0] == "PlanError"


def test_with_one_rank_the_graph_is_unchanged(ranks: Ranks) -> None:
    ranks(1).run(_group_of_one)


# --- several ranks ----------------------------------------------------------------------------------------------------


def _plan_errors(rank: int, size: int) -> dict[str, tuple[str, str]]:
    return {
        name: failure(lambda p=plan: compiled(Model(), plan=p)(inputs())) for name, (plan, _) in WRONG_PLANS.items()
    }


def _other_errors(rank: int, size: int) -> dict[str, tuple[str, str]]:
    found = {
        "degree": failure(lambda: compiled(Model(), plan=SPLIT, ulysses_degree=3)(inputs())),
        "degrees": failure(lambda: compiled(Model(), plan=SPLIT, ulysses_degree=2, ring_degree=2)(inputs())),
        "strict": failure(lambda: compiled(Model(mix=True), plan=SPLIT, strict=True)(inputs())),
        "dropout": failure(lambda: compiled(Model(dropout=0.3), plan=SPLIT)(inputs())),
        "inputs": failure(lambda: compiled(Model(), plan=SPLIT, check_inputs=True)(inputs() + rank)),
        "later": failure(lambda: _two_calls(rank)),
        "weights": failure(lambda: compiled(_nudged(Model(), rank), plan=SPLIT, check_inputs=True)(inputs())),
    }
    torch.manual_seed(0)
    model = Model()
    with torch.no_grad():
        same = compiled(model, plan=SPLIT, check_inputs=True, verify=True)(inputs())
        evaluated = compiled(Model(dropout=0.3).eval(), plan=SPLIT, strict=True, verify=True)
        found["fine"] = failure(lambda: evaluated(inputs()))
        found["same inputs"] = ("", "") if torch.allclose(same, model(inputs()), atol=1e-6) else ("wrong", "values")
    return found


_FIRST = {"": {"input": SequenceParallelInput(1)}}


def _two_calls(rank: int) -> None:
    """The second call has another length on one rank only, which compiles another graph there."""
    checked = compiled(nn.Linear(8, 3), plan=_FIRST, check_inputs=True)
    checked(inputs())
    checked(inputs(5 + rank))


def _nudged(model: nn.Module, rank: int) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.1)
        model.get_parameter("head.bias")[0] += rank
    return model


def test_plan_errors_on_two_ranks(ranks: Ranks) -> None:
    for found in ranks(2).run(_plan_errors):
        for name, (_, parts) in WRONG_PLANS.items():
            kind, text = found[name]
            assert kind == "PlanError", (name, kind, text)
            assert all(part in text for part in parts), (name, text)


def test_other_errors_on_two_ranks(ranks: Ranks) -> None:
    expected = {
        "degree": ("OptionError", ["ulysses_degree=3 does not match", "2 ranks", "(1, 2), (2, 1)"]),
        "degrees": ("OptionError", ["ulysses_degree=2 * ring_degree=2 does not match", "2 ranks"]),
        # Two batches of five tokens of 8 floats: each rank sends its three to the other one.
        "strict": ("StrictError", ["aten.cumsum", "small.py:", "192 bytes", "strict=True"]),
        "dropout": ("UnsupportedError", ["blocks.0", "dropout_p=0.3", "small.py:", "eval()"]),
        "inputs": ("InputMismatchError", ["[2, 5, 8]", "between rank 0 and ranks [1]", "same inputs"]),
        "later": ("InputMismatchError", ["ranks [1] run another graph than rank 0", "8]"]),
        "weights": ("InputMismatchError", ["bias", "between rank 0 and ranks [1]"]),
        "fine": ("", []),
        "same inputs": ("", []),
    }
    for found in ranks(2).run(_other_errors, timeout=400.0):
        for name, (kind, parts) in expected.items():
            assert found[name][0] == kind, (name, found[name])
            assert all(part in found[name][1] for part in parts), (name, found[name][1])


def _notes(rank: int, size: int) -> dict[str, Any]:
    plan = {
        "": {"x": SequenceParallelInput(1, expected_dims=3), "scale": SequenceParallelInput(1, expected_dims=3)},
        "blocks.1": {"hidden": SequenceParallelInput(1, expected_dims=4)},
    }
    model = Model(mix=True)
    with torch.no_grad(), recorded() as texts:
        compiled(model, plan=plan)(inputs(), torch.ones(8))
        notes = [(r.applied, r.entry, r.detail) for r in fxsp.reports()[-1].plan]
        compiled(Model(), plan={"": {"scale": SequenceParallelInput(1)}})(inputs())
        nothing = fxsp.reports()[-1].unsharded
        compiled(Model())(inputs())
    gathers = [str(g) for g in fxsp.reports()[-3].implicit_gathers]
    return {"notes": notes, "warnings": texts, "nothing": nothing, "gathers": gathers}


def test_what_does_not_apply_is_listed_and_what_is_gathered_is_warned_about(ranks: Ranks) -> None:
    for found in ranks(2).run(_notes):
        assert [note[0] for note in found["notes"]] == [True, False, False]
        for (_, entry, detail), name, dims in zip(found["notes"][1:], ("scale", "hidden"), (3, 4), strict=True):
            assert name in entry
            assert f"not {dims}-D as expected_dims says" in detail
        assert found["nothing"] == "no entry of the plan applies to this graph"
        kinds = [text.partition(":")[0] for text in found["warnings"]]
        assert kinds == ["ImplicitGatherWarning", "UnshardedWarning"], "a plan that is inferred says nothing"
        assert "cumsum" in found["warnings"][0]
        assert "small.py:" in found["warnings"][0]
        (gather, *outputs) = found["gathers"]
        assert "aten.cumsum" in gather
        assert not outputs, "after the cumulative sum everything is whole"
