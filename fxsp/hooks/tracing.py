"""What a compiler does with a hooked model: backend ``"sp"`` follows the plan itself, any other one gets its program.

The hooks stand aside while Dynamo traces a model: the graph is the program of one process.  Backend ``"sp"`` splits it
as its plan says.  For any other backend the hooks see to it that ``sp`` does the same, with the plan and the
configuration of the hooks, and that the backend gets what comes out: one graph, with the meaning that the model has.

Hooks act while Dynamo traces only where nothing is compiled (``torch.export``), or where the model's own call is not
seen: when ``forward`` is called by that name in other code, and in a part of the model that is compiled for itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxsp.backend import Before, sp
from fxsp.capture.capture import claim_with, frame_module
from fxsp.capture.resolve import unwrap
from fxsp.plan import PlanEntry, SequenceParallelOutput
from fxsp.torch_internals import Translation, backend_layers, group_named

__all__ = ["ROOT", "attached_names", "hook_name", "sp_is_tracing"]

#: Of the hooks of sequence parallelism, the first before forward and the last after it.
ROOT = "sp_---root"
#: The names of the others, by the key of the plan; vLLM-Omni's names for the names.
_SP_INPUT_HOOK_TEMPLATE = "sp_input---{}"
_SP_OUTPUT_HOOK_TEMPLATE = "sp_output---{}"


def hook_name(entry: PlanEntry) -> str:
    """The name of the hook that an entry of a plan is a part of."""
    gathers = isinstance(entry.spec, SequenceParallelOutput)
    return (_SP_OUTPUT_HOOK_TEMPLATE if gathers else _SP_INPUT_HOOK_TEMPLATE).format(entry.pattern)


def attached_names(root: nn.Module, region: Any) -> set[str]:
    """The names of the hooks that are attached below a model and split or gather for a region."""
    found: list[Any] = [module.__dict__.get("_hook_registry") for module in root.modules()]
    return {
        name
        for registry in found
        if registry is not None
        for name in registry.names
        if name != ROOT and getattr(registry.get_hook(name), "region", None) is region
    }


@torch.compiler.assume_constant_result
def sp_is_tracing() -> bool:
    """Whether Dynamo traces for backend ``"sp"``, by itself or before another one.

    Called while it traces; its answer is a constant of the graph.
    """
    translation = Translation.current()
    if translation is None:
        return False
    ours = any(layer is sp for layer in backend_layers(translation.compiler()))
    if not ours:
        module = frame_module(translation)
        ours = module is not None and _claim(translation, module)
    translation.say("hooks of sequence parallelism stand aside: the plan is compiled" if ours else _ACT)
    return ours


#: From here on hooks act in this graph.
_ACT = "hooks of sequence parallelism act in the graph"


def _claim(translation: Translation, module: nn.Module) -> bool:
    """Compile the graph in which a hooked model is called as its plan says, whatever the backend."""
    root = unwrap(module)
    registry = root.__dict__.get("_hook_registry")
    hook: Any = None if registry is None else registry.get_hook(ROOT)
    if hook is None or translation.is_export() or _ACT in translation.said():
        return False
    region = hook.region
    region.resolve()
    if region.size == 1:
        return False
    group = None if region.group_name is None else group_named(region.group_name)
    compiler = translation.compiler()
    attached = attached_names(root, region)
    plan = tuple(entry for entry in hook.plan if hook_name(entry) in attached)
    translation.compile_with(Before(compiler, root, plan, region.config, group))
    return True


claim_with(_claim)
