"""One rank has a cache that it cannot write, or that another rank or version has filled; see :mod:`fault_scenarios`."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor

from fault_models import Result
from faults import Rank
from fxsp import SequenceParallelInput
from small import inputs


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
