"""The survey of models without a plan: what it measures, and that its table is of all models that it knows."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def _survey() -> Any:
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    import survey

    return survey


def test_a_row_and_the_table(tmp_path: Path) -> None:
    survey = _survey()
    row = survey.survey("clip_text", survey.all_models()["clip_text"], 2, (2, 3))
    assert float(row.error) < 1e-6
    assert (row.model, row.graphs, row.gathers, row.own, row.forbids) == ("CLIPTextModel", "1 (1)", "0", "", "")
    assert 0.5 <= row.part <= 0.55
    # Of two attentions with 37 tokens of 64 features by heads: q, k, v and o, half of a rank's 19 rows; and the output.
    assert int(row.sent) == 2 * 4 * 19 * 64 * 4 // 2 + 19 * 64 * 4
    survey.write(tmp_path / "table.md", [row], 2)
    assert list(survey.read(tmp_path / "table.md")) == [row]
    assert (tmp_path / "table.md").read_text().endswith(f"\n{survey.totals([row], 2)}.\n")


def test_what_fails_and_what_runs_whole_have_rows() -> None:
    survey = _survey()

    def broken() -> Any:
        raise KeyError("no such layer")

    class Mean(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean(1)

    failed = survey.survey("broken", broken, 2)
    assert (failed.part, failed.forbids) == (None, "not built: KeyError: 'no such layer'")
    whole = survey.survey("mean", lambda: (Mean(), {"x": torch.randn(1, 7, 4)}), 2)
    assert (whole.graphs, whole.part) == ("1 (0)", 1.0)
    assert "1 run whole, 1 are not compiled" in survey.totals([failed, whole], 2)


def test_the_table_of_the_repository_has_all_models() -> None:
    survey = _survey()
    rows = list(survey.read(ROOT / "docs" / "survey.md"))
    assert [row.name for row in rows] == list(survey.all_models())
    assert all(float(row.error) <= 5e-7 for row in rows)
    assert (ROOT / "docs" / "survey.md").read_text().endswith(f"\n{survey.totals(rows, 2)}.\n")


@pytest.mark.slow
def test_all_transformers_of_diffusers_are_in_it() -> None:
    import importlib
    import pkgutil

    import diffusers.models.transformers as package
    from diffusers import ModelMixin

    _survey().all_models()
    import survey_diffusers
    import survey_images
    import survey_video

    known = {row[0] for module in (survey_diffusers, survey_images, survey_video) for row in module.ROWS.values()}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for name, kind in inspect.getmembers(module, inspect.isclass):
            if kind.__module__ == module.__name__ and issubclass(kind, ModelMixin) and not name.startswith("Legacy"):
                assert name in known, name


def test_what_is_wrong_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import fxsp

    survey = _survey()
    monkeypatch.setattr(fxsp, "verify", lambda *_, **__: _evidence(0.5))
    assert survey.survey("clip_text", survey.all_models()["clip_text"], 2, (2,)).error == "WRONG 5e-01"


def _evidence(error: float) -> Any:
    from fxsp.offline.verify import Evidence, GraphEvidence

    return Evidence([GraphEvidence(2, [error], names=["output 0"], tolerance=1e-5)])
