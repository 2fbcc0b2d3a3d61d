"""Sequence parallelism by hooks, with the API of ``vllm_omni.diffusion.hooks.sequence_parallel``.

A plan (``fxsp.plan``) says where values are split and gathered; between the two, modules run on this rank's tokens.
The same plan drives ``torch.compile(model, backend="sp")``: while that backend traces a model, its hooks stand aside::

    enable_sequence_parallel_for_model(model)         # eager; reads model._sp_plan
    fast = torch.compile(model, backend="sp")         # the same model, the same plan, compiled

Attention, gradients and what the hooks refuse: see ``fxsp.hooks.dispatch``, ``rules`` and ``attention``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from fxsp.capture.resolve import forward_signature, modules_at, resolve_plan, unwrap
from fxsp.errors import PlanError
from fxsp.hooks.base import HookRegistry
from fxsp.hooks.dispatch import RULES
from fxsp.hooks.region import Region
from fxsp.hooks.sp_plan import validate_sp_plan
from fxsp.hooks.split import (
    SequenceParallelGatherHook,
    SequenceParallelRootHook,
    SequenceParallelSplitHook,
    needs_lengths,
)
from fxsp.hooks.table import TABLE
from fxsp.hooks.tracing import (
    _SP_INPUT_HOOK_TEMPLATE,  # noqa: F401
    _SP_OUTPUT_HOOK_TEMPLATE,  # noqa: F401
    ROOT,
    attached_names,
    hook_name,
)
from fxsp.hooks.values import ModuleForwardMetadata
from fxsp.plan import PlanEntry, SequenceParallelConfig, SequenceParallelOutput, find_plan, parse_plan
from fxsp.report import Report

__all__ = [
    "ModuleForwardMetadata",
    "SequenceParallelGatherHook",
    "SequenceParallelSplitHook",
    "apply_sequence_parallel",
    "disable_sequence_parallel_for_model",
    "enable_sequence_parallel_for_model",
    "remove_sequence_parallel",
    "report_of",
]

RULES.update(TABLE)


def apply_sequence_parallel(
    module: nn.Module, config: SequenceParallelConfig | None, plan: Any, *, group: dist.ProcessGroup | None = None
) -> None:
    """Attach the hooks of ``plan`` to the modules below ``module``.

    ``config`` has the degrees of attention; None exchanges heads over all ranks of ``group`` (default: all processes).
    Everything is checked before anything is attached; degrees are checked at the first call if there is no process
    group yet.  Raises :class:`~fxsp.errors.PlanError` (a ``ValueError``) for a plan that names what does not exist or
    has no meaning, or for hooks that are there already, and :class:`~fxsp.errors.OptionError` (a ``ValueError``) for
    degrees that do not match the group.
    """
    root = unwrap(module)
    found = _hooks(root, plan)
    region = Region(config, group)
    if _root_hook(root) is not None:
        raise PlanError(f"{type(root).__name__} has hooks of sequence parallelism; remove them first")
    attached: list[tuple[nn.Module, str]] = []
    try:
        for target, name, make, metadata in found:
            registry = HookRegistry.get_or_create(target)
            attached.append((target, name))
            hook = make(metadata, config, region)
            if name == ROOT:
                hook.plan = parse_plan(plan)
            registry.register_hook(name, hook)
    except BaseException:
        _detach(attached)
        raise


def remove_sequence_parallel(module: nn.Module, plan: Any) -> None:
    """Remove the hooks that :func:`apply_sequence_parallel` attached for ``plan``; modules without any are let be."""
    root = unwrap(module)
    _detach([(target, name) for target, name, _, _ in _hooks(root, plan) if name != ROOT])
    hook = _root_hook(root)
    if hook is not None and not attached_names(root, hook.region):
        _detach([(root, ROOT)])


def enable_sequence_parallel_for_model(
    model: nn.Module, config: SequenceParallelConfig | None = None, *, group: dist.ProcessGroup | None = None
) -> None:
    """:func:`apply_sequence_parallel` with the model's own plan, its ``_sp_plan`` (else its ``_cp_plan``).

    Without ``config``, heads are exchanged over all ranks.  Raises ``ValueError`` if the model has no plan, or one that
    :func:`~fxsp.hooks.sp_plan.validate_sp_plan` refuses.
    """
    root = unwrap(model)
    plan = find_plan(root)
    if plan is None:
        raise ValueError(
            f"{type(root).__name__} has no _sp_plan (and no _cp_plan): give it one, or use apply_sequence_parallel"
        )
    validate_sp_plan(plan)
    apply_sequence_parallel(model, config, plan, group=group)


def disable_sequence_parallel_for_model(model: nn.Module) -> None:
    """Remove the hooks of the model's own plan; a model without a plan is let be."""
    plan = find_plan(unwrap(model))
    if plan is not None:
        remove_sequence_parallel(model, plan)


