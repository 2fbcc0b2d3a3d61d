"""Compiled block by block, and as a whole: compile time and steady time against the number of blocks.

    torchrun --nproc-per-node 2 examples/bench_regional.py            (part of make bench)

A small Flux, its blocks half of each kind, with Inductor and without caches.  What counts as compiling is the first two
calls: the second one compiles nothing, if all is well.  Then all ways take turns, and medians are compared.  diffusers'
own hooks, regionally compiled, stand beside it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable

import diffusers
import torch
import torch.distributed as dist
from bench import Contestant, hooked, measure, once, traffic
from flux_model import build, inputs

WHOLE, REGIONAL, HOOKS = "fxsp, whole", "fxsp, by blocks", "diffusers hooks, by blocks"


def whole(blocks: int, inner: str) -> torch.nn.Module:
    """One graph of the whole model."""
    return torch.compile(build(blocks // 2, blocks // 2), backend="sp", options={"inner": inner})


def regional(blocks: int, inner: str) -> torch.nn.Module:
    """One graph for each kind of block."""
    model = build(blocks // 2, blocks // 2)
    model.compile_repeated_blocks(backend="sp", options={"inner": inner})
    return model


def hooks(blocks: int, inner: str) -> torch.nn.Module:
    """diffusers' context parallelism, compiled as its documentation says."""
    model = hooked(build(blocks // 2, blocks // 2))
    model.compile_repeated_blocks(backend=inner)
    return model


WAYS: dict[str, Callable[[int, str], torch.nn.Module]] = {WHOLE: whole, REGIONAL: regional, HOOKS: hooks}


def prepare(name: str, blocks: int, inner: str, arguments: dict[str, object], reference: torch.Tensor) -> Contestant:
    """Compile, cold."""
    torch.compiler.reset()
    dist.barrier()
    contestant = Contestant(name, str(blocks), lambda: WAYS[name](blocks, inner))
    contestant.run = run = contestant.make()
    start = time.perf_counter()
    for _ in range(2):
        output = once(run, arguments)
    seconds = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    contestant.warmup = seconds.item()
    contestant.error = ((output - reference).norm() / reference.norm()).item()
    contestant.traffic = traffic(lambda: once(run, arguments))
    return contestant


def table(rows: list[Contestant]) -> str:
    """One line for each way and number of blocks."""
    lines = [f"{'':28}{'blocks':>8}{'compiled in':>13}{'median':>12}{'error':>10}{'collectives':>13}{'bytes sent':>12}"]
    for c in rows:
        number, sent = (sum(values) for values in zip(*c.traffic.values(), strict=True))
        lines.append(
            f"{c.family:28}{c.inner:>8}{c.warmup:11.1f} s{c.median * 1e3:9.1f} ms{c.error:10.1e}{number:13}{sent:12}"
        )
    return "\n".join(lines)


def verdicts(rows: list[Contestant]) -> str:
    """Ratios of one run."""
    found = {(c.family, c.inner): c for c in rows}
    lines = []
    for way in dict.fromkeys(c.family for c in rows):
        own = [c for c in rows if c.family == way]
        lines.append(f"{way}: {own[-1].inner} blocks compile in {own[-1].warmup / own[0].warmup:.2f} of {own[0].inner}")
    pairs = [
        (blocks, c, other, found[other, blocks])
        for (family, blocks), c in found.items()
        for other in (WHOLE, HOOKS)
        if family == REGIONAL and (other, blocks) in found
    ]
    lines += [
        f"{blocks} blocks, {REGIONAL} / {other}: {c.median / beside.median:.3f} of the time, "
        f"compiled in {c.warmup / beside.warmup:.2f}"
        for blocks, c, other, beside in pairs
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> list[Contestant]:
    """Parse, measure, print on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="*", default=[4, 8, 16, 32])
    parser.add_argument("--image", type=int, default=1024, help="image tokens")
    parser.add_argument("--text", type=int, default=128, help="text tokens")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--inner", default="inductor")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="torch|diffusers")
    diffusers.utils.logging.set_verbosity_error()
    torch.accelerator.device_count = lambda: max(1, torch.cuda.device_count())  # see bench.py
    torch._inductor.config.force_disable_caches = True
    tensors, rows = inputs(options.image, options.text), []
    with torch.no_grad():
        for blocks in options.blocks:
            reference = build(blocks // 2, blocks // 2)(**tensors)[0]
            turn = []
            for name in options.ways:
                if dist.get_rank() == 0:
                    print(f"preparing: {name}, {blocks} blocks", file=sys.stderr, flush=True)
                turn.append(prepare(name, blocks, options.inner, tensors, reference))
            measure(turn, tensors, options.rounds)
            rows += turn
    if dist.get_rank() == 0:
        print(
            f"Flux, {options.image}+{options.text} tokens, float32, {options.inner}; torch {torch.__version__}, "
            f"{dist.get_world_size()} gloo processes of one thread, {os.cpu_count()} cores (load average "
            f"{os.getloadavg()[0]:.1f}); medians of {options.rounds} rounds\n\n{table(rows)}\n\n{verdicts(rows)}"
        )
    return rows


if __name__ == "__main__":
    dist.init_process_group("gloo")
    try:
        main()
    finally:
        dist.destroy_process_group()
