"""What the ranks of a group tell each other apart from their collectives: over the store that the group was made with.

A rank that compiles must be able to speak to one that does not: a collective would be taken for one of the graph that
the other rank is running.  So every rank numbers what it says, :meth:`Channel.exchange` waits until all have said the
same number, and nothing of it touches the group.  While a rank waits, the watchers of the others (a thread each, see
:mod:`fxsp.ranks.watcher`) answer for them:

* a rank that is late (it loads data, traces, compiles) is waited for, until the timeout of the group, with a word on
  standard error;
* a rank that has begun more calls of compiled graphs than those that wait had begun is past the place, and will not
  come: an error on both sides;
* so is one that has ended.

Between exchanges a call costs one addition and one comparison: no message, and no synchronization with the host.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch.utils.weak import WeakIdKeyDictionary

from fxsp import torch_internals
from fxsp.errors import FxspWarning, InputMismatchError, RanksApartError
from fxsp.source import warn
from fxsp.types import Ranks

__all__ = ["Channel", "Message", "channel_of", "joined"]

#: Seconds of waiting after which the others are asked what they do, and between two words on standard error.
PATIENCE, WORD = 1.0, 10.0
#: Seconds between two looks at the store, at first and at most.
_SHORT, _LONG = 0.0005, 0.1


@dataclass(frozen=True)
class Message:
    """What one rank says at one number.

    ``kind`` is what all ranks are about to do ("compile", "values", ...), ``what`` tells it to a person, ``digests``
    are fixed-size digests of what must be the same everywhere, by topic.
    """

    kind: str
    what: str
    digests: dict[str, str] = field(default_factory=dict)
    #: Calls of compiled graphs that the rank had begun before.
    calls: int = 0
    #: The text behind some of the digests, where they differ.
    details: dict[str, str] = field(default_factory=dict)

    def encoded(self) -> str:
        return json.dumps(self.__dict__)

    @staticmethod
    def decoded(data: bytes) -> Message:
        return Message(**json.loads(data))


class Channel:
    """One rank's end.  Exchanges are for one thread at a time; the watcher reads beside it."""

    def __init__(self, group: Any, ranks: Ranks, store: Any) -> None:
        self.ranks = ranks
        self.group = weakref.ref(group)
        self.members: list[int] = dist.get_process_group_ranks(group)
        self.timeout = torch_internals.group_timeout(group)
        name = hashlib.sha256(repr((ranks.group, self.members)).encode()).hexdigest()[:16]
        # A group of this name may have lived in this store before: each rank counts how often it joined.
        times = store.add(f"fxsp/{name}/joined/{ranks.rank}", 1)
        self.store = dist.PrefixStore(f"fxsp/{name}/{times}", store)
        #: Numbers that this rank has said, and calls of compiled graphs that it has begun.
        self.said = 0
        self.calls = 0
        #: The thread that exchanges, and the last call, for those who ask.
        self.thread = threading.get_ident()
        self.last = ""
        #: Whether the watcher has seen the group (a group that belongs to one thread only, it does not see).
        self.seen = False
        #: Why this group can't go on, once it can't.
        self.fault = ""
        self._lock = threading.RLock()

    # --- what the compiler says ---------------------------------------------------------------------------------------

    def agree(self, kind: str, what: str, topics: dict[str, str]) -> None:
        """Return once all ranks have said the same; else raise the same :class:`InputMismatchError` on each of them."""
        with self._lock:
            digests = {topic: hashlib.sha256(text.encode()).hexdigest()[:16] for topic, text in topics.items()}
            everyone = self.exchange(Message(kind, what, digests))
            failed = [r for r, message in enumerate(everyone) if message.kind == "failed"]
            if failed:
                raise RanksApartError(
                    f"{self.names(failed)} failed where the others did not: {everyone[failed[0]].what}\n"
                    f"  This is {self.names([self.ranks.rank])}, which {what}."
                )
            apart = {(message.kind, *sorted(message.digests)) for message in everyone}
            if len(apart) > 1:
                raise InputMismatchError(self._other_graphs(everyone))
            topics_apart = [t for t in topics if any(m.digests[t] != everyone[0].digests[t] for m in everyone)]
            if not topics_apart:
                return
            # Another graph is what other inputs and modes lead to: it is told only where nothing else is.
            causes = [topic for topic in topics_apart if topic not in ("graph", "program")] or topics_apart
            details = {topic: topics[topic] for topic in causes}
            told = self.exchange(Message("details", what, {}, details=details))
            text = "\n".join(
                difference(topic, [message.details.get(topic, "") for message in told], self) for topic in causes
            )
            others = [r for r, m in enumerate(everyone) if any(m.digests[t] != everyone[0].digests[t] for t in causes)]
            alike = all(m.what == what for m in everyone)
            raise InputMismatchError(
                f"{' and '.join(causes)} differ between rank 0 and ranks {others}"
                f"{f', where each {what}' if alike else f'; {self.names([self.ranks.rank])} {what}'}:\n{text}\n"
                "  Every rank must call the model with the same inputs, weights and options: seed random inputs alike, "
                "broadcast them, or give data parallelism a group of its own (option 'group' or 'mesh')."
            )

    def failed(self, error: BaseException) -> None:
        """Say, in place of what the others will say next, that this rank has failed."""
        with self._lock:
            text = str(error).strip().split("\n")
            self._say(Message("failed", f"{type(error).__name__}: {text[0][:500] if text else ''}"))

    def _other_graphs(self, everyone: Sequence[Message]) -> str:
        first = everyone[0]
        others = [r for r, m in enumerate(everyone) if (m.kind, m.what) != (first.kind, first.what)]
        others = others or [r for r, m in enumerate(everyone) if sorted(m.digests) != sorted(first.digests)]
        lines = "\n".join(f"  {self.names([r])} {message.what}" for r, message in enumerate(everyone))
        return (
            f"ranks {others} run another graph than rank 0, so the shapes of their inputs, or values that are no "
            f"tensors, differ:\n{lines}\n  Every rank must call the model with the same inputs."
        )

    # --- one number ---------------------------------------------------------------------------------------------------

    def exchange(self, message: Message) -> list[Message]:
        """The messages of all ranks at the next number, by rank.

        Raises :class:`RanksApartError` if one will not come: it is past this place, it has ended, or the timeout of
        the group is over.
        """
        with self._lock:
            self.check()
            message = self._say(message)
            keys = [self._key(r) for r in range(self.ranks.size)]
            start, looked, word, pause = time.monotonic(), PATIENCE, WORD, _SHORT
            while not self._has(keys):
                waited = time.monotonic() - start
                if waited >= looked:
                    looked = waited + PATIENCE / 2
                    absent = [r for r, key in enumerate(keys) if not self.store.check([key])]
                    self._look(message, absent, waited)
                    if waited >= word and absent:
                        word += WORD
                        self._tell(message, absent, waited)
                time.sleep(pause)
                pause = min(1.5 * pause, _LONG)
            everyone = [Message.decoded(data) for data in self.store.multi_get(keys)]
            if self.said > 1:  # all have said this number, so all have read the one before
                self.store.delete_key(self._key(self.ranks.rank, self.said - 1))
            return everyone

    def _has(self, keys: list[str]) -> bool:
        try:
            return bool(self.store.check(keys))
        except RuntimeError as error:
            raise RanksApartError(
                f"the store of the process group is gone: the process that holds it (most often rank 0) has ended, and "
                f"{self.names([self.ranks.rank])} cannot hear of the others ({error})"
            ) from error

    def check(self) -> None:
        """Raise the error that made the group useless, if one did."""
        if self.fault:
            raise RanksApartError(self.fault)

    def _say(self, message: Message) -> Message:
        message = Message(message.kind, message.what, message.digests, self.calls, message.details)
        self.thread = threading.get_ident()
        self.said += 1
        self.store.set(self._key(self.ranks.rank), message.encoded())
        return message

    def _key(self, rank: int, number: int | None = None) -> str:
        return f"{self.said if number is None else number}/{rank}"

    def _look(self, message: Message, absent: list[int], waited: float) -> None:
        """Ask those who are absent, and raise if one of them cannot come."""
        if self.store.check(["fault"]):
            self._lose(self.store.get("fault").decode())
        elif absent:
            self.ask(message)
            left = [r for r in absent if self.store.check([f"left/{r}"])]
            if left:
                self.break_with(
                    f"{self.names(left)} ended, or destroyed the process group, while "
                    f"{self.names([self.ranks.rank])} {message.what} and waits for all ranks."
                )
            elif waited > self.timeout:
                self.break_with(
                    f"{self.names(absent)} did not come in {waited:.0f} s (the timeout of the group) to where "
                    f"{self.names([self.ranks.rank])} {message.what}.\n{self._what_they_do(absent)}"
                )
        self.check()

    def ask(self, message: Message) -> None:
        """Leave a question for the watchers of those who have not said this number."""
        key = f"ask/{self.said}"
        if not self.store.check([key]):
            question = {"rank": self.ranks.rank, "calls": message.calls, "what": message.what}
            self.store.set(key, json.dumps(question))

    def break_with(self, text: str) -> None:
        """Tell all ranks that this group can't go on."""
        try:
            if self.store.check(["fault"]):
                text = self.store.get("fault").decode()
            else:
                self.store.set("fault", text)
        except RuntimeError:  # the rank that holds the store has ended
            text = self.fault or text
        self._lose(text)

    def _lose(self, text: str) -> None:
        """Give the group up: whoever waits in one of its collectives, here or elsewhere, gets an error now."""
        known, self.fault = bool(self.fault), text
        if not known and threading.get_ident() != self.thread:  # the thread that computes raises it
            say(f"{self.names([self.ranks.rank])} can't go on: {text}\n  {self.outlook()}")
        torch_internals.close_connections(self.group())

    def outlook(self) -> str:
        """What comes of a lost group, for those who wait in one of its collectives."""
        group = self.group()
        if group is not None and torch_internals.has_gloo(group):
            return "Its connections are closed: a rank that waits in a collective gets an error now."
        return (
            f"A rank that waits in a collective gets an error when the timeout of the group ends, {self.timeout:.0f} s."
        )

    def _tell(self, message: Message, absent: list[int], waited: float) -> None:
        say(
            f"{self.names([self.ranks.rank])} {message.what}, and has waited {waited:.0f} s for "
            f"{self.names(absent)}; it gives up after {self.timeout:.0f} s.\n{self._what_they_do(absent)}"
        )

    def _what_they_do(self, absent: list[int]) -> str:
        lines = []
        for r in absent:
            key = f"state/{self.said}/{r}"
            state = self.store.get(key).decode() if self.store.check([key]) else ""
            state = state or "does not answer: it has compiled nothing with this group yet, is stopped, or was killed"
            lines.append(f"  {self.names([r])} {state}")
        return "\n".join(lines)

    def names(self, ranks: Sequence[int]) -> str:
        """Ranks of the group as a person knows them."""
        text = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {list(ranks)}"
        if self.members == list(range(len(self.members))):
            return text
        others = [self.members[r] for r in ranks]
        return f"{text} of the group (global {others[0] if len(others) == 1 else others})"

    # --- calls --------------------------------------------------------------------------------------------------------

    def is_broken(self) -> bool:
        """Whether a rank went astray, asked of the store."""
        try:
            if not self.fault and self.store.check(["fault"]):
                self._lose(self.store.get("fault").decode())
        except RuntimeError:  # the rank that holds the store has ended
            return bool(self.fault)
        return bool(self.fault)


