"""What a person is told while a model is compiled: by whom, once, where, and how to have silence."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import fxsp
from distributed import Pool
from fxsp import telling

PLAN = {"": {"x": fxsp.SequenceParallelInput(split_dim=1)}}


class Told(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x) + self.layers(x).cumsum(1)


class _Now:
    """A timer for which every step takes long."""

    daemon = False

    def __init__(self, seconds: float, call: Callable[..., None], args: tuple[Any, ...]) -> None:
        self.start = lambda: call(*args)

    def cancel(self) -> None:
        pass


@contextmanager
def messages() -> Iterator[list[str]]:
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    level = telling.log.level
    telling.log.addHandler(handler)
    telling.log.setLevel(logging.INFO)
    try:
        yield found
    finally:
        telling.log.removeHandler(handler)
        telling.log.setLevel(level)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="sp", options={"plan": PLAN, "inner": "aot_eager"})


def _hear(rank: int, size: int) -> tuple[list[str], list[tuple[str, int]], int]:
    """The messages of two calls; where warnings are from, of those that a filter asks for, and how many there are
    without filters.
    """
    x = torch.randn(1, 9, 8)
    timer, threading.Timer = threading.Timer, _Now  # type: ignore[misc, assignment]
    try:
        with messages() as told, warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            fast = compiled(Told())
            fast(x)
            fast(x)
    finally:
        threading.Timer = timer  # type: ignore[misc]
    places = [(w.filename, w.lineno) for w in caught if issubclass(w.category, fxsp.FxspWarning)]
    torch.compiler.reset()
    with warnings.catch_warnings(record=True) as shown, torch.no_grad():
        warnings.resetwarnings()
        compiled(Told())(x)
    return told, places, sum(issubclass(w.category, fxsp.FxspWarning) for w in shown)


def test_rank_0_tells_each_graph_once(ranks: Callable[[int], Pool]) -> None:
    (told, places, shown), (silent, others, hidden) = ranks(2).run(_hear)
    assert told[:3] == ["tracing Told ...", "partitioning Told ...", "compiling Told by aot_eager ..."]
    (line,) = told[3:]
    assert line.startswith("Told on 2 ranks: split by <root>[x], ")
    assert "; 2 collectives, " in line
    assert "sent per rank and forward pass; compiled in " in line
    assert silent == []
    # Filters hold on all ranks; without any, the first one shows the warning.
    (place,) = places
    assert others == places
    assert place[0] == __file__
    assert (shown, hidden) == (1, 0)


def test_whole_graphs_are_told() -> None:
    report = fxsp.Report(root="Told", unsharded="there is nothing to split\n  because")
    text = telling.summary(report, fxsp.types.Ranks(0, 4, ""))
    assert text == "Told on 4 ranks: runs whole on every rank (there is nothing to split)"


def test_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    with messages():
        assert telling.heard()
        monkeypatch.setenv("RANK", "1")
        assert not telling.heard()
        monkeypatch.setenv("RANK", "0")
        telling.log.setLevel(logging.WARNING)
        assert not telling.heard()
        telling.log.setLevel(logging.INFO)
        monkeypatch.setenv("FXSP_QUIET", "1")
        assert not telling.heard()


def test_standard_error_without_handlers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(telling.log, "propagate", False)  # as if no application had set up logging
    assert telling.heard()
    report, model = fxsp.Report(root="Told", unsharded="one token"), nn.Linear(1, 1)
    for ranks in (fxsp.types.Ranks(0, 2, ""), fxsp.types.Ranks(0, 2, ""), fxsp.types.Ranks(0, 1, "")):
        telling.tell_summary(report, ranks, model, {"tracing": 1.25, "partitioning": 0.01})
    said = "fxsp: Told on 2 ranks: runs whole on every rank (one token); compiled in 1.3 s (tracing 1.2)\n"
    assert capsys.readouterr().err == said
    telling.log.setLevel(logging.WARNING)
    try:
        assert not telling.heard()
    finally:
        telling.log.setLevel(logging.NOTSET)


def test_a_step_is_told_after_a_while_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling, "PATIENCE", 0.0)
    said = threading.Event()
    with messages() as told:
        handler = telling.log.handlers[-1]
        monkeypatch.setattr(handler, "emit", lambda r: (told.append(r.getMessage()), said.set()))
        steps = telling.begin("tracing", "tracing Told")
        assert said.wait(60)
        monkeypatch.setattr(telling, "PATIENCE", 600.0)
        telling.begin("partitioning", "partitioning Told")
        telling.end()
    assert told == ["tracing Told ..."]
    assert set(steps.seconds) == {"tracing", "partitioning"}


def test_a_frame_that_becomes_no_graph_leaves_no_step() -> None:

    model = Told()
    model.layers.register_forward_hook(lambda *_: 1 / 0)  # type: ignore[arg-type, return-value]
    with pytest.raises(Exception, match="zero"), torch.no_grad():
        compiled(model)(torch.randn(1, 9, 8))
    assert telling._thread.steps is None
