"""What comparing the inputs of all ranks costs: at the first call of a graph (by default), and at each call.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 examples/check_cost.py        (part of make bench)

A transformer of 12 blocks sees 4,096 tokens.  Digests of its inputs and weights, and their exchange over the store, are
measured beside its forward pass, which is divided by the number of ranks, as it is when it is split.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fxsp.config import Options, resolve_ranks
from fxsp.ranks.channel import channel_of
from fxsp.ranks.checks import value_topics


def transformer(blocks: int, width: int) -> nn.Module:
    """Encoder blocks with heads of 64."""
    layer = nn.TransformerEncoderLayer(width, width // 64, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, blocks, enable_nested_tensor=False)


def seconds(run: Callable[[], object], rounds: int) -> float:
    """The shortest of several runs, after one that does not count."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Print seconds, and the ratio to a rank's part of a forward pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--width", type=int, default=256)
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, x = transformer(arguments.blocks, arguments.width), torch.randn(1, arguments.tokens, arguments.width)
    inputs: list[tuple[str, Tensor]] = [("x", x), *model.named_parameters()]
    ranks = resolve_ranks(Options())
    channel = channel_of(None, ranks)
    assert channel is not None
    with torch.no_grad():
        forward = seconds(lambda: model(x), 2) / ranks.size
    rows = {
        "digests, weights by sample": seconds(lambda: value_topics(inputs, weights_in_full=False), 20),
        "digests, weights in full": seconds(lambda: value_topics(inputs, weights_in_full=True), 5),
        "exchange over the store": seconds(lambda: channel.agree("bench", "measures", {"values": "alike"}), 20),
    }
    if ranks.rank == 0:
        print(f"{arguments.tokens} tokens, {arguments.blocks} blocks of width {arguments.width}, {ranks.size} ranks")
        print(f"{'forward pass of a rank':<28} {1e3 * forward:>10.2f} ms")
        for name, spent in rows.items():
            print(f"{name:<28} {1e3 * spent:>10.2f} ms {100 * spent / forward:>8.3f} % of it")
        first = rows["digests, weights by sample"] + rows["exchange over the store"]
        print(f"{'the first call, by default':<28} {1e3 * first:>10.2f} ms {100 * first / forward:>8.3f} % of it")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
