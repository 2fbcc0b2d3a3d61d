"""Side by side on the same processes: one process, diffusers' context parallelism, and fxsp.

    torchrun --nproc-per-node 2 examples/bench.py            (make bench)

All contestants have the same weights, inputs and processes, one thread each.  They take turns, many rounds long, and
medians are compared, so that a noisy machine disturbs all alike.  A time is that of the slowest rank.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

# The profiler's own messages are not of interest; it reads this once, at import.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import diffusers
import torch
import torch.distributed as dist
from flux_model import build, inputs, self_attentions
from torch.profiler import ProfilerActivity, profile

ONE, HOOKS, OURS = "one process", "diffusers hooks", "fxsp"


@dataclass
class Contestant:
    """One way to run the model, and what was measured of it."""

    family: str
    inner: str
    make: Callable[[], Callable[..., tuple[torch.Tensor, ...]]]
    run: Callable[..., tuple[torch.Tensor, ...]] | None = None
    times: list[float] = field(default_factory=list)
    #: Processor time of the busiest rank, the threads that serve its collectives included.
    work: list[float] = field(default_factory=list)
    warmup: float = 0.0
    error: float = 0.0
    #: Kind of collective -> (number, bytes that a rank sends), of one forward pass.
    traffic: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.family}, {self.inner}"

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    @property
    def alone(self) -> bool:
        """Runs on rank 0, the other processes sleeping."""
        return self.family == ONE


def hooked(model: torch.nn.Module | None = None) -> torch.nn.Module:
    """The model with diffusers' Ulysses hooks."""
    model = model or build()
    model.set_attention_backend("native")
    model.enable_parallelism(config=diffusers.ContextParallelConfig(ulysses_degree=dist.get_world_size()))
    return model


def ours(inner: str) -> torch.nn.Module:
    """The model through ``backend="sp"``."""
    return torch.compile(build(), backend="sp", options={"inner": inner})


def contestants() -> list[Contestant]:
    """All of them, in the order of the table."""
    return [
        Contestant(ONE, "eager", build),
        Contestant(ONE, "inductor", lambda: torch.compile(build())),
        Contestant(HOOKS, "eager", hooked),
        Contestant(HOOKS, "inductor", lambda: torch.compile(hooked())),
        Contestant(OURS, "eager", lambda: ours("eager")),
        Contestant(OURS, "aot_eager", lambda: ours("aot_eager")),
        Contestant(OURS, "inductor", lambda: ours("inductor")),
    ]


def once(run: Callable[..., tuple[torch.Tensor, ...]], arguments: dict[str, object]) -> torch.Tensor:
    """One forward pass, its output really there: an eager collective may still be on its way when it returns."""
    output = run(**arguments)[0]
    output.flatten()[0].item()
    return output


def traffic(run: Callable[[], object]) -> dict[str, tuple[int, int]]:
    """The collectives that ``run`` really issues: kind -> (number, bytes that this rank sends)."""
    ranks = dist.get_world_size()
    # Per byte of the input: what leaves the rank (an all-reduce is a reduce-scatter and an all-gather).
    sent = {
        "all_to_all_single": (ranks - 1) / ranks,
        "all_gather_into_tensor": ranks - 1,
        "reduce_scatter_tensor": (ranks - 1) / ranks,
        "all_reduce": 2 * (ranks - 1) / ranks,
    }
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        run()
    found: dict[str, tuple[int, int]] = {}
    for event in seen.events() or []:
        namespace, _, kind = event.name.partition("::")
        kind = kind.removesuffix("_out").removesuffix("_coalesced").removesuffix("_")
        if namespace == "_c10d_functional" and kind in sent:
            elements = 1
            for size in event.input_shapes[0]:
                elements *= size
            number, size = found.get(kind, (0, 0))
            found[kind] = number + 1, size + int(4 * elements * sent[kind])
    return found


def prepare(contestant: Contestant, arguments: dict[str, object], reference: torch.Tensor, warmup: int) -> None:
    """Compile, warm up, and compare with one process."""
    dist.barrier()
    if contestant.alone and dist.get_rank() != 0:
        dist.barrier()
        return
    start = time.perf_counter()
    contestant.run = run = contestant.make()
    output = once(run, arguments)
    contestant.warmup = time.perf_counter() - start
    contestant.error = ((output - reference).norm() / reference.norm()).item()
    for _ in range(warmup):
        once(run, arguments)
    if contestant.alone:
        dist.barrier()
    else:
        contestant.traffic = traffic(lambda: once(run, arguments))


