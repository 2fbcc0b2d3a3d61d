"""A thread that answers for this rank while its own code computes, or waits in a collective.

It looks at the store of each group once a second: does a rank wait for this one, and has this one gone on without it?
It starts with the first graph that is compiled for several ranks, and ends with the process.
"""

from __future__ import annotations

import atexit
import json
import sys
import threading
from pathlib import Path
from types import FrameType

import torch

from fxsp import torch_internals
from fxsp.ranks.channel import Channel, joined
from fxsp.ranks.meetings import attend

__all__ = ["watch"]

#: Seconds between two looks.
PERIOD = 1.0
_OURS = (str(Path(__file__).resolve().parent), str(Path(torch.__file__).resolve().parent))

_stop = threading.Event()
_started: list[threading.Thread] = []
_lock = threading.Lock()
#: Channels that are not watched any more: their group is destroyed, or their store is gone.
_ended: set[int] = set()


def watch() -> None:
    """Start the thread, unless it runs."""
    with _lock:
        if _started:
            return
        thread = threading.Thread(target=_run, name="fxsp watcher", daemon=True)
        _started.append(thread)
        thread.start()
        atexit.register(_leave)


def _run() -> None:
    while not _stop.wait(PERIOD):
        for channel in joined():
            if id(channel) not in _ended:
                _attend(channel)


def _attend(channel: Channel) -> None:
    group = channel.group()
    try:
        lives = group is not None and torch_internals.group_lives(group)
        channel.seen = channel.seen or lives
        if group is None or (channel.seen and not lives):
            _ended.add(id(channel))
            channel.store.set(f"left/{channel.ranks.rank}", "")
        else:
            answer(channel)
            attend(channel, _place)
    except RuntimeError:  # of the store: the process that holds it has ended
        _ended.add(id(channel))


def answer(channel: Channel) -> None:
    """Answer whoever waits for this rank at the number that it has not said yet."""
    # In this order: a call is counted after what precedes it has been said.
    calls, said = channel.calls, channel.said
    key = f"ask/{said + 1}"
    if channel.store.check([key]):
        question = json.loads(channel.store.get(key))
        place = _place(channel.thread)
        if calls > question["calls"] and channel.said == said:
            theirs, mine = channel.names([question["rank"]]), channel.names([channel.ranks.rank])
            channel.break_with(
                f"{theirs} {question['what']}, and the others do not: {mine} is in call {calls} of compiled graphs, "
                f"of {channel.last}, {place}, where {theirs} had begun {question['calls']}. Every rank must call the "
                "model with the same inputs, and what guards depend on (attributes, flags, modes) must be the same."
            )
        else:
            said_so = f"has begun {calls} calls of compiled graphs, and is {place}"
            channel.store.set(f"state/{said + 1}/{channel.ranks.rank}", said_so)
    channel.is_broken()  # another rank may have given the group up


def _place(thread: int) -> str:
    """The line of the user's code at which a thread is."""
    frame: FrameType | None = sys._current_frames().get(thread)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((*_OURS, "<")) and "/importlib/" not in file:
            return f"at {Path(file).name}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return "outside of Python code of its own"


def _leave() -> None:
    """Say that this rank has ended; before the interpreter is taken down, which no thread may outlive."""
    _stop.set()
    for thread in _started:
        thread.join(timeout=5)
    for channel in joined():
        if id(channel) in _ended:
            continue
        try:
            channel.store.set(f"left/{channel.ranks.rank}", "")
        except RuntimeError:
            continue  # there is nobody to tell: the store is gone
