"""Random programs that graph breaks cut, on real ranks: values and gradients are those of one process.

``FXSP_FUZZ_CUTS`` is how many are drawn for each number of ranks, ``FXSP_FUZZ_SEED`` which.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from distributed import Pool
from fuzzing_cuts import drawn, run_cuts

Ranks = Callable[[int], Pool]
PROGRAMS = int(os.environ.get("FXSP_FUZZ_CUTS", "12"))
SEED = int(os.environ.get("FXSP_FUZZ_SEED", "0"))
#: Programs that ranks are given at once.
CHUNK = 12


@pytest.mark.parametrize("size", [2, 3])
def test_cut_programs_compute_the_same(ranks: Ranks, size: int) -> None:
    cases = drawn(PROGRAMS, 10 * SEED + size)
    total = dict.fromkeys(("programs", "graphs", "comes in split", "eager calls on shards", "refused"), 0)
    for begin in range(0, len(cases), CHUNK):
        found = ranks(size).run(run_cuts, cases[begin : begin + CHUNK])
        for problems, _ in found:
            assert not problems, "\n\n".join(problems)
        total = {name: total[name] + found[0][1][name] for name in total}
    print(total)
    assert total["programs"] >= PROGRAMS / 2
    assert total["graphs"] > total["programs"]
    assert total["comes in split"] >= PROGRAMS / 4
    assert total["eager calls on shards"] >= PROGRAMS / 20
