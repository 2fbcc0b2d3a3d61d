"""Collectives outside of compiled graphs: gathers of split values that eager code looks at.

Nothing orders them but the program that runs, so a branch on a number of one rank, or a rank that prints a value alone,
leaves it waiting for the others, or answers for another value.  When all is well such a collective costs no message:
each rank counts those that it has begun, and keeps what the last ones were, with a checksum of all.  Once a second the
watchers of the others compare theirs with those of rank 0, and a difference is an error on all of them.  A rank that
has been in one for a second asks the others, in their store:

- one that has begun the collective of this number for something else, or that has begun more calls of compiled graphs
  and not this collective, is elsewhere: the group is lost, with an error on both sides that names them;
- one that has ended is named, too;
- one that is late is waited for, with a word on standard error after ten seconds.
"""

from __future__ import annotations

import json
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fxsp import torch_internals
from fxsp.errors import RanksApartError
from fxsp.ranks.channel import WORD, Channel, joined, say
from fxsp.types import Ranks

__all__ = ["Meetings", "attend", "met"]

#: Seconds after which a rank that is in a collective asks the others.
_ASKS = 1.0
#: Collectives that a rank remembers, and those that rank 0 tells of.
_KEPT, _TOLD = 256, 16


class _Met(NamedTuple):
    """One collective: what it was, and a checksum of it and all before it."""

    number: int
    what: str
    checksum: int


@dataclass(eq=False)
class Meetings:
    """The collectives of one rank of a group."""

    channel: Channel
    #: How many were begun, and what the last ones were.
    begun: int = 0
    last: deque[_Met] = field(default_factory=lambda: deque(maxlen=_KEPT))
    checksum: int = 0
    #: When the one began that is under way, by its number.
    since: tuple[int, float] | None = None
    #: The numbers that the others were asked about, and told of; when there is another word to say.
    asked: int = 0
    told: int = 0
    word: float = 0.0

    def begin(self, what: str) -> None:
        self.begun += 1
        self.checksum = zlib.crc32(what.encode(), self.checksum)
        self.last.append(_Met(self.begun, what, self.checksum))
        self.since = self.begun, time.monotonic()

    def find(self, number: int) -> _Met | None:
        """The collective of a number; None: it is forgotten, or was not begun."""
        return next((known for known in tuple(self.last) if known.number == number), None)


_known: dict[Ranks, Meetings | None] = {}


def _of(channel: Channel) -> Meetings:
    return torch_internals.keep(channel, lambda: Meetings(channel))


def _among(ranks: Ranks) -> Meetings | None:
    known = _known.get(ranks)
    if known is None or not torch_internals.group_lives(known.channel.group()):
        channel = next((c for c in reversed(joined()) if c.ranks == ranks), None)
        known = _known[ranks] = None if channel is None else _of(channel)
    return known


@contextmanager
def met(ranks: Ranks, what: str) -> Iterator[None]:
    """Around a collective that all ``ranks`` begin; ``what`` tells a person which, and is the same on all of them.

    Raises :class:`~fxsp.errors.RanksApartError` where it fails because another rank is elsewhere.
    """
    meetings = _among(ranks)
    if meetings is None:
        yield
        return
    channel = meetings.channel
    channel.check()
    meetings.begin(what)
    try:
        yield
    except RuntimeError as error:
        if torch_internals.is_collective_error(error) and channel.is_broken():
            raise RanksApartError(channel.fault) from error
        raise
    finally:
        meetings.since = None


def attend(channel: Channel, place: Callable[[int], str]) -> None:
    """Ask for this rank, and answer the others; called by the watcher, once a second."""
    meetings = _of(channel)
    _ask(meetings)
    _compare(meetings)
    if channel.store.check(["meet"]):
        _answer(meetings, json.loads(channel.store.get("meet")), place)


_RULE = "All ranks must look at the same split values, in the same order: a collective is needed to show them."


def _compare(meetings: Meetings) -> None:
    """Rank 0 tells which collectives it has begun; the others compare."""
    channel = meetings.channel
    if channel.ranks.rank == 0:
        if meetings.last and meetings.told != meetings.begun:
            meetings.told = meetings.begun
            channel.store.set("met", json.dumps(list(meetings.last)[-_TOLD:]))
        return
    if not channel.store.check(["met"]):
        return
    told = [_Met(*row) for row in json.loads(channel.store.get("met"))]
    mine = [meetings.find(row.number) for row in told]
    pairs = [
        (row, own) for row, own in zip(told, mine, strict=True) if own is not None and own.checksum != row.checksum
    ]
    if pairs:
        row, own = next((pair for pair in pairs if pair[0].what != pair[1].what), pairs[0])
        me = channel.names([channel.ranks.rank])
        channel.break_with(f"{channel.names([0])} {row.what}, and {me} {own.what}. {_RULE}")


def _ask(meetings: Meetings) -> None:
    channel, since, now = meetings.channel, meetings.since, time.monotonic()
    me = channel.ranks.rank
    if since is None or now - since[1] < _ASKS:
        if meetings.asked and (since is None or since[0] != meetings.asked):  # the one that was asked about has ended
            meetings.asked = 0
            if channel.store.check(["meet"]) and json.loads(channel.store.get("meet"))["rank"] == me:
                channel.store.delete_key("meet")
        return
    number, began = since
    known = meetings.find(number)
    what = known.what if known is not None else "is in a collective"
    if meetings.asked != number:
        meetings.asked, meetings.word = number, WORD
        question = {"rank": me, "number": number, "what": what, "calls": channel.calls}
        channel.store.set("meet", json.dumps(question))
    others = [rank for rank in range(channel.ranks.size) if rank != me]
    left = [rank for rank in others if channel.store.check([f"left/{rank}"])]
    if left:
        channel.break_with(f"{channel.names(left)} ended while {channel.names([me])} {what} and waits for all ranks.")
    elif now - began >= meetings.word:
        meetings.word += WORD
        places = [channel.store.get(key).decode() for r in others if channel.store.check([key := f"met/{number}/{r}"])]
        say(f"{channel.names([me])} {what}, and has waited {now - began:.0f} s for the others. {' '.join(places)}")


def _answer(meetings: Meetings, question: dict[str, Any], place: Callable[[int], str]) -> None:
    channel, number = meetings.channel, question["number"]
    me, calls = channel.ranks.rank, channel.calls
    if question["rank"] == me:
        return
    theirs, mine = channel.names([question["rank"]]), channel.names([me])
    here = f"{mine} is {place(channel.thread)}"
    known = meetings.find(number)
    if known is not None and known.what != question["what"]:
        channel.break_with(f"{theirs} {question['what']}, and {mine} {known.what}. {_RULE}")
    elif number > meetings.begun and calls > question["calls"]:
        channel.break_with(
            f"{theirs} {question['what']}, and {mine} did not: it is in call {calls} of compiled graphs, of "
            f"{channel.last}. {_RULE}"
        )
    elif number > meetings.begun:
        channel.store.set(f"met/{number}/{me}", f"{here}.")