def measure(contestants: list[Contestant], arguments: dict[str, object], rounds: int) -> None:
    """Round robin: each contestant once a round."""
    for _ in range(rounds):
        for contestant in contestants:
            dist.barrier()
            sample = torch.zeros(2, dtype=torch.float64)
            if contestant.run is not None:
                start, work = time.perf_counter(), time.process_time()
                once(contestant.run, arguments)
                sample[0], sample[1] = time.perf_counter() - start, time.process_time() - work
            dist.all_reduce(sample, op=dist.ReduceOp.MAX)
            contestant.times.append(sample[0].item())
            contestant.work.append(sample[1].item())


def table(contestants: list[Contestant], attentions: int, bound: int) -> str:
    """One line a contestant."""
    widths = {"": -28, "median": 10, "fastest": 10, "CPU": 10, "first call": 12, "error": 10}
    widths |= {"collectives": 13, "per attention": 15, "bytes sent": 12, "/ bound": 9}
    lines = ["".join(title.rjust(width) if width > 0 else title.ljust(-width) for title, width in widths.items())]
    for c in contestants:
        number = sum(n for n, _ in c.traffic.values())
        exchanges, size = c.traffic.get("all_to_all_single", (0, 0))
        total = sum(b for _, b in c.traffic.values())
        wire = (
            f"{number:13}{exchanges / attentions:15.2f}{total:12}{size / (bound * attentions):9.3f}"
            if number
            else f"{'-':>13}{'-':>15}{'-':>12}{'-':>9}"
        )
        lines.append(
            f"{c.name:28}{c.median * 1e3:7.1f} ms{min(c.times) * 1e3:7.1f} ms"
            f"{statistics.median(c.work) * 1e3:7.1f} ms{c.warmup:10.1f} s{c.error:10.1e}{wire}"
        )
    return "\n".join(lines)


def verdicts(contestants: list[Contestant]) -> str:
    """Ratios of medians, ours to theirs: like against like, and the best of each."""
    by_name = {c.name: c for c in contestants}

    def line(title: str, mine: Contestant | None, other: Contestant | None) -> str | None:
        if mine is None or other is None:
            return None
        ratio = mine.median / other.median
        verdict = "faster" if ratio < 1 else "SLOWER"
        fastest = min(mine.times) / min(other.times)
        return f"{title:23} {mine.name} / {other.name}: {ratio:.3f} {verdict} (of the fastest rounds: {fastest:.3f})"

    def best(family: str) -> Contestant | None:
        return min((c for c in contestants if c.family == family), key=lambda c: c.median, default=None)

    lines = [
        line("eager like eager", by_name.get(f"{OURS}, eager"), by_name.get(f"{HOOKS}, eager")),
        line("compiled like compiled", by_name.get(f"{OURS}, inductor"), by_name.get(f"{HOOKS}, inductor")),
        line("best against best", best(OURS), best(HOOKS)),
        line("against one process", best(OURS), best(ONE)),
    ]
    return "\n".join(text for text in lines if text)


def main() -> None:
    """Parse, measure, print on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=int, default=1024, help="image tokens")
    parser.add_argument("--text", type=int, default=128, help="text tokens")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[""], help="parts of the names of the contestants that run")
    options = parser.parse_args()

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="torch|diffusers")
    diffusers.utils.logging.set_verbosity_error()
    # diffusers divides by the number of accelerators, which is 0 on a machine without one.
    torch.accelerator.device_count = lambda: max(1, torch.cuda.device_count())
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    try:
        model, arguments = build(), inputs(options.image, options.text)
        runners = [c for c in contestants() if any(part in c.name for part in options.only)]
        with torch.no_grad():
            reference = model(**arguments)[0]
            for contestant in runners:
                if rank == 0:
                    print(f"preparing: {contestant.name}", file=sys.stderr, flush=True)
                prepare(contestant, arguments, reference, options.warmup)
            measure(runners, arguments, options.rounds)
        config, attentions = model.config, self_attentions(model)
        elements = (options.image + options.text) * config.num_attention_heads * config.attention_head_dim // ranks
        bound = 4 * elements * 4 * (ranks - 1) // ranks
        if rank == 0:
            print(
                f"Flux {config.num_layers}+{config.num_single_layers} blocks, {config.num_attention_heads} heads of"
                f" {config.attention_head_dim}, {options.image}+{options.text} tokens, float32; torch"
                f" {torch.__version__}, {ranks} gloo processes of one thread, {os.cpu_count()} cores"
                f" (load average {os.getloadavg()[0]:.1f}); medians of {options.rounds} rounds\n"
                f"lower bound of bytes sent per rank and self-attention, 4*N*e*(P-1)/P: {bound}\n"
            )
            print(table(runners, attentions, bound))
            print()
            print(verdicts(runners))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
