"""The exchange on one GPU: each kernel against the copy bandwidth, the whole of it against what one would write.

    python examples/bench_gpu.py            (make bench-gpu)

One GPU plays each of 2, 4 and 8 ranks: it packs what a rank would send, copies the buffer in place of the all-to-all,
and unpacks.  Printed are four tables, in Markdown: kernels, whole exchanges, pads, and operators fused with the pack;
last, a model on two processes that share the GPU is compared with one process.

``--smoke`` runs all of it on a CPU, on tiny tensors and plain operations: nothing is measured then.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from gpu_timing import bytes_of, compiled, copy_seconds, seconds
from torch import Tensor, nn

import fxsp
import fxsp.kernels.ops
from fxsp.kernels import lowering
from fxsp.kernels.exchange import exchange, place

RANKS = (2, 4, 8)
DTYPE = torch.bfloat16
#: What the kernels are to reach of the copy bandwidth.
GOAL = 0.85


@dataclass(frozen=True)
class Shape:
    """The attention of one model: tokens of each segment, heads, head dimension."""

    name: str
    segments: tuple[int, ...]
    heads: int
    width: int

    def local(self, size: int) -> int:
        return sum(-(-n // size) for n in self.segments)


SHAPES = (
    Shape("FLUX.1, 4096 + 512", (512, 4096), 24, 128),
    Shape("Qwen-Image 1328², 6889 + 37", (37, 6889), 24, 128),
    Shape("Wan 14B 480p, 32760", (32760,), 40, 128),
)
TINY = (Shape("tiny, 16 + 5", (5, 16), 8, 8), Shape("tiny, 18", (18,), 8, 8))


class Plain:
    """What the kernels do, in plain operations, for segments that are split."""

    pack_heads, unpack_heads = staticmethod(exchange.pack_heads), staticmethod(exchange.unpack_heads)

    @staticmethod
    def pack_rows(x: Tensor, lengths: list[int], _: Any, size: int, zero_pads: bool, *__: int) -> Tensor:
        return exchange.pack(x, lengths, size, zero_pads)

    @staticmethod
    def unpack_rows(x: Tensor, lengths: list[int], _: Any, size: int, rank: int, dim: int) -> Tensor:
        return exchange.unpack(x, lengths, size).movedim(0, dim)


def kernels(x: Tensor) -> Any:
    """The Triton kernels, or plain operations where there are none."""
    return place.kernels(x, x.shape[-1:]) or Plain


def table(*rows: Sequence[str]) -> None:
    """The first row is the head."""
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + " --- |" * len(rows[0]))
    for row in rows[1:]:
        print("| " + " | ".join(row) + " |")
    print(flush=True)


class Bench:
    """All measurements on one device."""

    def __init__(self, device: str, shapes: Sequence[Shape], ranks: Sequence[int]) -> None:
        self.device, self.shapes, self.ranks = device, shapes, ranks

    def empty(self, *sizes: int) -> Tensor:
        return torch.randn(*sizes, device=self.device, dtype=DTYPE)

    def qkv(self, shape: Shape, size: int) -> list[Tensor]:
        """Views of what one linear layer gives, ``[1, H, L, D]`` each."""
        both = self.empty(1, shape.local(size), 3, shape.heads, shape.width)
        return list(both.permute(2, 0, 3, 1, 4).unbind())

    def cases(self) -> Iterator[tuple[Shape, int]]:
        return ((shape, size) for shape in self.shapes for size in self.ranks)

    # Each kernel.

    def moves(self, shape: Shape, size: int) -> Iterator[tuple[str, Callable[..., Any], Callable[[], Any], int]]:
        """Name, function, its arguments, and bytes of what it moves (read once and written once)."""
        h, n, width = shape.heads // size, shape.local(size), shape.width
        lengths, whole = list(shape.segments), [False] * len(shape.segments)
        total, each = sum(lengths), n * shape.heads * width * 2
        move = kernels(self.empty(1))

        def rows(*sizes: int) -> Callable[[], Any]:
            return lambda: (self.empty(*sizes),)

        yield (
            "pack q, k, v",
            lambda *xs: move.pack_heads(list(xs), n, False, size),
            lambda: self.qkv(shape, size),
            (3 * each),
        )
        yield "unpack heads", lambda x: move.unpack_heads(x, [h], n), rows(size, n, h, width), each
        if len(lengths) > 1:
            yield (
                "unpack k, v",
                lambda x: move.unpack_rows(x.narrow(2, h, 2 * h), lengths, whole, size, 0, 0),
                rows(size, n, 3 * h, width),
                2 * total * h * width * 2,
            )
        yield (
            "pack rows",
            lambda x: move.pack_rows(x, lengths, whole, size, False, 0, size, 0),
            rows(total, 1, h, width),
            size * n * h * width * 2,
        )
        # An activation, gathered along its second dimension.
        yield (
            "un-pad a gather",
            lambda x: move.unpack_rows(x, lengths, whole, size, 0, 1),
            rows(size, n, 2, shape.heads * width // 2),
            total * shape.heads * width * 2,
        )

    def kernels(self) -> list[bool]:
        rows, reached = [], []
        for shape, size in self.cases():
            for name, function, make, moved in self.moves(shape, size):
                took, copy = seconds(function, make, self.device), copy_seconds(moved, self.device)
                reached.append(copy / took >= GOAL)
                speed = 2 * moved / took / 1e9
                rows.append([shape.name, str(size), name, f"{took * 1e6:.1f}", f"{speed:.0f}", f"{copy / took:.0%}"])
        table(["model, tokens", "ranks", "kernel", "µs", "GB/s", "of a copy"], *rows)
        return reached

    # The whole exchange of one attention, without the attention.

    def ours(self, shape: Shape, size: int, fuse: bool) -> Callable[..., Any]:
        """As the compiler writes it: pack, (all-to-all), k and v in order; (all-to-all), heads side by side."""
        h, n, lengths = shape.heads // size, shape.local(size), list(shape.segments)

        def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            received = exchange.pack_heads([q, k, v], n, False, size, fuse).clone()
            queries = received.narrow(2, 0, h)
            keys = received.narrow(2, h, 2 * h)
            ordered = exchange.unpack(keys, lengths, size)
            out = queries.contiguous()
            return ordered.permute(1, 0, 2).unsqueeze(0), exchange.unpack_heads(out.clone(), [h], n, fuse)

        return run

    def by_hand(self, shape: Shape, size: int) -> Callable[..., Any]:
        """Tensor by tensor, as hooks do it: permute, contiguous, (all-to-all), order, and back."""
        h, lengths = shape.heads // size, list(shape.segments)

        def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            got, sent = [], []
            for x in (q, k, v):
                send = x.unflatten(1, (size, h)).permute(1, 3, 0, 2, 4).contiguous()
                sent.append(send)
                received, parts, start = send.clone(), [], 0
                for length in lengths:
                    count = -(-length // size)
                    parts.append(received[:, start : start + count].flatten(0, 1)[:length])
                    start += count
                got.append(torch.cat(parts).permute(1, 2, 0, 3).contiguous())
            back = sent[0].clone()  # the output, with pads
            return torch.cat(got[1:], 1), back.clone().permute(2, 1, 0, 3, 4).flatten(2, 3)

        return run

    def exchanges(self) -> None:
        rows = []
        for shape, size in self.cases():
            ways = (
                self.ours(shape, size, fuse=False),
                compiled(self.ours(shape, size, fuse=True), self.device),
                self.by_hand(shape, size),
            )
            operands = self.qkv(shape, size)
            for way in ways[:2]:  # what is compared is the same
                torch.testing.assert_close(way(*operands), ways[2](*operands), rtol=0, atol=0)
            took = [seconds(way, partial(self.qkv, shape, size), self.device) for way in ways]
            rows.append([shape.name, str(size), *(f"{t * 1e6:.1f}" for t in took), f"{took[2] / took[0]:.2f}"])
        table(
            ["model, tokens", "ranks", "kernels, µs", "Inductor, µs", "permute + contiguous, µs", "speed-up"],
            *rows,
        )

    # What pads cost when there are none: a symbolic length keeps the pass, a known one makes it a view.

    def pads(self) -> None:
        rows = []
        for shape, size in self.cases():
            h, total = shape.heads // size, sum(shape.segments) // size * size
            move = kernels(self.empty(1))

            def packed(x: Tensor, total: int = total, size: int = size, move: Any = move) -> Tensor:
                return move.pack_rows(x, [total], [False], size, False, 0, size, 0)

            def sharded(x: Tensor, total: int = total, size: int = size) -> Tensor:
                return lowering.shard(x, 1, [total], [False], False, 0, size, "")

            def make(total: int = total, h: int = h, width: int = shape.width) -> tuple[Tensor]:
                return (self.empty(total, 1, h, width),)

            def whole(total: int = total, width: int = shape.heads * shape.width) -> tuple[Tensor]:
                return (self.empty(1, total, width),)

            kept = seconds(packed, make, self.device)
            split = seconds(compiled(sharded, self.device), whole, self.device)
            copy = copy_seconds(bytes_of(make()), self.device)
            rows.append([shape.name, str(size), *(f"{t * 1e6:.1f}" for t in (kept, copy, split))])
        table(["model, tokens", "ranks", "output packed, µs", "a copy, µs", "input sharded, µs"], *rows)

    # Norm and rotary embedding, and the pack: apart, or in one.

    def producers(self) -> None:
        rows = []
        for shape, size in self.cases():
            n = shape.local(size)
            move = kernels(self.empty(1))

            def made(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
                def turned(x: Tensor) -> Tensor:
                    x = nn.functional.rms_norm(x, x.shape[-1:])
                    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
                    return x * cos + torch.stack([-b, a], -1).flatten(-2) * sin

                return [turned(q), turned(k), v]

            def fused(*args: Tensor, n: int = n, size: int = size) -> Tensor:
                return exchange.pack_heads(made(*args), n, False, size, fuse=True)

            first = compiled(made, self.device)

            def apart(*args: Tensor, n: int = n, size: int = size, first: Any = first, move: Any = move) -> Tensor:
                return move.pack_heads(first(*args), n, False, size)

            def make(shape: Shape = shape, size: int = size, n: int = n) -> list[Tensor]:
                return [*self.qkv(shape, size), *(self.empty(n, shape.width) for _ in range(2))]

            took = [seconds(way, make, self.device) for way in (compiled(fused, self.device), apart)]
            rows.append([shape.name, str(size), *(f"{t * 1e6:.1f}" for t in took), f"{took[1] / took[0]:.2f}"])
        table(["model, tokens", "ranks", "one pass by Inductor, µs", "then our kernel, µs", "ratio"], *rows)


# A model on two processes.


class Block(nn.Module):
    """Attention with a norm of queries and keys, and a residual."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads, dim = heads, heads * width
        self.qkv, self.out, self.norm = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        y = nn.functional.scaled_dot_product_attention(self.norm(q), self.norm(k), v)
        return x + self.out(y.transpose(1, 2).flatten(2))


