"""Times on a GPU: many calls in one CUDA graph, each on operands of its own, so that no call finds them in a cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["bytes_of", "compiled", "copy_seconds", "seconds"]

#: Operands of all calls together, in bytes: several times the largest cache.
WORKING_SET = 512 * 2**20
REPEATS = 7


def bytes_of(value: Any) -> int:
    """Bytes of the elements of all tensors."""
    leaves = torch.utils._pytree.tree_leaves(value)
    return sum(x.numel() * x.element_size() for x in leaves if isinstance(x, Tensor))


def compiled(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """By Inductor; on a CPU only traced, which is enough to see that it can be."""
    return torch.compile(function, backend="inductor" if device == "cuda" else "aot_eager", fullgraph=True)


def seconds(function: Callable[..., Any], make: Callable[[], Sequence[Any]], device: str) -> float:
    """Seconds of one call of ``function(*make())``: the median of several measurements."""
    first = make()
    if device != "cuda":
        start = time.perf_counter()
        function(*first)
        return time.perf_counter() - start
    count = max(4, min(64, WORKING_SET // max(bytes_of(first), 1)))
    operands = [first, *(make() for _ in range(count - 1))]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for args in operands[:3]:  # compiles, and fills the allocator
            function(*args)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for args in operands:
            function(*args)
    graph.replay()
    found = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / 1e3 / count)
    return statistics.median(found)


def copy_seconds(size: int, device: str) -> float:
    """Seconds to copy ``size`` bytes that lie in one piece: what a pass that moves as much can be measured by."""
    return seconds(torch.clone, lambda: (torch.empty(max(size // 2, 1), dtype=torch.bfloat16, device=device),), device)
