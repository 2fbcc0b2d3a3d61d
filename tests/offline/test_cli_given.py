"""What the command line is given: several numbers of ranks, plans, files; and what it refuses before any work."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import fxsp
from fxsp.__main__ import main
from fxsp.offline.given import UsageError, parse_plan_text

FACTORIES = """
import torch, small
from fxsp import SequenceParallelInput
def build():
    return small.Model(mix=True), (small.inputs(),), {}
def on_meta():
    with torch.device("meta"):
        return small.Model(), (torch.empty(2, 5, 8),), {}
def half_meta():
    model = small.Model()
    model.head.to("meta")
    return model, (small.inputs(),), {}
def causal():
    from transformers import LlamaConfig, LlamaForCausalLM
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**sizes)).eval(), (torch.zeros(1, 37, dtype=torch.long),), {}
def never():
    raise AssertionError("called")
tokens = {"": {"x": SequenceParallelInput(split_dim=1)}}
channels = {"": {"x": SequenceParallelInput(split_dim=2)}}
"""


@pytest.fixture(autouse=True)
def _factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "factories", raising=False)


def test_ranks_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--ranks", "2", "4", "8"]
    assert main(["explain", "factories.py:build", "--plan", "factories.py:tokens", *sizes]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["Model", "2", "ranks", "4", "ranks", "8", "ranks"]
    table = {row[: head.index("2 ranks")].strip(): row[head.index("2 ranks") :].split("  ") for row in rows}
    found = [fxsp.explain(_model(), _inputs(), world_size=n, plan=_tokens()) for n in (2, 4, 8)]
    shown = [cell.strip() for cell in table["operations a rank"] if cell.strip()]
    assert [float(cell.split()[0]) for cell in shown] == [
        pytest.approx(max(e.flops_per_rank) / 1e3, rel=1e-2) for e in found
    ]
    assert [c.strip() for c in table["implicit gathers"] if c.strip()] == ["1", "1", "1"]
    assert main(["explain", "factories:build", "--json", *sizes]) == 0
    assert [e["world_size"] for e in json.loads(capsys.readouterr().out)] == [2, 4, 8]


def _model() -> torch.nn.Module:
    import small

    return small.Model(mix=True)


def _inputs() -> torch.Tensor:
    import small

    return small.inputs()


def _tokens() -> dict[str, dict[str, fxsp.SequenceParallelInput]]:
    return {"": {"x": fxsp.SequenceParallelInput(split_dim=1)}}


@pytest.mark.parametrize(
    "text",
    [
        '{"": {"x": SequenceParallelInput(split_dim=1)}}',
        "{'': {'x': fxsp.SequenceParallelInput(1)}}",
        "factories.py:tokens",
        "factories:tokens",
    ],
)
def test_plans(text: str) -> None:
    assert parse_plan_text(text) == _tokens()


def test_other_plans() -> None:
    assert parse_plan_text("infer") == "infer"
    both = parse_plan_text('{"b": {0: SequenceParallelInput(-1, split_output=True)}, "o": SequenceParallelOutput(1)}')
    assert both == {
        "b": {0: fxsp.SequenceParallelInput(-1, split_output=True)},
        "o": fxsp.SequenceParallelOutput(1),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{'x': open('f')}", r"open\('f'\) is no literal; what may be called is SequenceParallelInput"),
        ("{'x': ", "--plan is no dictionary"),
        ("{'x': SequenceParallelInput(dim=1)}", "unexpected keyword argument 'dim'"),
        ("plans.py:tokens", 'there is no file "plans.py"'),
        ("factories.py:token", 'factories.py has no "token"'),
        ("factories.py:build", "is function, no dictionary"),
        ("tokens", "write package.module:plan or file.py:plan"),
    ],
)
def test_plans_that_are_none(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_plan_text(text)


def test_a_plan_of_no_use_is_loud(capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["--plan", "factories.py:channels"]
    for sizes in (["2"], ["2", "3"]):
        assert main(["explain", "factories.py:build", *plan, "--ranks", *sizes]) == 1
        out = capsys.readouterr().out
        assert out.count("WARNING: the plan is of no use: 0% of the work runs on shards; what it splits") == 1
        assert "again by aten.linear.default in blocks.0.qkv (small.py:24) and " in out
    assert main(["verify", "factories.py:build", *plan, "--ranks", "2"]) == 0
    assert "WARNING: the plan is of no use" in capsys.readouterr().out
    assert main(["verify", "factories.py:build", "--plan", "factories.py:tokens", "--ranks", "2"]) == 0
    assert "WARNING" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--html", "nowhere/out.html"], "nowhere/out.html cannot be written: No such file or directory"),
        (["--html", "."], ". cannot be written: Is a directory"),
        (["--plan", "{]"], "--plan is no dictionary"),
        (["--stage", "partition", "--ranks", "2", "4"], "--stage is about one number of ranks, and --ranks gives 2"),
        (["--html", "o.html", "--ranks", "2", "4"], "--html is about one number of ranks"),
    ],
)
def test_refused_before_the_work(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "factories:never", "--ranks", "2", *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not Path("o.html").exists()


@pytest.mark.parametrize(
    ("factory", "name"), [("on_meta", "argument 0 [2, 5, 8]"), ("half_meta", "head.weight [5, 8]")]
)
def test_meta_tensors_are_refused_before_tracing(
    factory: str, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxsp.offline.verify.partition_offline", None)
    assert main(["verify", f"factories:{factory}"]) == 1
    assert f"verify compares values, and {name} is on the meta device" in capsys.readouterr().err


def test_a_causal_model_with_its_cache_on_meta(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "factories:causal", "--ranks", "2"]) == 0
    out = capsys.readouterr().out
    assert "output cache.layers[0].keys" in out
    assert "output logits, of lm_head" in out


def test_version_and_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    for option, wanted in (("--version", f"fxsp {fxsp.__version__}, torch {torch.__version__}"), ("--help", "status:")):
        with pytest.raises(SystemExit) as end:
            main([option])
        assert end.value.code == 0
        assert wanted in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(["explain"])
    assert end.value.code == 2
