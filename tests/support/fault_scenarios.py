"""One rank goes wrong: the programs of :mod:`test_faults`.  Each is a function of a :class:`faults.Rank`.

It returns what the compiled model gave and what one process gives, as lists of tensors; or it raises.  What goes wrong
does so on rank 1, as long as nothing else is said.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor

from faults import Rank
from fxsp import SequenceParallelInput
from small import Attention, inputs

Result = tuple[list[Tensor], list[Tensor]]

#: Where :func:`trip` raises on this rank; empty: nowhere.
_armed = ""


@torch.library.custom_op("fxsp_faults::trip", mutates_args=())
def trip(x: Tensor, place: str) -> Tensor:
    """A copy; or an error, where a test wants one."""
    if place == _armed:
        raise ValueError(f"out of something, {place}")
    return x.clone()


@trip.register_fake
def _(x: Tensor, place: str) -> Tensor:
    return torch.empty_like(x)


def _trip_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return trip(grad, f"{ctx.place} in the backward pass"), None


trip.register_autograd(_trip_backward, setup_context=lambda ctx, inputs, output: setattr(ctx, "place", inputs[1]))


@contextlib.contextmanager
def _failing(place: str) -> Any:
    """The operator raises at ``place``, on this rank."""
    global _armed  # noqa: PLW0603
    _armed = place
    try:
        yield
    finally:
        _armed = ""


class Model(nn.Module):
    """Two attentions (four all-to-alls), and places before, between and after them at which a rank may fail."""

    def __init__(self, tripping: bool = False) -> None:
        super().__init__()
        self.first, self.second = Attention(), Attention()
        self.tripping = tripping

    def _place(self, x: Tensor, place: str) -> Tensor:
        return trip(x, place) if self.tripping else x

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self._place(x, "before"))
        return self._place(self.second(self._place(x, "between")), "after")


#: The inputs of the attentions are split: an operator of ours before them is whole.
PLAN = {name: {"hidden": SequenceParallelInput(1)} for name in ("first", "second")}


def _compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="sp", options={"plan": PLAN, "inner": "aot_eager", **options})


def nothing(here: Rank) -> Result:
    """No fault: what a harness that cannot see a right result would get wrong."""
    model, x = Model(), inputs()
    fast = _compiled(model)
    here.fault()
    with torch.no_grad():
        return [fast(x)], [model(x)]


# --- a rank raises in a graph, and lives on: its process, and its connections ----------------------------------------


def _raises(here: Rank, place: str, *, training: bool = False, everywhere: bool = False) -> Result:
    model, x = Model(tripping=True), inputs()
    fast = _compiled(model)

    def call(f: Any) -> list[Tensor]:
        if not training:
            with torch.no_grad():
                return [f(x)]
        return list(torch.autograd.grad(f(x).square().sum(), list(model.parameters())))

    call(fast)
    here.fault()
    failing = _failing(place if everywhere or here.rank == 1 else "")
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
    fast = _compiled(model)
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
    fast = _compiled(model)
    with torch.no_grad():
        fast(x)
        here.fault()
        if here.rank == 1:
            with _failing("between"), contextlib.suppress(ValueError):
                fast(x)
        return [fast(x)], [model(x)]


# --- a rank goes, or stands still -------------------------------------------------------------------------------------


def _second_call(here: Rank, fault: Callable[[], None]) -> Result:
    """All have compiled and called the model; then the fault, on rank 1, and another call."""
    model, x = Model(), inputs()
    fast = _compiled(model)
    with torch.no_grad():
        fast(x)
        here.fault()
        if here.rank == 1:
            fault()
        return [fast(x)], [model(x)]


def _first_call(here: Rank, fault: Callable[[], None]) -> Result:
    """The fault comes before rank 1 compiles anything."""
    model, x = Model(), inputs()
    fast = _compiled(model)
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
    fast = _compiled(model)
    with torch.no_grad():
        fast(x)
        torch.compiler.reset()
        here.fault()
        if here.rank == 1:
            _end()
        return [_compiled(model)(x)], [model(x)]


def is_stopped(here: Rank) -> Result:
    return _second_call(here, _stop(3))


def is_stopped_for_long(here: Rank) -> Result:
    return _second_call(here, _stop(16))


def compiles_late(here: Rank) -> Result:
    return _first_call(here, lambda: time.sleep(20))


# --- a rank compiles anew, or no more ---------------------------------------------------------------------------------


class Scaled(Model):
    """Its graph depends on a number that Dynamo guards on."""

    scale = 1

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


def _rescaled(here: Rank, everywhere: bool = False, limit: int = 8) -> Result:
    model, x = Scaled(), inputs()
    fast = _compiled(model)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=limit):
        fast(x)
        here.fault()
        if everywhere or here.rank == 1:
            model.scale = 2
        return [fast(x)], [model(x)]


def compiles_alone(here: Rank) -> Result:
    return _rescaled(here)


def limit_on_one(here: Rank) -> Result:
    return _rescaled(here, limit=1)


def limit_on_all(here: Rank) -> Result:
    return _rescaled(here, limit=1, everywhere=True)


# --- a rank is given something else -----------------------------------------------------------------------------------


def _unlike(here: Rank, model: nn.Module, x: Tensor, **options: Any) -> Result:
    fast = _compiled(model, **options)
    here.fault()
    with torch.no_grad():
        return [fast(x)], [model(x)]


def length(here: Rank) -> Result:
    return _unlike(here, Model(), inputs(tokens=6 if here.rank == 1 else 5))


def batch(here: Rank) -> Result:
    return _unlike(here, Model(), inputs()[: 1 if here.rank == 1 else 2])


def dtype(here: Rank) -> Result:
    kind = torch.float64 if here.rank == 1 else torch.float32
    return _unlike(here, Model().to(kind), inputs().to(kind))


def values(here: Rank) -> Result:
    return _unlike(here, Model(), inputs(seed=here.rank))


def weights(here: Rank) -> Result:
    torch.manual_seed(here.rank)
    return _unlike(here, Model(), inputs())


class Noisy(Model):
    """Random numbers on whole values."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(1) + torch.randn(x.shape[0], x.shape[2])


