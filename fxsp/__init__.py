"""fxsp: a compiler for sequence parallelism.  ``torch.compile(model, backend="sp")``.

What the names below stand for is loaded when they are used first: the compiler is large, and so is Dynamo.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING

from fxsp import errors
from fxsp.errors import *  # noqa: F403

if TYPE_CHECKING:
    from fxsp.backend import reports
    from fxsp.calibration import calibrate
    from fxsp.config import Options
    from fxsp.machine import Machine
    from fxsp.model_report import ModelReport, report_of
    from fxsp.offline.explain import Explanation, explain
    from fxsp.offline.infer_plan import InferredPlan, infer_plan
    from fxsp.offline.verify import Evidence, verify
    from fxsp.parallel import parallelize
    from fxsp.passes.attention.operators import register_attention
    from fxsp.passes.rules.register import register_op
    from fxsp.plan import (
        SequenceParallelConfig,
        SequenceParallelInput,
        SequenceParallelOutput,
        SequenceParallelPartialInput,
    )
    from fxsp.report import Report
    from fxsp.split_values.conversions import whole
    from fxsp.split_values.value import SplitTensor
else:
    #: Where names are, as above; with the report comes its text.
    _HOMES = {
        "Evidence": "fxsp.offline.verify",
        "Explanation": "fxsp.offline.explain",
        "InferredPlan": "fxsp.offline.infer_plan",
        "Machine": "fxsp.machine",
        "ModelReport": "fxsp.model_report",
        "Options": "fxsp.config",
        "Report": "fxsp.inspection.report_text",
        "SequenceParallelConfig": "fxsp.plan",
        "SequenceParallelInput": "fxsp.plan",
        "SequenceParallelOutput": "fxsp.plan",
        "SequenceParallelPartialInput": "fxsp.plan",
        "SplitTensor": "fxsp.split_values.value",
        "calibrate": "fxsp.calibration",
        "explain": "fxsp.offline.explain",
        "infer_plan": "fxsp.offline.infer_plan",
        "parallelize": "fxsp.parallel",
        "register_attention": "fxsp.passes.attention.operators",
        "register_op": "fxsp.passes.rules.register",
        "report_of": "fxsp.model_report",
        "reports": "fxsp.backend",
        "verify": "fxsp.offline.verify",
        "whole": "fxsp.split_values.conversions",
    }

    def __getattr__(name: str) -> object:
        """A public name, or a module of the package, that is used for the first time."""
        if name in _HOMES:
            found = globals()[name] = getattr(import_module(_HOMES[name]), name)
            return found
        if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
    "parallelize",
    "register_attention",
    "register_op",
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
