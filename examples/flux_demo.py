"""A Flux split over processes, and what the compiler did to it.

    torchrun --nproc-per-node 2 examples/flux_demo.py            (make demo)

The model is diffusers' own, with random weights; it brings its plan (``_cp_plan``) and is not modified.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import statistics
import sysconfig
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from flux_model import build, inputs

import fxsp
from fxsp.inspection import format_report


def inner_compiler() -> str:
    """Inductor where it can work: on a CPU it needs a C++ compiler and Python's headers."""
    compiler = any(shutil.which(name) for name in ("g++", "clang++", "c++"))
    headers = Path(sysconfig.get_paths()["include"], "Python.h").exists()
    return "inductor" if compiler and headers else "aot_eager"


def excerpt(graph: str, context: int = 7, width: int = 200) -> str:
    """The lines around the first two exchanges, without the columns that are blank in all of them."""
    lines = graph.splitlines()
    exchanges = [i for i, line in enumerate(lines) if "all_to_all(" in line][:2] or [context]
    first, last = max(1, exchanges[0] - context), min(len(lines), exchanges[-1] + context + 1)
    rows = lines[first:last]
    columns = range(max(len(row) for row in rows))
    blank = [all(row[c : c + 1] in ("", " ") for row in rows) for c in columns]
    kept = [c for c in columns if c < 2 or not (blank[c] and blank[c - 1] and blank[c - 2])]
    shown = ("".join(row[c : c + 1] for c in kept).rstrip() for row in rows)
    cut = [row if len(row) <= width else row[: width - 4] + " ..." for row in shown]
    return "\n".join([lines[0], f"  ... {first - 1} lines", *cut, f"  ... {len(lines) - last} lines"])


def milliseconds(*runs: Callable[[], object], rounds: int = 9) -> list[float]:
    """Medians, of runs that take turns; of each round the slowest rank counts."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, samples in zip(runs, times, strict=True):
            dist.barrier()
            start = time.perf_counter()
            run()
            slowest = torch.tensor(time.perf_counter() - start)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            samples.append(slowest.item() * 1e3)
    return [statistics.median(samples) for samples in times]


def main() -> None:
    """Run, compare, explain; rank 0 prints."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    say = print if rank == 0 else lambda *_, **__: None
    try:
        model, arguments, inner = build(), inputs(), inner_compiler()
        say(f"FluxTransformer2DModel, 1024 image and 128 text tokens, on {ranks} CPU processes, through {inner}\n")
        fast = torch.compile(model, backend="sp", options={"inner": inner, "print": ["partitioned"]})
        with torch.no_grad():
            expected = model(**arguments)[0]
            with contextlib.redirect_stdout(io.StringIO()):  # the whole graph; an excerpt follows
                start = time.perf_counter()
                output = fast(**arguments)[0]
                seconds = time.perf_counter() - start
            error = ((output - expected).norm() / expected.norm()).item()

            report = fxsp.reports()[-1]
            say(format_report(report))
            say("\nthe partitioned graph, around the first attention:\n")
            say(excerpt(report.stages["partitioned"]))

            # On one process: rank 0 works, the others wait for it.
            one, split = milliseconds(lambda: model(**arguments) if rank == 0 else None, lambda: fast(**arguments))
        say(f"\nerror against one process    {error:.1e} (relative)")
        say(f"first call, compiling        {seconds:.1f} s")
        say(f"one process, eager           {one:.1f} ms")
        say(f"{ranks} processes, compiled       {split:.1f} ms, {one / split:.2f} times as fast")
        if not error <= 1e-5:
            raise SystemExit(f"the error is larger than 1e-5: {error:.1e}")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