def seed(here: Rank) -> Result:
    model = Noisy()
    torch.manual_seed(here.rank)
    return _unlike(here, model, inputs())


def option(here: Rank) -> Result:
    return _unlike(here, Model(), inputs(), ulysses_degree=1 if here.rank == 1 else 2)


def plan(here: Rank) -> Result:
    return _unlike(here, Model(), inputs(), plan={"first": PLAN["first"]} if here.rank == 1 else PLAN)


def version(here: Rank) -> Result:
    torch_version = "2.0.0" if here.rank == 1 else torch.__version__
    with mock.patch.object(torch, "__version__", torch_version):
        return _unlike(here, Model(), inputs())


def skips_a_call(here: Rank) -> Result:
    """One batch less on one rank: the calls that meet are given other values, of the same shape."""
    model, batches = Model(), [inputs(seed=seed) for seed in range(3)]
    fast = _compiled(model, check_inputs=True)
    with torch.no_grad():
        fast(batches[0])
        here.fault()
        x = batches[2 if here.rank == 1 else 1]
        return [fast(x)], [model(x)]


# --- caches -----------------------------------------------------------------------------------------------------------


class Row(nn.Module):
    """What Inductor makes without a C++ compiler: matrices, and a gather along the first dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def _with_cache(cache: Path, model: nn.Module, x: Tensor) -> Tensor:
    """The model, compiled by Inductor with this directory for its caches, and nothing in memory."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    torch.compiler.reset()
    settings = inductor.patch({"compile_threads": 1, "cpp.vec_isa_ok": False})  # nothing here needs either
    with torch.no_grad(), settings:
        result: Tensor = torch.compile(model, backend="sp", options={"plan": {"": {"x": SequenceParallelInput(0)}}})(x)
    return result


def _mount(folder: Path, options: str) -> bool:
    """A file system in memory for this process alone; whether it may have one."""
    clone_newns = 0x20000
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform != "linux" or libc.unshare(clone_newns) != 0:
        return False
    steps = (["mount", "--make-rprivate", "/"], ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)])
    return all(subprocess.run(step, check=False, capture_output=True).returncode == 0 for step in steps)


def _cache(here: Rank, prepare: Callable[[Path], None]) -> Result:
    model, x = Row(), inputs(4)[0]
    cache = here.folder / f"cache{here.rank}"
    cache.mkdir()
    if here.rank == 1:
        prepare(cache)
    here.fault()
    return [_with_cache(cache, model, x)], [model(x)]


def cache_is_read_only(here: Rank) -> Result:
    def prepare(cache: Path) -> None:
        if not _mount(cache, "ro"):
            cache.chmod(0o500)
            if os.access(cache, os.W_OK):  # may write everywhere, and not mount: no directory at all
                cache.rmdir()
                cache.touch()

    return _cache(here, prepare)


def cache_is_full(here: Rank) -> Result:
    def prepare(cache: Path) -> None:
        if not _mount(cache, "size=4k"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (256, resource.RLIM_INFINITY))

    return _cache(here, prepare)


def cache_of_another_rank(here: Rank) -> Result:
    model, x = Row(), inputs(4)[0]
    _with_cache(here.folder / f"cache{here.rank}", model, x)
    here.fault()
    return [_with_cache(here.folder / f"cache{here.size - 1 - here.rank}", model, x)], [model(x)]


def cache_of_another_version(here: Rank) -> Result:
    """A version whose programs were wrong has left them behind."""
    from fxsp import inner

    def emit(graph: torch.fx.Graph, **settings: Any) -> None:
        current(graph, **settings)
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.addmm.default):
            node.kwargs = {**node.kwargs, "alpha": 2}

    current, cache = inner.emit, here.folder / f"cache{here.rank}"
    model, x = Row(), inputs(4)[0]
    with mock.patch.object(inner, "emit", emit), mock.patch.object(inner, "fingerprint", return_value="?"):
        before = _with_cache(cache, model, x)
    assert not torch.allclose(before, model(x)), "the other version has the same programs"
    here.fault()
    return [_with_cache(cache, model, x)], [model(x)]
