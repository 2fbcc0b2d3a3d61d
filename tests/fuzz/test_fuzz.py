"""Random programs, plans, lengths and rank counts: the partitioned program computes what the program computes.

One in ten is split without its plan, by what is found; ``FXSP_FUZZ_PLAN=infer``: all of them.

``FXSP_FUZZ_PROGRAMS`` is how many are drawn (``make fuzz N=20000``), ``FXSP_FUZZ_SEED`` which (a number; without it,
and without a count, the same programs are run each time).  Equally many start with each instruction.  A failure is
shrunk, and printed as a script.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, reject, seed, settings

from fuzzing import Case, Input, NotAProgram, Refused, Result, check, script
from fxsp.passes.graph import facts
from fxsp.passes.rules.table import RULES
from minimizing import minimize
from programs import cases, every_instruction

DEFAULT = 300
PROGRAMS = int(os.environ.get("FXSP_FUZZ_PROGRAMS", DEFAULT))
PLAN = os.environ.get("FXSP_FUZZ_PLAN", "")
SEED = int(os.environ.get("FXSP_FUZZ_SEED", random.randrange(1 << 32) if "FXSP_FUZZ_PROGRAMS" in os.environ else 0))

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*reduce argument of torch.scatter:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


def _settings(count: int) -> settings:
    return settings(
        max_examples=count,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def count(seen: Counter[str], case: Case, result: Result) -> None:
    seen["programs"] += 1
    seen.update(case.instructions)
    kinds = {
        "training": case.training,
        "dynamic": case.dynamic,
        "without a plan": case.infer,
        "through Dynamo": case.dynamo,
        "two sequences": len(case.lengths) == 2,
        "three sequences": len(case.lengths) == 3,
        "several lengths": result.runs > 1,
        "rounding": result.rounding > 0,
        "split": any(program.report.collectives for program in result.programs),
        "whole text beside split tokens": "whole" in "".join(
            str(facts(node).type) for program in result.programs for node in program.graph.nodes
        ),
    }  # fmt: skip
    seen.update(name for name, holds in kinds.items() if holds)
    for program in result.programs:
        seen.update(f"attention {record.method}" for record in program.report.attentions)


def smallest(case: Case, error: Exception) -> Case:
    """The smallest case found that fails with the same type of error."""

    def fails(smaller: Case) -> bool:
        try:
            check(smaller)
        except type(error):
            return True
        except Exception:  # another error: another failure  # noqa: BLE001
            return False
        return False

    return minimize(case, fails)


@pytest.mark.slow
def test_partitioned_programs_compute_the_same() -> None:
    seen: Counter[str] = Counter()

    failed: list[tuple[Case, Exception]] = []
    names = every_instruction()

    def one(case: Case) -> None:
        case = replace(case, infer=PLAN == "infer" or case.seed == 5)
        try:
            result = check(case)
        except NotAProgram:
            reject()
        except Refused:
            seen["refused"] += 1
            return
        except Exception as error:
            failed.append((case, error))
            raise
        if not failed:
            count(seen, case, result)

    try:
        for i, name in enumerate(names):
            seed(SEED * len(names) + i)(_settings(-(-PROGRAMS // len(names)))(given(cases(name))(one)))()
    finally:
        print(f"programs that agree: {seen['programs']} of seed {SEED}", dict(sorted(seen.items())))
        if failed:
            print(f"# a program that fails:\n{script(smallest(*failed[-1]))}")
    if PROGRAMS >= DEFAULT and not PLAN:
        # The generator covers what it is meant to: a condition that never holds would hide an instruction.
        methods = {f"attention {method}" for method in ("ulysses", "gather_kv", "hybrid", "ring", "local")}
        assert not {*names, "three sequences", *methods} - seen.keys()
        for kind, least in {
            "split": 0.5,
            "training": 0.25,  # about 0.3 are drawn
            "several lengths": 0.1,
            "two sequences": 0.2,
            "whole text beside split tokens": 0.05,
            "through Dynamo": 0.03,
        }.items():
            assert seen[kind] >= least * PROGRAMS, kind
        assert seen["rounding"] <= 0.02 * PROGRAMS
        assert seen["refused"] <= 0.04 * PROGRAMS


LINES = """
def program(x1, w2):
    x1 = annotate(x1, "shard", 1, -1, "x1")
    y2 = F.gelu(x1 @ w2).sum(1)
    return y2
"""


def test_a_wrong_partition_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: a pass that forgets to mask pads, and one that splits a sum without reducing it."""
    from fxsp.passes.builder import Builder

    case = Case(LINES, (Input("x1", (1, "S0", 2)), Input("w2", (2, 2))), {"S0": 5}, size=2)
    check(case)
    with monkeypatch.context() as patch:
        patch.setattr(Builder, "mask_pads", lambda self, x, dim, sequence: x)
        with pytest.raises(AssertionError, match="error"):
            check(case)
    with monkeypatch.context() as patch:
        patch.setattr(Builder, "all_reduce", lambda self, x: x)
        with pytest.raises(AssertionError, match="not that of rank 0"):
            check(case)


