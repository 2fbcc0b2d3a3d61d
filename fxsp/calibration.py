"""``fxsp.calibrate``: the links and the device of a group of ranks, measured, as a :class:`~fxsp.machine.Machine`.

Of each collective that a program sends (an exchange, a gather, a sum, a block to the next rank) the time is measured
over some sizes of messages, within the nodes (all nodes at once) and, where there are several, among all ranks; a line
through it is ``latency + bytes / bandwidth``, with the bytes that a rank sends.  Of the device: a product of matrices,
a copy, the smallest kernel.  All ranks measure at the same time, as they will run.

Every rank is told the numbers of all of them, and each takes the slowest: they are equal on all ranks, and so is what
is decided by them.  One rank of each host writes the file.
"""

from __future__ import annotations

import math
import os
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fxsp.device import Device, Link
from fxsp.errors import OptionError, ProcessGroupError
from fxsp.machine import KINDS, Machine
from fxsp.measured import device_name, file_for, runs
from fxsp.process_groups import ranks_of

__all__ = ["calibrate", "fitted"]

#: Bytes that a rank sends in one message.
SIZES = (2**12, 2**16, 2**20, 2**23)


def calibrate(
    group: Any = None,
    *,
    path: str | Path | None = None,
    device: str | torch.device | None = None,
    sizes: Sequence[int] = SIZES,
    repeats: int = 7,
) -> Machine:
    """Measure the links and the device of the ranks of ``group``; all of them must call it.

    ``group`` is a process group, a device mesh of one dimension, or of two: nodes, and the ranks in each; default: the
    default group.  Without a mesh of two dimensions nodes are found by the names of the hosts.  The result goes to
    ``path``, by default to the file where later compilations find it (:mod:`fxsp.measured`).  ``device``: default the
    CPU under gloo, the current accelerator elsewhere.  ``sizes`` are bytes that a rank sends in one message, two or
    more of them; each is measured ``repeats`` times.

    Raises :class:`ProcessGroupError` without a process group, :class:`OptionError` for nodes that differ in size or
    ranks of a node that are not consecutive, and for ``sizes`` and ``repeats`` that nothing can be fitted to.
    """
    if len(set(sizes)) < 2 or min(sizes) < 1 or repeats < 1:
        raise OptionError(f"calibrate measures two sizes or more, each once or more: {tuple(sizes)}, {repeats} times")
    if not (dist.is_available() and dist.is_initialized()):
        raise ProcessGroupError('calibrate measures the links of ranks: torch.distributed.init_process_group("nccl")')
    made: list[Any] = []
    try:
        everyone, members, names = _nodes(group, made)
        where = _device(device, everyone)
        per_node = _per_node(members, names)
        inside, rank = everyone, dist.get_rank(everyone)
        if 1 < per_node < len(members):
            start = rank // per_node * per_node
            inside = dist.new_group(members[start : start + per_node], use_local_synchronization=True)
            made.append(inside)
        near = _links(inside if per_node > 1 else everyone, where, sizes, repeats)
        several = per_node < len(members)
        far = _links(everyone, where, sizes, repeats) if several and per_node > 1 else near
        found = _gathered((near, far, _rates(where, repeats)), everyone)
        machine = _agreed(found, device_name(where), per_node, len(members))
        hosts = _gathered(socket.gethostname(), everyone)
        if hosts.index(hosts[rank]) == rank:
            _write(Path(path) if path is not None else file_for(where, members), machine.to_json())
        dist.barrier(everyone)
    finally:
        for each in made:
            dist.destroy_process_group(each)
    return machine


def _agreed(found: Sequence[Any], name: str, per_node: int, ranks: int) -> Machine:
    """One machine of what all ranks have measured: the slowest of each."""
    near, far = ({kind: _slowest([one[i][kind] for one in found]) for kind in KINDS} for i in (0, 1))
    flops, bandwidth = (min(one[2][i] for one in found) for i in (0, 1))
    device = Device(name, flops, bandwidth, max(one[2][2] for one in found), near["all_gather"])
    if per_node == ranks:
        return Machine(f"{name} {ranks}, measured", device, device.link, inside=tuple(near.items()))
    layout, links = f"{ranks // per_node}x{per_node}", (tuple(near.items()), tuple(far.items()))
    return Machine(f"{name} {layout}, measured", device, far["all_gather"], per_node, None, *links)


