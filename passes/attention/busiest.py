"""What the busiest rank computes in a causal or windowed attention: the ways to run one differ in it.

========== ================================================= =========================================================
method     pairs of a query and a key, per head              heads of a rank
========== ================================================= =========================================================
ulysses    half of all: the kernel knows the causal flag;    H / P
           with a window, blocks of rows and what they see
ring       of the busiest place: blocks that nothing looks   H
           at are skipped, heads and tails are dealt
hybrid     the same                                          H / u
gather_kv  a rank's rows with all keys: the flag became a    H
           mask
========== ================================================= =========================================================

It counts where the machine is known, by its rate; without one bytes decide.  Every other attention is the same work in
whatever way it runs.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from fxsp.kernels.attention.banded import blocks
from fxsp.kernels.attention.ring_blocks import pairs_of
from fxsp.lengths import hint
from fxsp.machine import Machine
from fxsp.passes.attention.cost import Way
from fxsp.passes.attention.question import Question

__all__ = ["computing"]


def computing(question: Question, way: Way, machine: Machine) -> float:
    """Seconds in which the busiest rank computes, where ways differ in it; in training, a step of it."""
    queries, keys = question.queries, question.keys
    if not question.causal or queries is None or keys is None or not queries.same_as(keys):
        return 0.0
    if not isinstance(question.program.options.machine, Machine):
        return 0.0
    batch, heads, rows = (hint(n) for n in (question.q[0], question.q[-3], question.q[-2]))
    if way.ring > 1:
        tokens = tuple(map(hint, queries.lengths)), tuple(queries.whole), tuple(map(hint, queries.units))
        pairs = _busiest(tokens, tuple(s.sharded for s in queries.segments), way.ulysses, way.ring, question.window)
    elif way.ulysses > 1:
        pairs = rows * (rows + 1) // 2
        if question.window is not None:
            here = blocks(rows, rows, True, question.window)
            pairs = sum((stop - start) * (last - first) for start, stop, first, last in here)
    else:
        pairs = hint(queries.local_length(question.size)) * rows
    # Two products, a multiplication and an addition each; twice that in the backward pass.
    operations = 2 * batch * -(-heads // way.ulysses) * pairs * (hint(question.q[-1]) + hint(question.v[-1]))
    return (3 if question.program.training else 1) * operations / machine.device.flops


@lru_cache(maxsize=1024)
def _busiest(tokens: Any, sharded: tuple[bool, ...], ulysses: int, ring: int, window: int | None) -> int:
    """Pairs of the place that has most, in the better of the two layouts."""
    lengths, whole, units = tokens
    layouts = [(lengths, whole, dealt, units) for dealt in ((False,) * len(sharded), sharded)]
    return min(max(pairs_of(t, t, True, ulysses, ring, place, window) for place in range(ring)) for t in layouts)
