"""Models beyond those of :mod:`test_models`, each with a small plan: values and gradients on two and three ranks.

One compile serves both: a training step whose loss weighs every element of the output.  Most are simulated, as
:mod:`test_training` has their like on processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from distributed import Pool
from training import StepCase, run_step, simulate_step
from zoo import PLANS

Ranks = Callable[[int], Pool]

#: Attentions that are split: name -> (number of ranks, arguments, methods, why something is gathered).
CASES: dict[str, list[tuple[int, dict[str, Any], list[str]]]] = {
    "sd3": [(2, {}, ["ulysses"] * 3), (3, {"layers": 1}, ["gather_kv"] * 2)],
    "pixart": [(3, {}, ["gather_kv", "local"]), (2, {"size": 10}, ["ulysses", "local"])],
    "cogvideox": [(2, {}, ["ulysses"]), (3, {}, ["gather_kv"])],
    "hunyuan_video": [(3, {}, ["gather_kv"] * 2), (2, {"single_layers": 0}, ["ulysses"])],
    "ltx": [(2, {}, ["ulysses", "local"]), (3, {"frames": 1}, ["gather_kv", "local"])],
    "gpt2": [(2, {"layers": 1}, ["ulysses"]), (3, {"layers": 1}, ["gather_kv"])],
    "gemma": [(2, {}, ["gather_kv"]), (3, {"tokens": 2}, ["gather_kv"])],
    "mixtral": [(3, {}, ["gather_kv"]), (2, {}, ["ulysses"])],
    "vit": [(2, {}, ["ulysses"]), (3, {}, ["gather_kv"])],
    "bert": [(2, {"layers": 1}, ["ulysses"]), (3, {"layers": 1}, ["gather_kv"])],
}
#: What needs all tokens, by model: the experts of Mixtral sort the tokens by expert.
GATHERS = {"mixtral": ("aten.sort.default in model.layers.0.mlp.experts", "aten.index.Tensor in model.layers.0.mlp")}

#: What :mod:`test_training` has not on processes: learned positions, and tokens sorted by expert.
PROCESSES = ("gpt2", "mixtral")

ROWS = [(name, *row) for name, rows in CASES.items() for row in rows]


@pytest.mark.parametrize(("name", "size", "arguments", "methods"), ROWS, ids=[f"{row[1]}-{row[0]}" for row in ROWS])
def test_model(ranks: Ranks, name: str, size: int, arguments: dict[str, Any], methods: list[str]) -> None:
    case = StepCase(name, {"batch": 2, **arguments}, {"plan": PLANS[name]})
    real = size == 2 and name in PROCESSES
    for step in ranks(2).run(run_step, case, timeout=300.0) if real else [simulate_step(size, case)]:
        assert step.loss_error <= 1e-5
        assert step.gradient_error <= 1e-5, step.worst
        assert not step.mismatched
        assert step.compiles == 1
        assert step.attentions == methods
        assert not step.unsharded
        assert step.forward["all_to_all"] == step.backward["all_to_all"] == 2 * methods.count("ulysses")
        expected = GATHERS.get(name, ())
        assert all(text.startswith(expected) for text in step.implicit), step.implicit
        assert bool(step.implicit) == bool(expected)
        assert len(step.warnings) == bool(expected)
