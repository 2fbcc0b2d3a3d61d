"""A rank that fails inside a compiled graph, and the others, which wait for it in a collective.

The collectives of a graph come in one order, on all ranks.  A rank that raises between two of them is out of step: the
others wait for it as long as the timeout of the group allows (gloo: 30 minutes), and if its caller catches the error
and goes on, its next message answers a collective of another call, with a wrong result and no word.  Hence:

- It tells the others, over the store.  If all fail in the same call within :data:`GRACE` seconds, as an assertion on
  whole values does, they are in step: each has its own error, and nothing else happens.
- If not, the group is lost: the connections are closed (gloo), so that whoever waits in a collective gets an error at
  once, one that quotes the first.  Compiled graphs do not run on this group again.

A collective that fails (a rank ended, or did not answer within the timeout) loses the group in the same way.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

from fxsp import torch_internals
from fxsp.errors import FxspError, RanksApartError
from fxsp.ranks.channel import Channel

__all__ = ["GRACE", "guarded"]

#: Seconds that the others have to fail in the same call.
GRACE = 10.0
#: Seconds in which a rank whose collective failed hears why.
WORD = 1.0


def guarded(run: Callable[..., Any], channel: Channel, graph: str) -> Callable[..., Any]:
    """``run``, with its calls counted, so that a rank that fails in it, or in its backward pass, is an error on all."""

    def watch(run: Callable[..., Any], graph: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if channel.fault:
                channel.check()
            channel.calls += 1
            channel.last = graph
            try:
                return run(*args)
            except BaseException as error:
                _fail(channel, error, graph)
                raise

        return call

    forward = watch(run, graph)
    backward_is_watched = False

    def call(*args: Any) -> Any:
        nonlocal backward_is_watched
        results = forward(*args)
        if not backward_is_watched:
            backward_is_watched = torch_internals.wrap_backward(
                results, lambda run: watch(run, f"the backward pass of {graph}")
            )
        return results

    return call


@dataclass(frozen=True)
class _Failure:
    """In which call a rank failed, whether it was a collective that did, and what the error said."""

    call: int
    of_collective: bool
    said: str


def _fail(channel: Channel, error: BaseException, graph: str) -> None:
    """``error`` ended a call of a graph on this rank; returns once it is known what the others do.

    Raises :class:`RanksApartError` in its place where ``error`` is that of a collective.
    """
    if isinstance(error, FxspError):
        return  # these are raised on all ranks
    first = str(error).strip().partition("\n")[0]
    mine = _Failure(channel.calls, torch_internals.is_collective_error(error), f"{type(error).__name__}: {first[:500]}")
    me = channel.names([channel.ranks.rank])
    if mine.of_collective:
        if not channel.is_broken():
            heard = _tell(channel, mine, WORD)
        if not channel.is_broken():
            causes = [f"{channel.names([r])} failed: {f.said}" for r, f in heard.items() if not f.of_collective]
            silent = [rank for rank in range(channel.ranks.size) if rank not in (channel.ranks.rank, *heard)]
            if silent and not causes:
                causes = [f"nothing is heard of {channel.names(silent)}, which ended, was stopped, or is elsewhere"]
            where = f"a collective of {graph} failed on {me} in call {mine.call} of compiled graphs"
            channel.break_with("\n  ".join([f"{where}: {error}", *causes]))
        raise RanksApartError(channel.fault) from error
    began = time.monotonic()
    # An interrupt is not waited with.
    heard = _tell(channel, mine, GRACE if isinstance(error, Exception) else 0.0)
    others = [rank for rank in range(channel.ranks.size) if rank != channel.ranks.rank]
    apart = [rank for rank in others if rank not in heard or heard[rank].call != mine.call]
    if not apart:
        return  # all of them raise
    channel.break_with(
        f"{me} failed in call {mine.call} of compiled graphs, of {graph}, and {channel.names(apart)} did not within "
        f"{time.monotonic() - began:.0f} s, so they are out of step. The error: {mine.said}"
    )
    error.add_note(f"fxsp: this is {me}, in the middle of {graph}. {channel.fault}\n{channel.outlook()}")


def _tell(channel: Channel, mine: _Failure, seconds: float) -> dict[int, _Failure]:
    """Tell the others how this rank failed, and listen for so long, or until all have failed: by rank, how."""
    others = [rank for rank in range(channel.ranks.size) if rank != channel.ranks.rank]
    heard: dict[int, _Failure] = {}
    end = time.monotonic() + seconds
    try:
        channel.store.set(f"failed/{channel.ranks.rank}", json.dumps(astuple(mine)))
        while True:
            for rank in others:
                if channel.store.check([f"failed/{rank}"]):
                    heard[rank] = _Failure(*json.loads(channel.store.get(f"failed/{rank}")))
            # What another one said of an earlier call is no answer, unless it is the reason of this failure.
            said = [f for f in heard.values() if f.call >= mine.call or (mine.of_collective and not f.of_collective)]
            if len(said) == len(others) or time.monotonic() >= end:
                return heard
            time.sleep(0.05)
    except RuntimeError:  # the store went with the rank that had it: nothing more will be heard
        return heard
