"""What partitioning costs: a whole FLUX.1-dev transformer, without weights, for few and for many ranks.

    python examples/compile_cost.py            (part of make bench)

The model has its real size (19 + 38 blocks, 24 heads of 128) on the meta device.  Everything of ours, from Dynamo's
graph to the partitioned one (with every stage printed), and all of ``fxsp.explain``, tracing included, are compared
with Dynamo's own trace in the same run.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch
import torch._dynamo
from diffusers import FluxTransformer2DModel

import fxsp


def main() -> None:
    """Trace and partition; print seconds, nodes and peak memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 8, 512])
    parser.add_argument("--blocks", type=int, nargs=2, default=[19, 38], help="double and single blocks")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            num_layers=arguments.blocks[0], num_single_layers=arguments.blocks[1], guidance_embeds=True
        )
        inputs = {
            "hidden_states": torch.empty(1, 4096, 64),
            "encoder_hidden_states": torch.empty(1, 512, 4096),
            "pooled_projections": torch.empty(1, 768),
            "timestep": torch.empty(1),
            "guidance": torch.empty(1),
            "img_ids": torch.empty(4096, 3),
            "txt_ids": torch.empty(512, 3),
            "return_dict": False,
        }
    print(
        f"{'ranks':>6} {'dynamo s':>9} {'ours s':>7} {'ratio':>6} {'explain':>8}   normalize, types, local, attention"
    )
    for ranks in arguments.ranks:
        torch._dynamo.reset()
        start = time.perf_counter()
        with torch.no_grad():
            explanation = fxsp.explain(model, world_size=ranks, **inputs)
        everything = time.perf_counter() - start
        (result,) = explanation.results
        start = time.perf_counter()
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(model, backend=lambda gm, _: gm.forward)(**inputs)
        dynamo = time.perf_counter() - start
        stages = ", ".join(
            f"{result.report.timings[s]:.2f}" for s in ("normalize", "propagate", "partition", "device_memory")
        )
        ratios = f"{result.seconds / dynamo:>6.2f} {everything / dynamo:>8.2f}"
        print(f"{ranks:>6} {dynamo:>9.2f} {result.seconds:>7.2f} {ratios}   {stages} s")
        assert result.program is not None
        print(f"{'':>6} {len(result.program.graph.nodes)} nodes, {len(result.report.attentions)} attentions")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory {peak:.2f} GiB")


if __name__ == "__main__":
    main()
