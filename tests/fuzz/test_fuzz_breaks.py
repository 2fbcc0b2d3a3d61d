"""Random programs with breaks and deferred gradients: outputs and gradients are those of the program.

``FXSP_FUZZ_BREAKS`` is how many are drawn.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, reject, seed, settings

from fuzzing import Case, Input
from fuzzing_breaks import broken_cases, check_broken

PROGRAMS = int(os.environ.get("FXSP_FUZZ_BREAKS", "15"))

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


def test_broken_programs_compute_the_same() -> None:
    torch.set_num_threads(1)
    seen: Counter[str] = Counter()

    @seed(0)
    @settings(
        max_examples=PROGRAMS,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(broken_cases())
    def one(case: Case) -> None:
        try:
            case.function()(*case.values())
        except (RuntimeError, IndexError, ValueError):
            reject()
        check_broken(case, seen)

    one()
    print(dict(seen))
    assert seen["split"] >= PROGRAMS / 2
    assert seen["whole, with parameters"] >= PROGRAMS / 5


CASE = Case(
    """def program(x1, w2, w3):
    x1 = annotate(x1, "shard", 1, -1, "x1")
    y4 = F.linear(x1, w2)
    y5 = eager(F.linear, y4, w2)
    y6 = F.linear(y5, w3).sum(1)
    return y6 @ w2
""",
    (Input("x1", (2, "S0", 4)), Input("w2", (4, 4)), Input("w3", (4, 4))),
    {"S0": 5},
    size=3,
    training=True,
)


def test_a_weight_of_all_kinds() -> None:
    seen: Counter[str] = Counter()
    check_broken(CASE, seen)
    assert seen["split"] == seen["whole, with parameters"] == 1


def test_a_wrong_convention_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuzzing_breaks.scale_summands", lambda gm, size: None)
    with pytest.raises(AssertionError, match=r"the gradient of w2: error"):
        check_broken(CASE, Counter())