def test_a_failing_program_becomes_minimal_and_a_script_that_fails(tmp_path: Path) -> None:
    """With a wrong rule (a softmax over tokens that runs on shards): lines that do not matter go; a fresh interpreter
    with the same mistake fails by the printed script, one without it does not.
    """
    wrong = """
import torch
from fxsp.passes import pipeline
from fxsp.passes.rules.rule import OpRule
from fxsp.passes.rules.table import RULES
right = RULES[torch.ops.aten.softmax.int]
def rule(call):
    found = right(call)
    return OpRule(found.operands, tuple(found.operands[:1]), found.sizes)
RULES[torch.ops.aten.softmax.int] = rule
"""
    case = Case(
        """def program(x1, w2, w3):
    x1 = annotate(x1, "shard", 1, -1, "x1")
    y4 = F.linear(x1, w2)
    y5 = y4 + w3
    y6 = torch.softmax(y5, 1)
    y7 = F.gelu(y6)
    return y7, y4
""",
        (Input("x1", (2, "S0", 4)), Input("w2", (4, 4)), Input("w3", (4,))),
        {"S0": 7},
        size=4,
    )
    right = dict(RULES)
    try:
        exec(wrong, {})
        with pytest.raises(AssertionError, match="output 0") as caught:
            check(case)
        small = smallest(case, caught.value)
    finally:
        RULES.update(right)
    lines = small.source.strip().split("\n")
    assert len(lines) <= 5
    assert any("softmax" in line for line in lines)
    assert (small.size, small.lengths["S0"], len(small.inputs)) == (2, 2, 1)
    for before, code in (("", 0), (wrong, 1)):
        file = tmp_path / f"repro{code}.py"
        file.write_text(before + script(small))
        done = subprocess.run([sys.executable, file], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == code, done.stderr
        assert ("AssertionError: output 0" in done.stderr) == bool(code)


#: Programs that computed something else once, and must not again.
FOUND = {
    "a function of functorch after a mask that is dropped": Case(
        """def program(x1, m2):
    x1 = annotate(x1, "shard", 1, -1, "x1")
    t3 = x1.unflatten(2, (4, -1)).transpose(1, 2)
    t4 = F.scaled_dot_product_attention(t3, t3, t3, attn_mask=m2).transpose(1, 2).flatten(2)
    return torch.func.vmap(lambda r: r.softmax(0) * r.sum())(t4)
""",
        (Input("x1", (1, "S0", 8)), Input("m2", (1, 1, 1, "S0"), "mask")),
        {"S0": 5},
        size=2,
        dynamo=True,
    ),
    "what is computed whole in the end, from an input that is written to": Case(
        """def program(x1):
    x1 = annotate(x1, "shard", 1, -1, "x1")
    y2 = F.gelu(x1)
    x1.mul_(0.5)
    return x1, y2
""",
        (Input("x1", (1, "S0", 8)),),
        {"S0": 3},
        size=2,
    ),
    "no tokens behind the text, of a graph for any number of them": Case(
        """def program(x1, w2):
    x1 = annotate(x1, "shard", 1, 2, "x1")
    t3 = F.linear(x1, w2).unflatten(2, (4, -1)).transpose(1, 2)
    t4 = F.scaled_dot_product_attention(t3, t3, t3, is_causal=True)
    return x1 + t4.transpose(1, 2).flatten(2)
""",
        (Input("x1", (1, "S0", 8)), Input("w2", (8, 8))),
        {"S0": 3},
        size=8,
        training=True,
        dynamic=True,
    ),
    "tokens cut into equal parts and put together are as many as before": Case(
        """def program(x1):
    x1 = annotate(x1, "shard", 1, 1, "x1")
    t2 = x1.unflatten(1, (4, -1))
    y3 = (t2 - t2.mean(1, keepdim=True)).flatten(1, 2)
    return torch.maximum(y3, x1)
""",
        (Input("x1", (1, "S0", 8)),),
        {"S0": 8},
        size=2,
        dynamic=True,
        dynamo=True,
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_found_once(name: str) -> None:
    check(FOUND[name])


def test_a_write_through_detach_is_not_split() -> None:
    """Values see what is written and gradients do not: no program without writes says that, so it stays whole."""
    case = Case(
        """def program(x1, w2):
    x1 = annotate(x1, "shard", 1, -1, "x1")
    y3 = F.gelu(F.linear(x1, w2)) * 1
    t4 = y3.detach()
    t4.mul_(0.5)
    return y3
""",
        (Input("x1", (2, "S0", 8)), Input("w2", (8, 8))),
        {"S0": 1},
        size=2,
        training=True,
    )
    for dynamo in (False, True):
        with pytest.raises(Refused, match=r"mul_\.Tensor .*writes through detach\(\) while gradients are recorded"):
            check(replace(case, dynamo=dynamo))
        assert check(replace(case, training=False, dynamo=dynamo)).programs
