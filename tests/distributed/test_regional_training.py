"""Blocks that are compiled by themselves under DDP and FSDP2, on meshes of data and sequence: gradients of one process,
reduced once, and nothing of activations gathered between the blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distributed import Pool
from regional_training import run_resumed, run_trained

Ranks = Callable[[int], Pool]
LLAMA = {"tokens": 7, "layers": 2}


@pytest.mark.parametrize(
    ("size", "data", "name", "arguments", "outer"),
    [
        (2, 1, "llama", LLAMA, "ddp"),
        (4, 2, "llama", LLAMA, "fsdp"),
        (4, 2, "wan", {"layers": 2}, "ddp"),
        (2, 1, "wan", {"layers": 2}, "fsdp kept"),
        (4, 2, "llama", LLAMA, "fsdp sum"),
        (3, 1, "flux", {"image": 25}, "fsdp sum"),
    ],
)
def test_gradients(ranks: Ranks, size: int, data: int, name: str, arguments: dict[str, Any], outer: str) -> None:
    for found in ranks(size).run(run_trained, name, arguments, outer, data):
        assert found["gradients"] <= 1e-5
        if size // data == 2:
            assert found["ran"]["all_to_all"] == 4
            assert found["ran"]["all_gather"] == (2 if name == "wan" else 1)


def test_clipping_and_resuming(ranks: Ranks, tmp_path: Path) -> None:
    for found in ranks(4).run(run_resumed, "llama", LLAMA, 2, str(tmp_path)):
        assert max(found["norms"], found["trained"], found["resumed"]) <= 1e-5, found