def difference(topic: str, texts: Sequence[str], channel: Channel) -> str:
    """What distinguishes the ranks in one topic, line by line, with the ranks that say it."""
    lines = [text.split("\n") for text in texts]
    length = max(map(len, lines))
    rows = [[each[i] if i < len(each) else "(nothing)" for each in lines] for i in range(length)]
    apart = [row for row in rows if len(set(row)) > 1]
    shown = []
    for row in apart[:4]:
        values: dict[str, list[int]] = {}
        for rank, value in enumerate(row):
            values.setdefault(value, []).append(rank)
        said = ", ".join(f"{channel.names(ranks)} has {value}" for value, ranks in values.items())
        shown.append(f"  {topic}: {said}")
    return "\n".join(shown) + (f"\n  and {len(apart) - 4} more of {topic}" if len(apart) > 4 else "")


def say(text: str) -> None:
    """A word on standard error: it must be read although the process hangs, and whatever logs are set to."""
    sys.stderr.write(f"fxsp: {text}\n")
    sys.stderr.flush()


# --- the channels of this process -------------------------------------------------------------------------------------

_channels: Any = WeakIdKeyDictionary()
_lock = threading.Lock()


def channel_of(group: Any, ranks: Ranks) -> Channel | None:
    """The channel of a group (None: the default one); None if it has one rank, or no store.

    Every rank of a group calls it at the same place for the first time.
    """
    if ranks.size == 1:
        return None
    group = dist.group.WORLD if group is None else group
    with _lock:
        if group not in _channels:
            store = torch_internals.group_store(group)
            if store is None and dist.get_backend(group) != "fake":
                text = (
                    f"the process group {ranks.group} has no store: whether its {ranks.size} ranks compile and call "
                    "the same is not compared"
                )
                warn(FxspWarning(text), first=ranks.rank == 0)
            _channels[group] = None if store is None else Channel(group, ranks, store)
        found: Channel | None = _channels[group]
    return found


def joined() -> list[Channel]:
    """The channels of the groups that still exist."""
    with _lock:
        return [channel for channel in _channels.values() if channel is not None]
