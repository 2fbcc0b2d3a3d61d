"""Errors and warnings of fxsp. Every message says where, what was found, why it is refused, and what helps."""

from __future__ import annotations

__all__ = [
    "DegreeWarning",
    "FxspError",
    "FxspWarning",
    "ImplicitGatherWarning",
    "InputMismatchError",
    "OptionError",
    "OutputGatherWarning",
    "OwnPlanWarning",
    "PlanError",
    "ProcessGroupError",
    "RanksApartError",
    "StrictError",
    "UnshardedWarning",
    "UnsupportedError",
    "VerificationError",
]


class FxspError(Exception):
    """Base of all errors that fxsp raises on purpose."""


class PlanError(FxspError, ValueError):
    """A sequence-parallel plan names something that does not exist, or contradicts itself."""


class OptionError(FxspError, ValueError):
    """An unknown option, a bad value, or degrees that do not match the process group."""


class ProcessGroupError(FxspError, RuntimeError):
    """The process group that names the ranks does not exist any more, or is not the one that a graph is for."""


class UnsupportedError(FxspError, NotImplementedError):
    """The program contains something that cannot be partitioned without changing its meaning."""


class RunsWhole(UnsupportedError):  # noqa: N818  (nothing is wrong with the graph)
    """A graph stays as it is: whole on every rank, and right.  ``compile_graph`` catches it; no user does.

    ``remedy`` is what the warning advises, beside the reason; None: nobody has to be warned.
    """

    REMEDY = "fxsp.explain shows what the plan reaches; rewrite that line, or keep it out with torch.compiler.disable"

    def __init__(self, reason: str, remedy: str | None = REMEDY) -> None:
        super().__init__(reason)
        self.remedy = remedy


class InputMismatchError(FxspError):
    """What must be the same on all ranks differs: graph, inputs, options, plan, versions, weights or random numbers."""


class RanksApartError(InputMismatchError):
    """A rank compiles, fails, leaves, or stays away, and the others do not."""


class StrictError(FxspError):
    """``strict=True`` and the program needs an implicit gather."""


class VerificationError(FxspError, AssertionError):
    """A pass broke the contract of the intermediate representation, or two programs disagree."""


class FxspWarning(UserWarning):
    """Base of the warnings of fxsp."""


class ImplicitGatherWarning(FxspWarning):
    """A sharded value had to be made whole because an operator needs all its tokens."""


class OutputGatherWarning(FxspWarning):
    """Much of what a graph sends is sent only because it returns whole values."""


class OwnPlanWarning(FxspWarning):
    """The plan that a model's class carries does not fit this model; another one is inferred."""


class DegreeWarning(FxspWarning):
    """An attention cannot be run by the degrees that were asked for, and runs otherwise."""


class UnshardedWarning(FxspWarning):
    """A graph (or a part of it) runs whole on every rank: right, but not split."""
