"""Real ranks for tests: gloo processes on this machine, forked from a server and used for many tests.

``Pool(size).run(fn, *args)`` calls ``fn(rank, size, *args)`` in each of ``size`` processes and returns the list of
results.  ``fn`` is a function at the top of a module; arguments and results are pickled.  An exception is raised here,
with the traceback of the rank that failed.  Tests take pools from the fixture ``ranks``: ``ranks(2).run(fn)``.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import rank_server

__all__ = ["Pool", "RankError", "run_ranks"]

#: Seconds that the other ranks get to end once one has failed: they may wait for it in a collective.
GRACE = 5.0
#: Seconds that a rank waits in a collective: others may compile meanwhile, on a busy machine.
TIMEOUT = 300.0


class RankError(AssertionError):
    """A rank raised an exception, died, or did not end in time."""


def _worker(tasks: Connection, rank: int, size: int, store: str) -> None:
    import torch
    import torch.distributed as dist

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    torch.set_num_threads(1)
    limit = timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=limit)
    while True:
        try:
            message = tasks.recv_bytes()
        except EOFError:
            break
        if not message:
            break
        try:
            fn, args = pickle.loads(message)
            torch.manual_seed(0)
            answer = pickle.dumps((True, fn(rank, size, *args)))
        except BaseException:  # whatever it is, the parent shows it  # noqa: BLE001
            answer = pickle.dumps((False, traceback.format_exc()))
        tasks.send_bytes(answer)
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()
    dist.destroy_process_group()


class Pool:
    """``size`` processes in one process group.  They start at the first task, and again after a failure."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._processes: list[int] = []
        self._tasks: list[Connection] = []

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fxsp-ranks-")
        store = str(Path(self._folder.name) / "store")
        for rank in range(self.size):
            tasks, process = rank_server.connect(rank, _worker, rank, self.size, store)
            self._tasks.append(tasks)
            self._processes.append(process)

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
        """The results of ``fn(rank, size, *args)``, by rank; :class:`RankError` if a rank fails or takes too long."""
        if not self._tasks:
            self._start()
        message = pickle.dumps((fn, args))
        for tasks in self._tasks:
            tasks.send_bytes(message)
        answers: dict[int, Any] = {}
        failures: dict[int, str] = {}
        end = time.monotonic() + timeout
        while len(answers) + len(failures) < self.size:
            left = {tasks: r for r, tasks in enumerate(self._tasks) if r not in answers and r not in failures}
            ready = wait(list(left), timeout=max(end - time.monotonic(), 0))
            if not ready:
                break
            for tasks in ready:
                rank = left[tasks]  # type: ignore[index]
                try:
                    ok, value = pickle.loads(tasks.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, ConnectionResetError):
                    ok, value = False, "the process died"
                if ok:
                    answers[rank] = value
                else:
                    failures[rank] = value
                    end = min(end, time.monotonic() + GRACE)
        if len(answers) == self.size:
            return [answers[rank] for rank in range(self.size)]
        silent = sorted(set(range(self.size)) - set(answers) - set(failures))
        self._kill()
        text = "\n".join(f"rank {rank} of {self.size}:\n{why}" for rank, why in sorted(failures.items()))
        if silent:
            text += f"\nranks {silent} did not end" + (" after that" if failures else f" in {timeout:g} s")
        raise RankError(text)

    def _kill(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):  # it is dead already
                os.kill(process, signal.SIGKILL)
        self._forget()

    def close(self) -> None:
        """End the processes."""
        for tasks in self._tasks:
            with contextlib.suppress(OSError):  # it is dead already
                tasks.send_bytes(b"")
        if not all(_ended(tasks) for tasks in self._tasks):
            self._kill()
        self._forget()

    def _forget(self) -> None:
        for tasks in self._tasks:
            tasks.close()
        self._processes, self._tasks = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def _ended(tasks: Connection) -> bool:
    """Whether a process that is told to end does so in ten seconds."""
    try:
        return tasks.poll(10) and not tasks.recv_bytes()
    except (EOFError, OSError):
        return True


def run_ranks(size: int, fn: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
    """``fn(rank, size, *args)`` in ``size`` fresh processes; the results by rank."""
    pool = Pool(size)
    try:
        return pool.run(fn, *args, timeout=timeout)
    finally:
        pool.close()
