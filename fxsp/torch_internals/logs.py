"""Logs, traces, and errors on their way through Dynamo."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from fxsp.torch_internals.versions import absence


def tracing_artifacts() -> bool:
    """Whether ``TORCH_TRACE`` asks for the artifacts of compilations."""
    from torch._logging._internal import trace_log

    return bool(os.environ.get("TORCH_TRACE")) and bool(trace_log.handlers)


def trace_artifact(name: str, text: str) -> None:
    """``text`` as an artifact of the compilation in progress, as tlparse reads it."""
    from torch._logging import trace_structured

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=lambda: text)


@contextlib.contextmanager
def through_dynamo(*kinds: type[Exception]) -> Iterator[None]:
    """In a backend: errors of ``kinds`` reach the user as they are, and so does what this version of torch lacks.

    Any other error Dynamo wraps in one of its own.
    """
    try:
        yield
    except kinds as error:
        raise _unwrapped(error) from error.__cause__
    except (ImportError, AttributeError) as error:
        lacking = absence(error)
        if lacking is None:
            raise
        raise _unwrapped(lacking) from error


def _unwrapped(error: Exception) -> Exception:
    """``error`` as an exception of the same type, and of the type that Dynamo passes on to the user as it is."""
    from torch._dynamo.exc import ShortenTraceback

    kind = type(error)
    bases = (ShortenTraceback,) if issubclass(ShortenTraceback, kind) else (kind, ShortenTraceback)
    both = type(kind.__name__, bases, {"__module__": kind.__module__, "__init__": _plain_init})
    return both(*error.args).with_traceback(error.__traceback__)  # type: ignore[no-any-return]


def _plain_init(self: Any, *args: Any) -> None:
    Exception.__init__(self, *args)
    self.first_useful_frame = None
