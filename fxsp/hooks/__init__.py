"""The hook registry for eager mode, with the API of ``vllm_omni.diffusion.hooks``."""

from __future__ import annotations

from fxsp.hooks.base import BaseState, HookRegistry, ModelHook, StateManager, module_has_active_hooks
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
from fxsp.hooks.sp_plan import (
    SequenceParallelConfig,
    SequenceParallelInput,
    SequenceParallelOutput,
    SequenceParallelPartialInput,
    get_sp_plan_from_model,
    validate_sp_plan,
)

__all__ = [
    "BaseState",
    "HookRegistry",
    "ModelHook",
    "ModuleForwardMetadata",
    "SequenceParallelConfig",
    "SequenceParallelGatherHook",
    "SequenceParallelInput",
    "SequenceParallelOutput",
    "SequenceParallelPartialInput",
    "SequenceParallelSplitHook",
    "StateManager",
    "apply_sequence_parallel",
    "disable_sequence_parallel_for_model",
    "enable_sequence_parallel_for_model",
    "get_sp_plan_from_model",
    "module_has_active_hooks",
    "remove_sequence_parallel",
    "report_of",
    "validate_sp_plan",
]
