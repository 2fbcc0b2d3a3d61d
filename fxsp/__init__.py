"""fxsp: a compiler for sequence parallelism.  ``torch.compile(model, backend="sp")``."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from fxsp import errors
from fxsp.backend import reports
from fxsp.calibration import calibrate
from fxsp.config import Options
from fxsp.errors import *  # noqa: F403
from fxsp.machine import Machine
from fxsp.model_report import ModelReport, report_of
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
from fxsp.split_values.conversions import whole
from fxsp.split_values.value import SplitTensor

__all__ = [
    "Evidence",
    "Explanation",
    "InferredPlan",
    "Machine",
    "ModelReport",
    "Options",
    "Report",
    "SequenceParallelConfig",
    "SequenceParallelInput",
    "SequenceParallelOutput",
    "SequenceParallelPartialInput",
    "SplitTensor",
    "calibrate",
    "explain",
    "infer_plan",
    "register_attention",
    "report_of",
    "reports",
    "verify",
    "whole",
]
__all__ += errors.__all__

try:
    __version__ = version("fxsp")
except PackageNotFoundError:  # run from its folder, not installed
    __version__ = "unknown"


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
