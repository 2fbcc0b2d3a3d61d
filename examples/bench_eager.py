"""Eager code on split values: what an operator costs, beside PyTorch's ``DTensor`` and beside plain tensors.

    torchrun --nproc-per-node 2 examples/bench_eager.py            (part of make bench)

The same chain of operators on the same processes, on few elements, so that what is left is the dispatch: what stands
between two compiled blocks (a residual, a norm, a modulation, a projection).  The ways take turns; medians count.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional as F

import fxsp

WIDTH = 32
Ops = dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]
OPS: Ops = {
    "add": lambda x, scale, weight: x + x,
    "mul": lambda x, scale, weight: x * scale,
    "layer_norm": lambda x, scale, weight: F.layer_norm(x, (WIDTH,)),
    "linear": lambda x, scale, weight: F.linear(x, weight),
    "gelu": lambda x, scale, weight: F.gelu(x),
}


class Double(torch.nn.Module):
    """What is compiled, to get a split value."""

    def forward(self, x: Tensor) -> Tensor:
        """Twice ``x``."""
        return x * 2


def operands(tokens: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """A value split along its tokens, a scale and a weight that every rank has: for each way."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, tokens, WIDTH, generator=generator)
    scale, weight = torch.randn(1, 1, WIDTH, generator=generator), torch.randn(WIDTH, WIDTH, generator=generator)
    plan = {"": {"x": fxsp.SequenceParallelInput(1)}}
    split = torch.compile(Double(), backend="sp", options={"plan": plan, "inner": "eager", "outputs": "split"})(x)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = [distribute_tensor(t, mesh, [Replicate()]) for t in (scale, weight)]
    sharded: DTensor = distribute_tensor(2 * x, mesh, [Shard(1)])
    rows = 2 * x.chunk(dist.get_world_size(), 1)[dist.get_rank()]
    return {
        "plain": (rows, scale, weight),
        "fxsp": (split, scale, weight),
        "DTensor": (sharded, whole[0], whole[1]),
    }


def measure(tokens: int, calls: int, rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds: way -> operator -> of one call."""
    times: dict[str, dict[str, list[float]]] = {}
    with torch.no_grad():
        ways = operands(tokens)
        for turn in range(rounds + 1):
            for way, tensors in ways.items():
                for name, op in OPS.items():
                    start = time.perf_counter()
                    for _ in range(calls):
                        op(*tensors)
                    spent = (time.perf_counter() - start) / calls * 1e6
                    if turn:  # the first one finds rules, and keeps them
                        times.setdefault(way, {}).setdefault(name, []).append(spent)
    return {way: {name: statistics.median(found) for name, found in row.items()} for way, row in times.items()}


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Parse, measure, print on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = measure(options.tokens, options.calls, options.rounds)
    if dist.get_rank() == 0:
        print(f"{'microseconds of a call':24}" + "".join(f"{name:>12}" for name in OPS))
        for way, row in found.items():
            print(f"{way:24}" + "".join(f"{row[name]:12.1f}" for name in OPS))
        print("fxsp / DTensor          " + "".join(f"{found['fxsp'][n] / found['DTensor'][n]:12.2f}" for n in OPS))
    return found


if __name__ == "__main__":
    dist.init_process_group("gloo")
    try:
        main()
    finally:
        dist.destroy_process_group()