def _rank(rank: int, size: int, store: str, device: str, inner: str, errors: Any) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    torch.manual_seed(0)
    model = nn.Sequential(Block(4, 16), Block(4, 16)).to(device)
    plan = {"0": {"x": fxsp.SequenceParallelInput(split_dim=1)}}
    fast = torch.compile(model, backend="sp", options={"plan": plan, "inner": inner})
    worst = 0.0
    for tokens in (64, 63):
        x = torch.randn(2, tokens, 64, device=device)
        pairs = []
        for way in (model, fast):
            out = way(x)
            pairs.append([out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))])
        for a, b in zip(*pairs, strict=True):
            worst = max(worst, ((a - b).norm() / a.norm()).item())
    errors[rank] = worst
    dist.destroy_process_group()


def two_processes(device: str, inner: str) -> float:
    """The largest relative error of outputs and gradients, in fp32."""
    with tempfile.TemporaryDirectory() as folder, mp.get_context("spawn").Manager() as manager:
        errors = manager.dict()
        mp.spawn(_rank, (2, str(Path(folder) / "store"), device, inner, errors), nprocs=2)
        return max(errors.values())


def main() -> int:
    """The exit status: 0 if all is equal, and as fast as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="tiny tensors on a CPU: nothing is measured")
    parser.add_argument("--skip-processes", action="store_true", help="without the model on two processes")
    options = parser.parse_args()
    if not options.smoke and not torch.cuda.is_available():
        sys.exit("bench-gpu measures kernels on a GPU, and torch sees none here (--smoke runs it on a CPU, tiny).")
    device = "cpu" if options.smoke else "cuda"
    name = "no GPU: a smoke test, these are no measurements" if options.smoke else torch.cuda.get_device_name()
    print(f"{dt.date.today()}, {name}, torch {torch.__version__}, bf16\n")
    bench = Bench(device, TINY, RANKS[:1]) if options.smoke else Bench(device, SHAPES, RANKS)
    reached = bench.kernels()
    print(f"{sum(reached)} of {len(reached)} kernels reach {GOAL:.0%} of the copy bandwidth\n")
    bench.exchanges()
    bench.pads()
    bench.producers()
    if not options.skip_processes:
        worst = two_processes(device, "aot_eager" if options.smoke else "inductor")
        print(f"two processes against one, outputs and gradients: relative error {worst:.1e}")
        if not worst <= 1e-5:
            return 1
    return 0 if options.smoke or all(reached) else 1


if __name__ == "__main__":
    sys.exit(main())
