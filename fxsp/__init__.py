"""fxsp: a compiler for sequence parallelism.  ``torch.compile(model, backend="sp")``."""

from __future__ import annotations

from fxsp.backend import reports
from fxsp.errors import (
    DegreeWarning,
    FxspError,
    FxspWarning,
    ImplicitGatherWarning,
    InputMismatchError,
    OptionError,
    OutputGatherWarning,
    OwnPlanWarning,
    PlanError,
    ProcessGroupError,
    RanksApartError,
    StrictError,
    UnshardedWarning,
    UnsupportedError,
    VerificationError,
)
from fxsp.offline.explain import Explanation, explain
from fxsp.offline.infer_plan import InferredPlan, infer_plan
from fxsp.offline.verify import Evidence, verify
from fxsp.passes.attention.operators import register_attention
from fxsp.plan import (
    SequenceParallelConfig,
    SequenceParallelInput,
    SequenceParallelOutput,
    SequenceParallelPartialInput,
)
from fxsp.report import Report

__all__ = [
    "DegreeWarning",
    "Evidence",
    "Explanation",
    "FxspError",
    "FxspWarning",
    "ImplicitGatherWarning",
    "InferredPlan",
    "InputMismatchError",
    "OptionError",
    "OutputGatherWarning",
    "OwnPlanWarning",
    "PlanError",
    "ProcessGroupError",
    "RanksApartError",
    "Report",
    "SequenceParallelConfig",
    "SequenceParallelInput",
    "SequenceParallelOutput",
    "SequenceParallelPartialInput",
    "StrictError",
    "UnshardedWarning",
    "UnsupportedError",
    "VerificationError",
    "explain",
    "infer_plan",
    "register_attention",
    "reports",
    "verify",
]
