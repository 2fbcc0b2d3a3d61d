"""One rank goes wrong: the programs of :mod:`test_faults`.  Each is a function of a :class:`faults.Rank`.

It returns what the compiled model gave and what one process gives, as lists of tensors; or it raises.  What goes wrong
does so on rank 1, as long as nothing else is said.  :mod:`fault_inputs` and :mod:`fault_caches` have more of them.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fault_models import Model, Result, compiled, failing_at
from faults import Rank
from small import inputs


def nothing(here: Rank) -> Result:
    """No fault: what a harness that cannot see a right result would get wrong."""
    model, x = Model(), inputs()
    fast = compiled(model)
    here.fault()
    with torch.no_grad():
        return [fast(x)], [model(x)]


# --- a rank raises in a graph, and lives on: its process, and its connections ----------------------------------------


def _raises(here: Rank, place: str, *, training: bool = False, everywhere: bool = False) -> Result:
    model, x = Model(tripping=True), inputs()
    fast = compiled(model)

    def call(f: Any) -> list[Tensor]:
        if not training:
            with torch.no_grad():
                return [f(x)]
        return list(torch.autograd.grad(f(x).square().sum(), list(model.parameters())))

    call(fast)
    here.fault()
    failing = failing_at(place if everywhere or here.rank == 1 else "")
    if everywhere:
        with failing, contextlib.suppress(ValueError):
            call(fast)
            raise AssertionError("it did not fail")
    else:
        with failing:
            call(fast)
    return call(fast), call(model)


def raises_before(here: Rank) -> Result:
    return _raises(here, "before")


def raises_between(here: Rank) -> Result:
    return _raises(here, "between")


def raises_after(here: Rank) -> Result:
    return _raises(here, "after")


def raises_in_backward(here: Rank) -> Result:
    return _raises(here, "between in the backward pass", training=True)


def raises_everywhere(here: Rank) -> Result:
    """All ranks alike, as an assertion on whole values does: they are in step, and go on."""
    return _raises(here, "between", everywhere=True)


def raises_in_a_collective(here: Rank) -> Result:
    """The second all-to-all is sent, and not waited for."""
    model, x = Model(), inputs()
    fast = compiled(model)
    waits = 0
    packet = torch.ops._c10d_functional.wait_tensor
    original = packet.default

    def wait(x: Tensor) -> Tensor:
        nonlocal waits
        waits += 1
        if waits == 2:
            raise ValueError("out of something, while waiting")
        return original(x)

    with torch.no_grad():
        fast(x)
        here.fault()
        if here.rank == 1:
            packet.default = wait
        try:
            fast(x)
        finally:
            packet.default = original
        return [fast(x)], [model(x)]


def raises_and_tries_again(here: Rank) -> Result:
    """Its caller catches the error and calls again: its first message answers the last one of the others."""
    model, x = Model(tripping=True), inputs()
    fast = compiled(model)
    with torch.no_grad():
        fast(x)
        here.fault()
        if here.rank == 1:
            with failing_at("between"), contextlib.suppress(ValueError):
                fast(x)
        return [fast(x)], [model(x)]


# --- a rank goes, or stands still -------------------------------------------------------------------------------------


def _second_call(here: Rank, fault: Callable[[], None]) -> Result:
    """All have compiled and called the model; then the fault, on rank 1, and another call."""
    model, x = Model(), inputs()
    fast = compiled(model)
    with torch.no_grad():
        fast(x)
        here.fault()
        if here.rank == 1:
            fault()
        return [fast(x)], [model(x)]


def _first_call(here: Rank, fault: Callable[[], None]) -> Result:
    """The fault comes before rank 1 compiles anything."""
    model, x = Model(), inputs()
    fast = compiled(model)
    here.fault()
    if here.rank == 1:
        fault()
    with torch.no_grad():
        return [fast(x)], [model(x)]


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _end() -> None:
    """As a script ends: what was registered for that, and out."""
    atexit._run_exitfuncs()
    os._exit(0)


def _stop(seconds: float) -> Callable[[], None]:
    """Stop this process, and have another continue it."""

    def stop() -> None:
        mine = os.getpid()
        subprocess.Popen(["sh", "-c", f"sleep {seconds:g}; kill -CONT {mine}"])
        os.kill(mine, signal.SIGSTOP)

    return stop


def is_killed(here: Rank) -> Result:
    return _second_call(here, _kill)


def is_killed_before_it_compiles(here: Rank) -> Result:
    return _first_call(here, _kill)


def ends_early(here: Rank) -> Result:
    return _second_call(here, _end)


def ends_before_it_compiles(here: Rank) -> Result:
    model, x = Model(), inputs()
    fast = compiled(model)
    with torch.no_grad():
        fast(x)
        torch.compiler.reset()
        here.fault()
        if here.rank == 1:
            _end()
        return [compiled(model)(x)], [model(x)]


def is_stopped(here: Rank) -> Result:
    return _second_call(here, _stop(3))


def is_stopped_for_long(here: Rank) -> Result:
    return _second_call(here, _stop(16))


def compiles_late(here: Rank) -> Result:
    return _first_call(here, lambda: time.sleep(20))
