"""What is to be expected of a real model, and the sizes of its inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fxsp import SequenceParallelInput
from models import Built

__all__ = ["BATCH", "CASES", "HIDDEN", "IDS", "JOINT", "TEXT", "TOKENS", "Other"]

TOKENS, TEXT, BATCH = 13, 5, 2
HIDDEN = {"hidden_states": SequenceParallelInput(1)}
JOINT = {**HIDDEN, "encoder_hidden_states": SequenceParallelInput(1)}
IDS = {"": {"input_ids": SequenceParallelInput(1)}}


@dataclass(frozen=True)
class Other:
    """A model, and what the report says of it on ``size`` ranks."""

    build: Callable[[], Built]
    plan: dict[str, Any] | None
    size: int
    #: Methods of the attentions.
    methods: tuple[str, ...]
    #: Operators that need all tokens.
    gathers: tuple[str, ...] = ()
    #: Whether the library's code breaks the graph, so that parts of it are no graph, or a small one.
    breaks: bool = False


CASES: dict[str, Other] = {}
