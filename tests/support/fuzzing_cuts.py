"""Random programs with graph breaks and eager code in between, on real ranks: split values go from graph to graph.

The inputs that a program of :func:`fuzzing_breaks.broken_cases` splits as it begins are its plan; what it would split
again after a break is left alone.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, seed, settings
from torch import nn

import fxsp
from fuzzing_breaks import _run, broken_cases
from fuzzing_cases import Case
from fuzzing_values import difference

__all__ = ["drawn", "run_cuts"]

_SPLIT = re.compile(r'^ *(\w+) = annotate\(\1, "(shard|text)", 1, (-?\d+), "\1"\)$', re.MULTILINE)


def drawn(count: int, number: int) -> list[Case]:
    """``count`` programs, always the same for one ``number``; those that fail themselves are left out."""
    found: list[Case] = []

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),
    )
    @given(broken_cases())
    def one(case: Case) -> None:
        try:
            _run(case, case.function())
        except (RuntimeError, IndexError, ValueError):
            return
        found.append(case)

    one()
    return found


def _module(case: Case) -> nn.Module:
    """The program as the forward of a module, whose arguments a plan can name."""
    namespace = case.function(lambda x, *_: x).__globals__
    source = case.source.replace("def program(", "def forward(self, ", 1)
    exec(compile(source, "<program>", "exec"), namespace)
    return type("Program", (nn.Module,), {"forward": namespace["forward"]})()  # type: ignore[no-any-return]


def _plan(case: Case) -> dict[str, Any]:
    return {
        name: fxsp.SequenceParallelInput(1)
        if int(text) < 0
        else fxsp.SequenceParallelPartialInput(split_dim=1, text_len_source=int(text))
        for name, _, text in _SPLIT.findall(case.source)
    }


def run_cuts(rank: int, size: int, cases: Sequence[Case]) -> tuple[list[str], Counter[str]]:
    """What differs from one process, with the program; and how often it was split, and what stayed split at a break."""
    problems: list[str] = []
    seen: Counter[str] = Counter()
    for case in cases:
        wanted = _run(case, case.function())
        torch.compiler.reset()
        plan = _plan(case)
        before = len(fxsp.reports())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options = {"plan": {"": plan}, "inner": "eager"}
            model = _module(case)
            try:
                found = _run(case, torch.compile(model, backend="sp", options=options, dynamic=False))
            except fxsp.UnsupportedError:
                seen["refused"] += 1
                continue
            except Exception as error:
                raise AssertionError(f"{type(error).__name__}: {error}\n{case!r}") from error
        reports = fxsp.reports()[before:]
        seen["programs"] += 1
        seen["graphs"] += len(reports)
        seen["comes in split"] += sum("comes in split" in note for report in reports for note in report.notes)
        seen["eager calls on shards"] += sum(row.eager for row in fxsp.report_of(model).graphs)
        differ = [f"{name}: {problem}" for name, want in wanted.items() if (problem := difference(found[name], want))]
        if differ:
            problems.append("\n".join([*differ, repr(case)]))
    dist.barrier()
    return problems, seen
