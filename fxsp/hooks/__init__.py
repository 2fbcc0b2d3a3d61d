"""The hook registry for eager mode, with the API of ``vllm_omni.diffusion.hooks``."""

from __future__ import annotations

from fxsp.hooks.base import BaseState, HookRegistry, ModelHook, StateManager
from fxsp.hooks.sequence_parallel import (
    ModuleForwardMetadata,
    SequenceParallelGatherHook,
    SequenceParallelSplitHook,
    apply_sequence_parallel,
    disable_sequence_parallel_for_model,
    enable_sequence_parallel_for_model,
    remove_sequence_parallel,
    report_of,
)

__all__ = [
    "BaseState",
    "HookRegistry",
    "ModelHook",
    "ModuleForwardMetadata",
    "SequenceParallelGatherHook",
    "SequenceParallelSplitHook",
    "StateManager",
    "apply_sequence_parallel",
    "disable_sequence_parallel_for_model",
    "enable_sequence_parallel_for_model",
    "remove_sequence_parallel",
    "report_of",
]
