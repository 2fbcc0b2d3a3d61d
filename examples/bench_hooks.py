"""What hooks cost: a module with a registry of one pass-through hook, beside PyTorch's own forward hooks.

    python examples/bench_hooks.py            (part of make bench)

One process on a CPU.  The module does almost nothing, so what is left is the way in and out; the ways are timed in
turns, and the smallest of many rounds counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fxsp.hooks.base import HookRegistry, ModelHook


class Small(nn.Module):
    """A forward that costs next to nothing."""

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """``x`` as it is."""
        return x


class PassThrough(ModelHook):
    """Both methods overridden, neither changes anything."""

    def pre_forward(
        self, module: nn.Module, *args: object, **kwargs: object
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        """The arguments."""
        return args, kwargs

    def post_forward(self, module: nn.Module, output: object) -> object:
        """The output."""
        return output


def plain() -> nn.Module:
    """No hooks."""
    return Small()


def torch_hooks() -> nn.Module:
    """PyTorch's own: one before and one after forward, with keyword arguments."""
    module = Small()
    module.register_forward_pre_hook(lambda module, args, kwargs: (args, kwargs), with_kwargs=True)
    module.register_forward_hook(lambda module, args, kwargs, output: output, with_kwargs=True)
    return module


def registry(hooks: int = 1) -> nn.Module:
    """A registry of ``hooks`` hooks."""
    module = Small()
    own = HookRegistry.get_or_create(module)
    for i in range(hooks):
        own.register_hook(f"hook {i}", PassThrough())
    return module


WAYS: dict[str, Callable[[], nn.Module]] = {
    "no hooks": plain,
    "torch: a pre and a forward hook": torch_hooks,
    "registry without hooks": lambda: registry(0),
    "registry, one hook": registry,
    "registry, three hooks": lambda: registry(3),
}


def measure(calls: int, rounds: int) -> dict[str, float]:
    """Nanoseconds of one call, for each way."""
    x, scale = torch.zeros(1), torch.ones(1)
    modules = {name: build() for name, build in WAYS.items()}
    best = dict.fromkeys(modules, float("inf"))
    for module in modules.values():
        module(x, scale=scale)
    for _ in range(rounds):
        for name, module in modules.items():
            start = time.perf_counter_ns()
            for _ in range(calls):
                module(x, scale=scale)
            best[name] = min(best[name], (time.perf_counter_ns() - start) / calls)
    return best


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Print the table; returns nanoseconds by way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000, help="calls of a round")
    parser.add_argument("--rounds", type=int, default=30)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = measure(given.calls, given.rounds)
    base = found["no hooks"]
    print(f"{'a call of a module, eager':<34} {'us':>7} {'overhead us':>12}")
    for name, nanoseconds in found.items():
        print(f"{name:<34} {nanoseconds / 1e3:>7.2f} {(nanoseconds - base) / 1e3:>12.2f}")
    ours, theirs = (found[name] - base for name in ("registry, one hook", "torch: a pre and a forward hook"))
    print(f"one hook in a registry costs {ours / theirs:.1f} times what a pre and a forward hook of PyTorch cost")
    return found


if __name__ == "__main__":
    main()
