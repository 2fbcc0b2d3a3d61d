"""Plans of today, by the names that ``vllm_omni.diffusion.distributed.sp_plan`` has for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fxsp.capture.resolve import unwrap
from fxsp.errors import PlanError
from fxsp.plan import (
    SequenceParallelConfig,
    SequenceParallelInput,
    SequenceParallelOutput,
    SequenceParallelPartialInput,
    parse_plan,
)

__all__ = [
    "AnySequenceParallelInput",
    "SequenceParallelConfig",
    "SequenceParallelInput",
    "SequenceParallelInputType",
    "SequenceParallelModelPlan",
    "SequenceParallelOutput",
    "SequenceParallelOutputType",
    "SequenceParallelPartialInput",
    "get_sp_plan_from_model",
    "validate_sp_plan",
]

#: An entry that splits.
AnySequenceParallelInput = SequenceParallelInput | SequenceParallelPartialInput
#: What a plan says of the arguments and outputs of one module: by name, or by index.
SequenceParallelInputType = dict[
    str | int, AnySequenceParallelInput | list[AnySequenceParallelInput] | tuple[AnySequenceParallelInput, ...]
]
#: What a plan says of the only output of a module, or of each.
SequenceParallelOutputType = SequenceParallelOutput | list[SequenceParallelOutput] | tuple[SequenceParallelOutput, ...]
#: A plan: by the paths of modules.
SequenceParallelModelPlan = dict[str, SequenceParallelInputType | SequenceParallelOutputType]


def validate_sp_plan(plan: Any) -> None:
    """Check a plan without a model: its form, its numbers, and that every ``shard_group`` belongs to one module.

    A group says that values are of one sequence, whose length is taken where they are split: two modules cannot both
    say it.  Their entries need ``auto_pad=True``, as in vLLM-Omni, where only padded values have a group.  Raises
    :class:`~fxsp.errors.PlanError`, a ``ValueError``.
    """
    if not isinstance(plan, Mapping):
        raise PlanError(f"_sp_plan must be a dict, not {type(plan).__name__}")
    owners: dict[str, str] = {}
    for entry in parse_plan(plan):
        group = entry.spec.shard_group if isinstance(entry.spec, SequenceParallelInput) else None
        if group is None:
            continue
        if not entry.spec.auto_pad:  # type: ignore[union-attr]
            raise PlanError(f"plan entry `{entry}`: shard_group={group!r} requires auto_pad=True")
        owner = owners.setdefault(group, entry.pattern)
        if owner != entry.pattern:
            raise PlanError(
                f"plan entry `{entry}`: shard_group={group!r} is used at multiple split boundaries, {owner!r} and "
                f"{entry.pattern!r}; use a unique name for each"
            )


def get_sp_plan_from_model(model: nn.Module) -> Any:
    """The model's ``_sp_plan``, checked by :func:`validate_sp_plan`; None if it has none."""
    plan = getattr(unwrap(model), "_sp_plan", None)
    if plan is not None:
        validate_sp_plan(plan)
    return plan
