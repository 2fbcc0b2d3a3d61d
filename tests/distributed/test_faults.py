"""One rank goes wrong, on real processes: every rank gets the right result, or an error in the time that is stated.

``docs/faults.md`` shows the same faults as a table; a test compares them.  All scenarios run side by side, because
most of them wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import fault_caches as caches
import fault_inputs as given
import fault_scenarios as scenarios
from fault_models import Result
from faults import Rank, Seen, run_faulty, server

PAGE = Path(__file__).resolve().parents[2] / "docs" / "faults.md"
#: Seconds that a busy machine may add to those that are stated, and to those that compile something as well.
SLACK, COMPILING = 15.0, 75.0


@dataclass(frozen=True)
class Expected:
    """What one rank must see: its outcome, the type of its error, and words of the message."""

    outcome: str = "right"
    kind: str = ""
    words: tuple[str, ...] = ()

    def check(self, seen: Seen, what: str) -> None:
        about = f"{what}: {seen}\n{seen.printed}"
        assert seen.outcome == self.outcome, about
        assert not self.kind or seen.kind == self.kind, about
        for word in self.words:
            assert word in seen.text, f"{word!r} is not said: {about}"


RIGHT = Expected()


def error(kind: str, *words: str) -> Expected:
    return Expected("error", kind, words)


@dataclass(frozen=True)
class Fault:
    """A row of the table, and how it is tested."""

    #: What happens to one rank; what every rank sees.
    what: str
    sees: str
    #: Within so many seconds, and what they are counted from or made of.
    seconds: float
    within: str
    #: Of rank 0, and of rank 1; the other ranks see what rank 0 sees.
    expected: tuple[Expected, Expected]
    run: Callable[[Rank], Result]
    size: int = 2
    #: That of the process group.
    timeout: float = 60.0
    environment: dict[str, str] = field(default_factory=dict)
    #: Whether the time includes that of a compilation.
    compiles: bool = False
    #: Words that a warning of every rank has.
    warning: str = ""


def _unlike(what: str, *words: str, run: Callable[[Rank], Result], size: int = 2) -> Fault:
    both = error("InputMismatchError", *words, "rank 1")
    sees = "an error that shows both sides"
    return Fault(f"is given {what}", sees, 0, AT_ONCE, (both, both), run, size, compiles=True)


OWN = error("ValueError", "out of something", "fxsp: this is rank 1", "within 10 s")
OTHERS = error("RanksApartError", "rank 1 failed in call", "out of something", "within 10 s")
UNWRITABLE = error("RanksApartError", "rank 1 failed", "InductorError"), error("InductorError")
AT_ONCE = "at once"
FAULTS = {
    "nothing": Fault(
        "nothing", "the right result", 0, AT_ONCE, (RIGHT, RIGHT), scenarios.nothing, size=3, compiles=True
    ),
    # --- it raises
    "raises_before": Fault(
        "raises in a graph, before its first collective, and lives on",
        "rank 1 its own error, with a note; the others one that quotes it",
        10,
        "10 s, in which the others may fail alike",
        (OTHERS, OWN),
        scenarios.raises_before,
    ),
    "raises_between": Fault(
        "the same between two collectives", "the same", 10, "10 s", (OTHERS, OWN), scenarios.raises_between, size=3
    ),
    "raises_in_a_collective": Fault(
        "the same while it waits in one", "the same", 10, "10 s", (OTHERS, OWN), scenarios.raises_in_a_collective
    ),
    "raises_after": Fault(
        "the same after the last one",
        "the same; the others at their next call",
        10,
        "10 s",
        (OTHERS, OWN),
        scenarios.raises_after,
    ),
    "raises_in_backward": Fault(
        "the same in the backward pass", "the same", 10, "10 s", (OTHERS, OWN), scenarios.raises_in_backward
    ),
    "raises_and_tries_again": Fault(
        "raises, and its caller catches that and calls again",
        "an error, on rank 1 at that call",
        10,
        "10 s",
        (OTHERS, OTHERS),
        scenarios.raises_and_tries_again,
    ),
    "raises_everywhere": Fault(
        "all ranks raise at the same place, and go on",
        "its own error; then right results",
        0,
        AT_ONCE,
        (RIGHT, RIGHT),
        scenarios.raises_everywhere,
    ),
    # --- it goes, or stands still
    "is_killed": Fault(
        "is killed between two calls",
        "an error that names it",
        1,
        "1 s",
        (error("RanksApartError", "rank 1", "nothing is heard of"), Expected("exit", words=("-9",))),
        scenarios.is_killed,
        size=3,
    ),
    "is_killed_before_it_compiles": Fault(
        "is killed before it compiles",
        "an error that names it",
        10,
        "the timeout of the process group (here 10 s)",
        (error("RanksApartError", "rank 1 did not come in 10 s"), Expected("exit", words=("-9",))),
        scenarios.is_killed_before_it_compiles,
        compiles=True,
        timeout=10,
    ),
    "ends_early": Fault(
        "ends between two calls",
        "an error that names it",
        1,
        "1 s",
        (error("RanksApartError", "rank 1"), Expected("exit", words=("0",))),
        scenarios.ends_early,
    ),
    "ends_before_it_compiles": Fault(
        "ends before the others compile",
        "an error that says so",
        2,
        "2 s",
        (error("RanksApartError", "rank 1 ended"), Expected("exit", words=("0",))),
        scenarios.ends_before_it_compiles,
        compiles=True,
    ),
    "is_stopped": Fault(
        "is stopped (SIGSTOP), and continued after 3 s",
        "the right result",
        3,
        "that time",
        (RIGHT, RIGHT),
        scenarios.is_stopped,
    ),
    "is_stopped_for_long": Fault(
        "is stopped for longer than the timeout of the process group",
        "an error; rank 1 when it is continued",
        16,
        "the timeout (here 10 s), and that time",
        (error("RanksApartError", "10000ms", "nothing is heard of rank 1"), error("RanksApartError", "rank 0")),
        scenarios.is_stopped_for_long,
        timeout=10,
    ),
    "compiles_late": Fault(
        "compiles 20 s later than the others",
        "the right result",
        20,
        "that time",
        (RIGHT, RIGHT),
        scenarios.compiles_late,
        compiles=True,
    ),
    # --- it compiles anew, or no more
    "compiles_alone": Fault(
        "compiles anew, because a guard fails on it alone",
        "an error that names it and the guard",
        10,
        "10 s",
        (error("RanksApartError", "rank 1 compiles", "scale"), error("RanksApartError", "rank 1 compiles", "scale")),
        given.compiles_alone,
        compiles=True,
        size=3,
    ),
    "limit_on_one": Fault(
        "reaches Dynamo's limit of recompilations, alone",
        "an error that names it and the guard",
        10,
        "10 s",
        (
            error("RanksApartError", "rank 1 has reached Dynamo's recompile limit"),
            error("RanksApartError", "rank 1 has reached Dynamo's"),
        ),
        given.limit_on_one,
    ),
    "limit_on_all": Fault(
        "all ranks reach the limit",
        "the right result (the frame runs whole), and a warning",
        0,
        AT_ONCE,
        (RIGHT, RIGHT),
        given.limit_on_all,
        warning="UnshardedWarning: this process has reached Dynamo's recompile limit",
    ),
    # --- it is given something else
    "length": _unlike("inputs of another length", "[2, 5, 8]", "[2, 6, 8]", run=given.length, size=3),
    "batch": _unlike("inputs of another batch size", "[2, 5, 8]", "[1, 5, 8]", run=given.batch),
    "dtype": _unlike("another dtype", "float32 [2, 5, 8]", "float64 [2, 5, 8]", run=given.dtype),
    "values": _unlike("other values, at the first call", "values differ", run=given.values),
    "weights": _unlike("other weights", "weights differ", run=given.weights),
    "seed": _unlike("another seed, where a graph draws", "seed 0", "seed 1", run=given.seed),
    "option": _unlike("another option", "ulysses_degree=2", "ulysses_degree=1", run=given.option),
    "plan": _unlike("another plan", "plan", "second[hidden]", run=given.plan),
    "version": _unlike("another version of torch or fxsp", "versions", "torch 2.0.0", run=given.version),
    "skips_a_call": _unlike(
        "the inputs of the next call (under `check_inputs=True`)", "values differ", run=given.skips_a_call
    ),
    # --- its cache
    "cache_is_read_only": Fault(
        "its cache directory (TORCHINDUCTOR_CACHE_DIR) is read-only",
        "rank 1 Inductor's error; the others one that quotes it",
        0,
        AT_ONCE,
        UNWRITABLE,
        caches.cache_is_read_only,
        compiles=True,
    ),
    "cache_is_full": Fault(
        "its cache directory is full", "the same", 0, AT_ONCE, UNWRITABLE, caches.cache_is_full, compiles=True
    ),
    "cache_of_another_rank": Fault(
        "its cache directory was filled by another rank",
        "the right result",
        0,
        AT_ONCE,
        (RIGHT, RIGHT),
        caches.cache_of_another_rank,
        compiles=True,
    ),
    "cache_of_another_version": Fault(
        "its cache directory was filled by another version of fxsp",
        "the right result",
        0,
        AT_ONCE,
        (RIGHT, RIGHT),
        caches.cache_of_another_version,
        compiles=True,
    ),
}


@pytest.fixture(scope="session")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[list[Seen]]]]:
    """What every rank saw of each fault that is tested in this session; those that take longest begin first."""
    asked = {getattr(item, "callspec", None) and item.callspec.params.get("fault") for item in request.session.items}
    with server() as context, ThreadPoolExecutor(6) as pool:
        yield {
            name: pool.submit(
                run_faulty,
                context,
                fault.size,
                fault.run,
                tmp_path_factory.mktemp("fault"),
                limit=100 + fault.seconds,
                timeout=fault.timeout,
                environment=fault.environment,
            )
            for name, fault in sorted(FAULTS.items(), key=lambda row: -row[1].seconds)
            if name in asked
        }


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_every_rank_gets_the_right_result_or_an_error(fault: str, outcomes: dict[str, Future[list[Seen]]]) -> None:
    row = FAULTS[fault]
    for rank, seen in enumerate(outcomes[fault].result()):
        what = f"{fault}, rank {rank}"
        row.expected[int(rank == 1)].check(seen, what)
        slack = COMPILING if row.compiles else SLACK
        assert seen.seconds <= row.seconds + slack, f"{what}: {seen}\n{seen.printed}"
        assert row.warning in "\n".join(seen.warnings), f"{what}: {seen.warnings}"


def table() -> list[str]:
    """The faults as rows of a table; the name of each is that of its test."""
    rows = [f"| `{name}` | {row.what} | {row.sees} | {row.within} |" for name, row in FAULTS.items()]
    return ["| test | one rank (rank 1) | every rank gets | within |", "| --- | --- | --- | --- |", *rows]


def test_the_page_has_these_faults() -> None:
    found = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    assert found == table(), "docs/faults.md is not these:\n" + "\n".join(table())


def hangs(here: Rank) -> Result:
    here.hear("what nobody says" if here.rank else "what nobody else says")
    raise AssertionError


def is_wrong(here: Rank) -> Result:
    return [torch.ones(2)], [torch.ones(2) + here.rank]


@pytest.mark.parametrize("run", [hangs, is_wrong])
def test_the_harness_sees_hangs_and_wrong_results(run: Callable[[Rank], Result], tmp_path: Path) -> None:
    with server() as context:
        found = run_faulty(context, 2, run, tmp_path, limit=5 if run is hangs else 60)
    if run is is_wrong:
        assert [seen.outcome for seen in found] == ["right", "wrong"]
        return
    for seen in found:
        assert seen.outcome == "hang"
        assert "in hear" in seen.text, seen