def _nodes(group: Any, made: list[Any]) -> tuple[Any, list[int], list[Any]]:
    """The group of all ranks, their global ranks, and the node of each."""
    if getattr(group, "ndim", 1) == 2:
        members, rows = group.mesh.flatten().tolist(), group.mesh.shape[1]
        everyone = dist.group.WORLD
        if members != list(range(dist.get_world_size())):
            everyone = dist.new_group(members, use_local_synchronization=True)
            made.append(everyone)
        return everyone, members, [i // rows for i in range(len(members))]
    if getattr(group, "ndim", 1) > 2:
        raise OptionError(
            f"calibrate takes a mesh of one dimension, or of two (nodes, ranks in each), not {group.ndim}"
        )
    is_mesh = hasattr(group, "get_group")
    ranks_of(group if is_mesh else None, None if is_mesh else group)  # it lives, and this process is a member
    everyone = group.get_group() if is_mesh else group if group is not None else dist.group.WORLD
    return everyone, dist.get_process_group_ranks(everyone), _gathered(socket.gethostname(), everyone)


def _per_node(members: Sequence[int], names: Sequence[Any]) -> int:
    counts = runs(names)
    if len(counts) != len(set(names)) or len(set(counts)) > 1:
        raise OptionError(
            f"ranks {list(members)} are on nodes {list(names)}: consecutive ranks of a group must share a node, as "
            "many on each.\n  Make the group, or a mesh of nodes and ranks in each, in that order."
        )
    return counts[0]


def _device(given: str | torch.device | None, group: Any) -> torch.device:
    if given is not None:
        return torch.device(given)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None or dist.get_backend(group) == "gloo":
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def _gathered(value: Any, group: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def _write(path: Path, text: str) -> None:
    """All of it, or nothing: others may read at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


# --- measuring --------------------------------------------------------------------------------------------------------


def _links(group: Any, device: torch.device, sizes: Sequence[int], repeats: int) -> dict[str, Link]:
    """A line through the times of each collective, as this rank has seen them."""
    return {
        kind: fitted([_collective(kind, size, group, device, repeats) for size in sorted(set(sizes))]) for kind in KINDS
    }


def _collective(kind: str, size: int, group: Any, device: torch.device, repeats: int) -> tuple[int, float]:
    """Bytes that a rank sends, and seconds."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    if ranks == 1:
        return size, size * 1e-12  # nobody to send to
    others = ranks - 1
    parts = {"all_to_all": size / others, "all_gather": size / others, "all_reduce": size / 2 / others}
    count = max(1, round(parts.get(kind, size) / 4))
    rows = ranks if kind in ("all_to_all", "all_reduce") else 1
    x = torch.ones(rows * count, device=device)
    if kind == "all_to_all":
        out = torch.empty_like(x)
        run: Callable[[], Any] = lambda: dist.all_to_all_single(out, x, group=group)  # noqa: E731
    elif kind == "all_gather":
        out = torch.empty(ranks * count, device=device)
        run = lambda: dist.all_gather_into_tensor(out, x, group=group)  # noqa: E731
    elif kind == "all_reduce":
        run = lambda: dist.all_reduce(x, dist.ReduceOp.MAX, group=group)  # noqa: E731
    else:  # as a ring sends: to the next rank, from the one before
        out = torch.empty_like(x)
        send, receive = ([count if r == (rank + step) % ranks else 0 for r in range(ranks)] for step in (1, -1))
        run = lambda: dist.all_to_all_single(out, x, receive, send, group=group)  # noqa: E731
    sent = {"all_to_all": others, "all_gather": others, "all_reduce": 2 * others}.get(kind, 1) * 4 * count
    return sent, _seconds(run, device, repeats, before=lambda: dist.barrier(group))


def _rates(device: torch.device, repeats: int) -> tuple[float, float, float]:
    """Operations and bytes per second, and seconds of the smallest kernel."""
    large = device.type != "cpu"
    side, dtype = (8192, torch.bfloat16) if large else (384, torch.float32)
    a = torch.ones(side, side, device=device, dtype=dtype)
    x = torch.ones(2**26 if large else 2**21, device=device)
    y, one = torch.empty_like(x), torch.ones(1, device=device)
    product = _seconds(lambda: a @ a, device, repeats)
    copy = _seconds(lambda: y.copy_(x), device, repeats)
    launch = _seconds(lambda: [one.add_(1) for _ in range(20)], device, repeats) / 20
    return 2 * side**3 / product, 2 * 4 * x.numel() / copy, launch


def _seconds(
    run: Callable[[], Any], device: torch.device, repeats: int, before: Callable[[], Any] | None = None
) -> float:
    """The median of the times that it takes, after it has run once."""
    found = []
    for _ in range(repeats + 1):
        if before is not None:
            before()
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        found.append(time.perf_counter() - start)
    return max(statistics.median(found[1:]), 1e-9)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def fitted(times: Sequence[tuple[int, float]]) -> Link:
    """The line ``latency + bytes / bandwidth`` through ``(bytes, seconds)``, the nearest to all in proportion."""
    weights = [1 / t**2 for _, t in times]
    total, x, t, xx, xt = (
        math.fsum(w * f(n, s) for w, (n, s) in zip(weights, times, strict=True))
        for f in (lambda n, s: 1.0, lambda n, s: n, lambda n, s: s, lambda n, s: n * n, lambda n, s: n * s)
    )
    spread = total * xx - x * x
    slope = (total * xt - x * t) / spread if spread > 0 else 0.0
    latency = (t - slope * x) / total
    if latency < 0:  # the first bytes are not for nothing; the line begins where nothing is sent
        latency, slope = 0.0, xt / xx
    if slope <= 0:  # more bytes took no longer
        n, s = max(times)
        latency, slope = min(s for _, s in times), s / n
    return Link(latency, 1 / slope)


def _slowest(links: Sequence[Link]) -> Link:
    return Link(max(link.latency for link in links), min(link.bandwidth for link in links))
