"""Golden reports: what ``fxsp.explain`` says of whole models, word by word, in ``golden`` beside this file.

Whoever changes the text on purpose writes the files again and reads the difference:

    FXSP_WRITE_REPORTS=1 pytest tests/offline/test_golden_reports.py && git diff tests/offline/golden

Line numbers belong to the libraries that the models come from, and are left out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fxsp
import models
import small

GOLDEN = Path(__file__).parent / "golden"
TOKENS = fxsp.SequenceParallelInput(split_dim=1)


def _explained(built: Any, size: int, *, grad: bool = False, **arguments: Any) -> fxsp.Explanation:
    model, inputs = built
    with torch.set_grad_enabled(grad):
        return fxsp.explain(model, world_size=size, **arguments, **inputs)


#: File -> the explanation that it holds.
REPORTS: dict[str, Callable[[], fxsp.Explanation]] = {
    "flux_8_ranks": lambda: _explained(models.flux(image=25), 8),
    "llama_2_ranks_training": lambda: _explained(
        models.llama(tokens=16, layers=2), 2, grad=True, plan={"": {"input_ids": TOKENS}}
    ),
    "wan_3_ranks": lambda: _explained(models.wan(), 3),
    "small_hybrid_4_ranks": lambda: _explained(
        (small.Model(mix=True), {"x": small.inputs()}),
        4,
        plan={**small.SPLIT, "blocks.1": {"hidden": fxsp.SequenceParallelInput(1, expected_dims=4)}},
        options={"ulysses_degree": 2, "ring_degree": 2},
    ),
}


def without_line_numbers(text: str) -> str:
    return re.sub(r"(\w+\.py):\d+", r"\1:_", text)


@pytest.mark.parametrize("name", REPORTS)
def test_report(name: str) -> None:
    explanation = REPORTS[name]()
    attention = explanation.attentions[0].module
    text = f"{explanation}\n\n== why {attention}?\n{explanation.explain(attention)}\n"
    text = without_line_numbers(text)
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("FXSP_WRITE_REPORTS"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text(), f"{path.name} says otherwise: FXSP_WRITE_REPORTS=1 writes it anew"


def test_no_report_names_a_place_on_this_machine_and_each_line_a_place_in_the_model() -> None:
    for name in REPORTS:
        text = (GOLDEN / f"{name}.txt").read_text()
        assert not re.search(r"/\w+/|\.py:\d|0x", text), name
        lines = text.splitlines()
        attention = [line for line in lines if re.match(r"  \d+ x (ulysses|ring|hybrid|local|gather)", line)]
        formulas = [line for line in lines if line.startswith("         = ")]
        assert attention
        assert formulas
        assert all(re.search(r" in \S+ \(\w+\.py:_\)", line) for line in (*attention, *formulas)), name
