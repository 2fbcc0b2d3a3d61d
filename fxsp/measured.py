"""Where a machine that was measured is kept, and how it is found again: by the device and the layout of the group.

The folder is ``FXSP_CACHE_DIR``, else ``fxsp`` in ``XDG_CACHE_HOME``, else ``~/.cache/fxsp``.  A file is named after
the device, and after how many consecutive ranks of the group are on each node, as far as a process can tell without
asking the others: torchrun says how many processes a node has (``LOCAL_WORLD_SIZE``).  Without it all are taken to be
on one node: groups of one size that no launcher tells apart share a file, and ``options={"machine": path}`` is the way
out.

Nothing is sent to find a file.  The ranks compare their options, of which the machine is one, when they compile: a file
that one of them lacks, or has of another measurement, is an error on all of them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fxsp.machine import Machine, read_machine
from fxsp.torch_internals import group_named
from fxsp.types import Ranks

__all__ = ["cache_folder", "device_name", "file_for", "find_machine", "runs"]


def cache_folder() -> Path:
    """Where measured machines are kept."""
    if given := os.environ.get("FXSP_CACHE_DIR"):
        return Path(given)
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "fxsp"


def device_name(device: torch.device) -> str:
    """What a device is called; those of one name are alike."""
    if device.type == "cpu":
        return "cpu"
    module = torch.get_device_module(device)
    name = getattr(module, "get_device_name", None)
    return str(name(device)) if name is not None else device.type


def runs(nodes: Iterable[Any]) -> tuple[int, ...]:
    """How many consecutive ranks each node has, by the nodes of the ranks."""
    return tuple(len(list(same)) for _, same in groupby(nodes))


def file_for(device: torch.device, members: Sequence[int]) -> Path:
    """The file for a group of these global ranks; it need not exist."""
    given = os.environ.get("LOCAL_WORLD_SIZE", "")
    local = int(given) if given.isdecimal() and int(given) else None
    layout = "+".join(map(str, runs(rank // local if local else 0 for rank in members)))
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return cache_folder() / f"machine-{slug}-{layout}.json"


def find_machine(ranks: Ranks, inputs: Sequence[Any]) -> Machine | None:
    """What was measured for these ranks and the device of the first tensor among ``inputs``; None if nothing was.

    Raises :class:`~fxsp.errors.OptionError` for a file that cannot be read.
    """
    group = group_named(ranks.group) if ranks.size > 1 else None
    device = next((x.device for x in inputs if isinstance(x, torch.Tensor) and x.device.type != "meta"), None)
    if group is None or device is None:
        return None
    path = file_for(device, dist.get_process_group_ranks(group))
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        return None
    return _read(path, changed)


@lru_cache(maxsize=64)
def _read(path: Path, changed: int) -> Machine:
    return read_machine(path)
