"""Processes of which one goes wrong: what every rank saw of it, and after how long.

:class:`Ranks` starts gloo processes for one scenario, ``scenario(Rank)`` on each of them, and gives what each saw
(:class:`Seen`): the right result, a wrong one, an error, an exit, or a hang with the Python stacks of the process.  The
processes are forked from a server that has torch loaded (they cost little), and end by themselves: a rank that takes
longer than its limit writes its stacks and exits.  Their store is this process's, as ``torchrun`` has it: it
outlives every rank, and its port is free because the system chose it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

__all__ = ["Rank", "Seen", "run_faulty", "server"]

#: Relative error of a right result.
TOLERANCE = 1e-5


#: multiprocessing looks after all its children whenever one is started, in whatever thread.
_one_at_a_time = threading.Lock()


@dataclass
class Seen:
    """What one rank saw: ``"right"``, ``"wrong"``, ``"error"``, ``"exit"`` or ``"hang"``, and what it said."""

    outcome: str
    #: Type and message of the error; the exit code; the stacks of a rank that hung.
    kind: str = ""
    text: str = ""
    #: From the moment that :meth:`Rank.fault` marked to the end.
    seconds: float = 0.0
    #: Warnings of fxsp.
    warnings: list[str] = field(default_factory=list)
    #: Standard output and standard error of the process.
    printed: str = ""

    def __str__(self) -> str:
        said = f" {self.kind}: {self.text}" if self.kind or self.text else ""
        return f"{self.outcome} after {self.seconds:.1f} s{said}"


class Rank:
    """One process of a scenario: who it is, and where the ranks meet outside of their process group."""

    def __init__(self, rank: int, size: int, store: Any, folder: Path) -> None:
        self.rank, self.size, self.folder = rank, size, folder
        self._store, self._met, self.since = store, 0, time.monotonic()

    def meet(self) -> None:
        """Wait for all ranks, by the store: no collective that a fault could disturb."""
        self._met += 1
        self._store.set(f"met {self._met} {self.rank}", "")
        self._store.wait([f"met {self._met} {other}" for other in range(self.size)], timedelta(seconds=60))

    def fault(self) -> None:
        """All ranks are here, and the next thing is the fault: time counts from now on."""
        self.meet()
        self.since = time.monotonic()

    def say(self, key: str) -> None:
        """Tell the other ranks; they :meth:`hear` it."""
        self._store.set(key, "")

    def hear(self, key: str) -> None:
        """Wait until a rank has said ``key``."""
        self._store.wait([key], timedelta(seconds=60))


def _error(found: Any, expected: Any) -> float:
    """The largest relative error of several tensors, in the 2-norm."""
    from running import error_of

    assert len(found) == len(expected)
    return max(error_of(a, b) for a, b in zip(found, expected, strict=True))


def _watch(scenario: Callable[[Rank], Any], here: Rank) -> Seen:
    """Run the scenario on this rank; it returns ``(found, expected)``, lists of tensors."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found, expected = scenario(here)
        except BaseException as error:  # noqa: BLE001  whatever it is, the test looks at it
            text = "\n".join([str(error), *getattr(error, "__notes__", [])])
            seen = Seen("error", type(error).__name__, text)
        else:
            difference = _error(found, expected)
            seen = Seen("right") if difference <= TOLERANCE else Seen("wrong", text=f"relative error {difference:.2g}")
    seen.seconds = time.monotonic() - here.since
    seen.warnings = [f"{w.category.__name__}: {w.message}" for w in caught if w.category.__module__ == "fxsp.errors"]
    return seen


def _process(
    scenario: Callable[[Rank], Any],
    rank: int,
    size: int,
    port: int,
    folder: str,
    limit: float,
    timeout: float,
    environment: dict[str, str],
    answer: Connection,
) -> None:
    import torch.distributed as dist

    log = (Path(folder) / f"rank{rank}.log").open("w")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    with (Path(folder) / f"rank{rank}.stacks").open("w") as stacks:
        faulthandler.dump_traceback_later(limit, exit=True, file=stacks)
        os.environ.update(environment)
        torch.set_num_threads(1)
        torch.manual_seed(0)
        store = dist.TCPStore("127.0.0.1", port, size, is_master=False, timeout=timedelta(seconds=60))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
        here = Rank(rank, size, dist.PrefixStore("scenario", store), Path(folder))
        seen = _watch(scenario, here)
        sys.stdout.flush()
        sys.stderr.flush()
        answer.send_bytes(pickle.dumps(seen))
        # A rank that ends closes its connections, which is a fault of its own: all are ended together.
        signal.pause()


@contextlib.contextmanager
def server() -> Iterator[Any]:
    """A context of :mod:`multiprocessing` whose processes begin with torch and fxsp loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fault_server"])
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS")}
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), before["PYTHONPATH"]]))
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        from multiprocessing.forkserver import ensure_running

        ensure_running()  # with this environment
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
    first = context.Process(target=os.getpid)
    first.start()
    first.join()  # the server is ready
    yield context


def run_faulty(
    context: Any,
    size: int,
    scenario: Callable[[Rank], Any],
    folder: Path,
    *,
    limit: float = 60.0,
    timeout: float = 60.0,
    environment: dict[str, str] | None = None,
) -> list[Seen]:
    """What each of ``size`` ranks saw of ``scenario``; ``timeout`` is that of their process group, in seconds.

    ``scenario`` is a function at the top of a module.  A rank that is not through after ``limit`` seconds hangs: its
    stacks are in what it saw, and it is ended.  ``environment`` is set in each rank before anything is compiled.
    """
    import torch.distributed as dist

    folder.mkdir(parents=True, exist_ok=True)
    store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    began = time.monotonic()
    ranks = []
    for rank in range(size):
        ours, theirs = context.Pipe(duplex=False)
        given = (scenario, rank, size, store.port, str(folder), limit, timeout, environment or {}, theirs)
        process = context.Process(target=_process, args=given, daemon=True)
        with _one_at_a_time:
            process.start()
        theirs.close()
        ranks.append((process, ours))
    seen: list[Seen] = []
    while time.monotonic() < began + limit + 5 and not all(ours.poll() or _code(p) is not None for p, ours in ranks):
        time.sleep(0.05)
    for rank, (process, ours) in enumerate(ranks):
        code = _code(process)
        process.kill()  # also when it is stopped
        while _code(process) is None:
            time.sleep(0.05)
        stacks = (folder / f"rank{rank}.stacks").read_text() if (folder / f"rank{rank}.stacks").exists() else ""
        found = _answer(ours)
        if found is None and (stacks or code is None):
            found = Seen("hang", text=stacks, seconds=time.monotonic() - began)
        found = found or Seen("exit", text=str(code))
        log = folder / f"rank{rank}.log"
        found.printed = log.read_text() if log.exists() else ""
        seen.append(found)
        ours.close()
    return seen


def _code(process: Any) -> int | None:
    with _one_at_a_time:
        code: int | None = process.exitcode
    return code


def _answer(ours: Connection) -> Seen | None:
    """What a rank that has ended had sent."""
    try:
        found: Seen = pickle.loads(ours.recv_bytes())
    except (EOFError, ConnectionResetError):
        return None
    return found