def report_of(model: nn.Module) -> Report:
    """What the hooks did in the model's last eager call: attentions, implicit gathers, parts that ran whole."""
    hook = _root_hook(unwrap(model))
    if hook is None:
        raise ValueError(f"{type(model).__name__} has no hooks of sequence parallelism")
    return hook.region.report


def _get_submodule_by_name(model: nn.Module, name: str) -> nn.Module | list[nn.Module]:
    """The module that a key of a plan names; the list of them where the key has a ``*``."""
    found = [module for _, module in modules_at(unwrap(model), name, name)]
    return found if "*" in name else found[0]


def _root_hook(root: nn.Module) -> SequenceParallelRootHook | None:
    registry = root.__dict__.get("_hook_registry")
    hook = None if registry is None else registry.get_hook(ROOT)
    return hook if isinstance(hook, SequenceParallelRootHook) else None


def _detach(attached: Sequence[tuple[nn.Module, str]]) -> None:
    for module, name in attached:
        registry = module.__dict__.get("_hook_registry")
        if registry is not None:
            registry.remove_hook(name)
            if not registry.names:
                registry.reset()


# --- from a plan to hooks ---------------------------------------------------------------------------------------------


def _hooks(root: nn.Module, plan: Any) -> list[tuple[nn.Module, str, Any, Any]]:
    """``(module, hook name, class of the hook, its metadata)`` in the order of the plan; checks everything."""
    entries = parse_plan(plan)
    rows = resolve_plan(entries, root)
    wanted: dict[tuple[int, str], tuple[nn.Module, list[PlanEntry]]] = {}
    for row in rows:
        key = (id(row.module), hook_name(row.entry))
        wanted.setdefault(key, (row.module, []))[1].append(row.entry)
    known = forward_signature(root).parameters
    sources = [name for name in needs_lengths(row.entry.spec for row in rows) if name in known]
    result: list[tuple[nn.Module, str, Any, Any]] = [(root, ROOT, SequenceParallelRootHook, sources)]
    for (_, name), (module, own) in wanted.items():
        gathers = isinstance(own[0].spec, SequenceParallelOutput)
        result.append((module, name, *(_gather(own) if gathers else _split(own))))
    return result


def _split(entries: Sequence[PlanEntry]) -> tuple[Any, Any]:
    metadata: dict[Any, Any] = {}
    for entry in entries:
        if entry.part is None:
            metadata[entry.target] = entry.spec
        else:
            index, count = entry.part
            metadata.setdefault(entry.target, [None] * count)[index] = entry.spec
    return SequenceParallelSplitHook, metadata


def _gather(entries: Sequence[PlanEntry]) -> tuple[Any, Any]:
    specs: dict[Any, Any] = {entry.target: entry.spec for entry in entries}
    only = entries[0].target is None
    return SequenceParallelGatherHook, specs[None] if only else [specs.get(i) for i in range(max(specs) + 1)]
