"""Process groups: stores, timeouts, and connections that are closed."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


def group_named(name: str) -> Any:
    """The process group of this name; None if there is none."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    try:
        return _resolve_process_group(name)  # type: ignore[arg-type]
    except (ValueError, RuntimeError, LookupError):
        return None


def group_store(group: Any) -> Any:
    """A store that all ranks of ``group`` share, on a connection of its own where it can be had; None if there is none.

    It is the default store of the process, which every group was made through.
    """
    from torch.distributed import distributed_c10d

    if str(torch.distributed.get_backend(group)) == "fake":  # a store that keeps nothing: there are no other ranks
        return None
    try:
        store: Any = distributed_c10d._get_default_store()
    except (ValueError, RuntimeError):
        return None
    try:
        # Waiting for one key on a connection holds up everyone else on it.
        return store.clone()
    except (AttributeError, NotImplementedError, RuntimeError):
        return store


def group_lives(group: Any) -> bool:
    """Whether a process group has not been destroyed yet."""
    from torch.distributed import distributed_c10d

    return group in distributed_c10d._world.pg_map


def group_timeout(group: Any) -> float:
    """Seconds after which a collective of the group fails."""
    from torch.distributed import distributed_c10d

    found = []
    for device in getattr(group, "_device_types", ()):
        options = getattr(group._get_backend(device), "options", None)
        found.append(getattr(options, "_timeout", distributed_c10d.default_pg_timeout).total_seconds())
    return float(max(found, default=distributed_c10d.default_pg_timeout.total_seconds()))


def has_gloo(group: Any) -> bool:
    """Whether tensors on the CPU travel by gloo in a process group."""
    try:
        return str(group._get_backend(torch.device("cpu")).name()) == "gloo"
    except RuntimeError:  # none for this device
        return False


#: A tag that no one sends with.
_NOBODY = 2**31 - 1009


def close_connections(group: Any) -> None:
    """Close this process's connections of a gloo group: operations on it fail, here and on the others that wait for it.

    Callable from any thread.  Of another backend's group nothing is closed.
    """
    from datetime import timedelta

    import torch.distributed as dist

    if group is None or not has_gloo(group):
        return
    # gloo has no call for it, but does it when an operation times out. Nobody answers this one.
    other = 0 if dist.get_rank(group) else 1
    with contextlib.suppress(RuntimeError):
        work = dist.irecv(torch.empty(1, device="cpu"), group=group, group_src=other, tag=_NOBODY)
        if work is not None:
            work.wait(timedelta(milliseconds=1))


#: What torch's backends say when a collective fails.
_COLLECTIVE_ERRORS = (
    "gloo",
    "NCCL",
    "Timed out waiting",
    "Connection closed by peer",
    "Connection reset by peer",
    "Application timeout caused pair closure",
)


def is_collective_error(error: BaseException) -> bool:
    """Whether a collective failed: a connection is gone, or an answer did not come in time."""
    if isinstance(error, getattr(torch.distributed, "DistError", ())):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _COLLECTIVE_ERRORS)
