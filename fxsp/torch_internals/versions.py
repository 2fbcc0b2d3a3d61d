"""What a version of torch lacks, as an error."""

from __future__ import annotations

import re
import types
from pathlib import Path

import torch

#: The first and the last release that fxsp is for; the range in ``pyproject.toml`` says the same.
SUPPORTED = ("2.11", "2.15")


def missing(what: str, error: Exception | None = None) -> RuntimeError:
    """The error where torch has no ``what``, and why (``error``); it names the versions that are supported."""
    reason = f": {error}" if error else ""
    first, last = SUPPORTED
    return RuntimeError(
        f"torch {torch.__version__} has no {what}{reason}; fxsp supports torch {first} to {last}: install one of "
        "these, or a release of fxsp that is for this one (what else is missing: python -m fxsp.torch_internals.probe)"
    )


def absence(error: ImportError | AttributeError) -> RuntimeError | None:
    """``error`` as :func:`missing` says it, if a function of this folder looked in vain for a name of torch."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or Path(trace.tb_frame.f_code.co_filename).parent != Path(__file__).parent:
        return None
    if isinstance(error, ImportError):
        owner = error.name or ""
        name = "".join(re.findall(r"cannot import name '(\w+)'", str(error)))
    else:
        kind = error.obj if isinstance(error.obj, (type, types.ModuleType)) else type(error.obj)
        parts = (getattr(kind, "__module__", ""), getattr(kind, "__qualname__", kind.__name__))
        owner, name = ".".join(filter(None, parts)), error.name or ""
    if owner.partition(".")[0] != "torch":
        return None
    return missing(".".join(filter(None, (owner, name))), error)
