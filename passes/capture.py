"""capture: which node of Dynamo's graph is which module's argument or output, and what the plan says.

Modules called while Dynamo traced were recorded (:mod:`fxsp.capture.capture`); here their values become nodes of the
graph.  Nothing is rewritten.  After this pass ``program.captured`` is known, and what the program calls its outputs.
"""

from __future__ import annotations

from fxsp.capture.capture import capture
from fxsp.errors import PlanError
from fxsp.passes.annotate.annotate import say_own_plan
from fxsp.passes.base import Pass, Program
from fxsp.source import input_name
from fxsp.torch_internals import Translation

__all__ = ["Capture"]


class Capture(Pass):
    """After this pass it is known which values the plan's names stand for."""

    def apply(self, program: Program) -> Program:
        report, translation = program.report, Translation.current()
        try:
            captured = capture(program.gm, program.options.plan, program.root)
        except PlanError as error:
            if program.options.plan is not None or program.root is not None:
                raise
            say_own_plan(program, error)
            captured = capture(program.gm, "infer")
        program.captured = captured
        report.notes.extend(captured.notes)
        if captured.root is not None:
            report.root = type(captured.part or captured.root).__name__
        if translation is not None:
            report.notes.extend(translation.said())
            report.outputs.extend(map(input_name, translation.output_names(program.gm)))
        return program
