"""Which of the legal ways to run an attention is taken: the cheapest, unless degrees are given.

Each method says its ways and their costs (:mod:`fxsp.passes.attention.methods`); heads are never padded.

* Where heads divide over the ranks they are exchanged (in attention of tokens to themselves), unless another way takes
  at most three quarters of the time: after an exchange a rank holds keys and values of its own heads only.
* A causal attention whose heads divide is always exchanged: a kernel that knows the causal flag skips half of the work,
  and on a rank's own queries the flag would have to become a mask.  Where the machine is known, the work of the busiest
  rank is priced instead (:mod:`fxsp.passes.attention.busiest`).
* Where key/value heads do not divide but query heads do, they may be repeated before the exchange; otherwise heads are
  exchanged within a ring, or go around a ring, or keys and values are gathered.
* Keys and values are not gathered if they are more than ``gather_limit`` bytes, as long as there is another way.
"""

from __future__ import annotations

from dataclasses import replace

from fxsp.lengths import hint
from fxsp.passes.attention.busiest import computing
from fxsp.passes.attention.cost import Way
from fxsp.passes.attention.degrees import asked_of
from fxsp.passes.attention.methods import METHODS
from fxsp.passes.attention.question import Question

__all__ = ["GATHER_LIMIT", "choose"]

#: Bytes of keys and values of one attention that a rank may hold gathered, where there is another way.
GATHER_LIMIT = 2**30


def choose(question: Question) -> tuple[Way | None, tuple[tuple[str, str], ...], str]:
    """The way that is taken, the others with their costs or why they are not legal, and the cost of the one taken.

    None if no way is legal.
    """
    program = question.program
    machine = program.options.machine_for(question.like.device.type, question.size)
    ways = [way for method in METHODS.values() for way in method.ways(question)]
    _, wanted = asked_of(program.degrees)
    at = next((i for i, w in enumerate(ways) if w.method == wanted and w.ring == program.degrees.ring), None)
    ways = [way if i == at else _limited(question, way, ways) for i, way in enumerate(ways)]
    asked = None if at is None else ways[at]
    legal = [way for way in ways if not way.refusal]
    best: Way | None = None
    note = ""
    if asked is not None and not asked.refusal:
        best = asked
    elif legal:
        seconds = [way.seconds(machine) + computing(question, way, machine) for way in legal]
        first = min(range(len(legal)), key=lambda i: (seconds[i], legal[i].messages))
        best, least = legal[first], seconds[first]
        for way, took in zip(legal, seconds, strict=True):
            if way.margin is not None and not (way.margin and least <= way.margin * took):
                best, least = way, took
        if asked is not None:
            note = f"{asked.name} was asked for, but {asked.refusal}"
    rejected = tuple((way.name, way.text(machine)) for way in ways if way is not best)
    return best, rejected, "; ".join(filter(None, (best.cost(machine), best.note, note))) if best is not None else ""


def _limited(question: Question, way: Way, ways: list[Way]) -> Way:
    """Gathered keys and values are refused where they are too many, and there is another way."""
    given = question.program.options.gather_limit
    limit = GATHER_LIMIT if given is None else given
    if way.refusal or hint(way.held) <= limit or all(other.refusal for other in ways if other is not way):
        return way
    held = f"{way.held} bytes of keys and values would be on every rank, more than gather_limit={limit}"
    return replace(way, refusal=held)
