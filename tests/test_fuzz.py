"""Random programs, plans, lengths and rank counts: the partitioned program computes what the program computes.

``FXSP_FUZZ_PROGRAMS`` is how many are drawn (``make fuzz N=20000``); a count that is not the default draws other
programs each time.  A failure is shrunk, and printed as a script.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest
import torch
from fuzzing import check, check_gradients
from hypothesis import HealthCheck, Phase, given, note, settings
from programs import INSTRUCTIONS, Case, Input, cases, script

DEFAULT = 320
PROGRAMS = int(os.environ.get("FXSP_FUZZ_PROGRAMS", DEFAULT))
#: The programs of the training variant: none unless asked for.
TRAINING = int(os.environ.get("FXSP_FUZZ_TRAINING", "0"))


def _settings(count: int) -> settings:
    """The same programs on every run, unless a count was asked for."""
    fixed = "FXSP_FUZZ_PROGRAMS" not in os.environ
    return settings(
        max_examples=count,
        derandomize=fixed,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_partitioned_programs_compute_the_same() -> None:
    seen: Counter[str] = Counter()

    @given(cases())
    @_settings(PROGRAMS)
    def draw(case: Case) -> None:
        note(script(case))
        report = check(case).report
        seen.update(case.instructions)
        seen.update(f"attention {record.method}" for record in report.attentions)
        seen["sharded"] += bool(report.collectives)

    draw()
    if PROGRAMS >= DEFAULT:
        # The generator covers what it is meant to: a condition that never holds would hide an instruction.
        missing = (INSTRUCTIONS.keys() | {"attention ulysses", "attention gather_kv"}) - seen.keys()
        assert not missing
        assert seen["sharded"] >= PROGRAMS // 2


@pytest.mark.skipif(TRAINING == 0, reason="FXSP_FUZZ_TRAINING is not set")
@given(cases())
@_settings(max(TRAINING, 1))
def test_partitioned_programs_have_the_same_gradients(case: Case) -> None:
    note(script(case))
    check_gradients(case)


def test_a_wrong_partition_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: a pass that forgets to mask pads, and one that splits a sum without reducing it."""
    from fxsp.passes.builder import Builder

    lines = ('x1 = annotate(x1, "shard", 1, -1, "x1")', "y2 = F.gelu(x1 @ w2).sum(1)", "return y2")
    case = Case(lines, (Input("x1", (1, 5, 2)), Input("w2", (2, 2))), size=2)
    check(case)
    with monkeypatch.context() as patch:
        patch.setattr(Builder, "mask_pads", lambda self, x, dim, sequence: x)
        with pytest.raises(AssertionError, match="error"):
            check(case)
    with monkeypatch.context() as patch:
        patch.setattr(Builder, "all_reduce", lambda self, x: x)
        with pytest.raises(AssertionError, match="not that of rank 0"):
            check(case)
