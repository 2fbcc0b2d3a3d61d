"""Where in the user's code a torch function was called: what is reported, and the error that says it."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

from fxsp.errors import ImplicitGatherWarning, UnsupportedError
from fxsp.hooks.layout import Layout, global_size, local_size
from fxsp.report import GatherRecord
from fxsp.source import user_frame, warn

__all__ = ["caller", "note_gather", "refuse"]


def caller() -> tuple[str, str]:
    """``(class of the innermost module whose code is running, "file.py:123")``; empty where unknown."""
    if torch.compiler.is_compiling():
        return "", ""
    found = user_frame()
    source = f"{Path(found.f_code.co_filename).name}:{found.f_lineno}" if found is not None else ""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            return type(owner).__name__, source
        frame = frame.f_back
    return "", source


def refuse(name: str, problem: str) -> NoReturn:
    """Raise the error for a function that would give wrong numbers on split tokens."""
    module, source = caller()
    where = "".join([f" in {module}" if module else "", f" ({source})" if source else ""])
    raise UnsupportedError(
        f"hooks: `{name}`{where} {problem}.  A module between split and gather runs on this rank's tokens. Gather "
        'before it (SequenceParallelOutput), or use torch.compile(model, backend="sp"), which sees the whole program.'
    )


def note_gather(name: str, layout: Layout, x: Tensor, why: str) -> None:
    """Record, and say once, that a function works on the whole value."""
    if torch.compiler.is_compiling():
        return
    region = layout.region
    module, source = caller()
    size = x.numel() // max(local_size(layout), 1) * global_size(layout) * x.element_size()
    record = GatherRecord(name, module, source, why, size)
    region.report.implicit_gathers.append(record)
    if name not in region.warned:
        region.warned.add(name)
        warn(ImplicitGatherWarning(f"hooks: gathered for {record}"), first=region.rank == 0)
