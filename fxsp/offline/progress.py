"""What is going on, told on standard error while work takes longer than two seconds."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fxsp.errors import OptionError

__all__ = ["PATIENCE", "check_size", "told"]

#: Seconds of silence before the first word, and between two about the same thing.
PATIENCE = 2.0


def check_size(size: object) -> None:
    """Raises :class:`OptionError` unless ``size`` is a number of ranks."""
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise OptionError(f"world_size is {size!r}; it is a number of ranks, at least 1")


@contextmanager
def told(wanted: bool) -> Iterator[Callable[[str], None]]:
    """Gives ``say(what)``; what goes on longer than two seconds is said, with the seconds, until the next thing begins.

    On a terminal one line is written over and over; elsewhere a line is written once for each thing.
    """
    if not wanted or os.environ.get("FXSP_QUIET", "0") not in ("", "0"):
        yield lambda _: None
        return
    start = time.monotonic()
    state: dict[str, str] = {"now": "", "shown": ""}
    done = threading.Event()
    terminal = sys.stderr.isatty()

    def show() -> None:
        while not done.wait(PATIENCE):
            now = state["now"]
            if now and (terminal or now != state["shown"]):
                text = f"fxsp: {now} ... {time.monotonic() - start:.0f} s"
                sys.stderr.write(f"\r{text}\x1b[K" if terminal else f"{text}\n")
                sys.stderr.flush()
                state["shown"] = now

    def say(what: str) -> None:
        state["now"] = what

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield say
    finally:
        done.set()
        thread.join()
        if terminal and state["shown"]:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
