"""The processes that the ranks are: a group that is missing, one that is gone, and one that is not what it was."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from fxsp.errors import OptionError, ProcessGroupError
from fxsp.torch_internals import group_named
from fxsp.types import Ranks

__all__ = ["check_group", "missing_group", "on_its_group", "ranks_of"]

_INIT = 'torch.distributed.init_process_group("nccl")  # or "gloo", on the CPU'


def missing_group() -> str:
    """What is missing where a launcher has started several processes and there is no process group; else ``""``."""
    size = os.environ.get("WORLD_SIZE", "")
    if not size.isdecimal() or int(size) < 2 or (dist.is_available() and dist.is_initialized()):
        return ""
    return (
        f"WORLD_SIZE is {size}, but there is no process group: each of the {size} processes does all of the work.\n"
        f"  Before the model is compiled: {_INIT}"
    )


def ranks_of(mesh: Any, group: Any) -> Ranks:
    """This process among the ranks of the mesh, the group, or (None both) the default group, which exists.

    Raises :class:`ProcessGroupError` for a group that was destroyed, :class:`OptionError` if this process is no member.
    """
    what = "option 'group'" if mesh is None else "option 'mesh'"
    try:
        group = mesh.get_group() if mesh is not None else dist.group.WORLD if group is None else group
        rank, size, name = dist.get_rank(group), dist.get_world_size(group), group.group_name
    except (ValueError, RuntimeError, KeyError) as error:  # what torch says of a group that it does not know
        raise _destroyed(what) from error
    if rank < 0:
        raise OptionError(
            f"global rank {dist.get_rank()} is no member of the given group {dist.get_process_group_ranks(group)}"
        )
    if group_named(name) is not group:
        raise _destroyed(what)
    return Ranks(rank, size, name)


def _destroyed(what: str) -> ProcessGroupError:
    return ProcessGroupError(
        f"{what}: this process group was destroyed (destroy_process_group), or belongs to one that was.\n"
        f"  Make a new one, and compile with that: {_INIT}; torch.distributed.new_group(...)"
    )


def check_group(rank: int, size: int, name: str) -> None:
    """Raises :class:`ProcessGroupError` unless the group ``name`` has ``size`` ranks, and this process is ``rank``.

    A group of the same name that was made since is another one, if its ranks are others.
    """
    group = group_named(name)
    if group is not None and group.size() == size and group.rank() == rank:
        return
    now = "it was destroyed" if group is None else f"it has {group.size()} ranks now, and this is {group.rank()}"
    raise ProcessGroupError(
        f"this model is split for rank {rank} of the {size} ranks of process group {name!r}: {now}.\n"
        "  Keep the group for as long as the model is called, or begin anew with another one: "
        "torch.compiler.reset(), then torch.compile(...)"
    )


def on_its_group(run: Callable[..., Any], ranks: Ranks) -> Callable[..., Any]:
    """``run``, a graph for ``ranks``, with :func:`check_group` at each call: a look-up by name."""

    def checked(*args: Any) -> Any:
        check_group(ranks.rank, ranks.size, ranks.group)
        return run(*args)

    return checked
