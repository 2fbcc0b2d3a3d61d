"""Summands that stay summands through what is linear in them; :mod:`fxsp.passes.rules.summands` says which."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from fxsp.passes.base import Program
from fxsp.passes.graph import Call, Decision, type_of
from fxsp.passes.rules.families import family
from fxsp.passes.rules.summands import decide_summands
from fxsp.passes.special.sized import Sized
from fxsp.passes.special.special import Local, Special
from fxsp.passes.special.sums import Sums
from fxsp.types import Type

__all__ = ["Summands"]


class Summands(Special):
    """Each rank's summand of the result; sums of them are wide, as those of tokens are."""

    ops = family("joins", "linear", "scale") | {torch.ops.aten.div.Tensor}

    def decide(self, call: Call, types: list[Type], program: Program) -> Decision | None:
        decision = decide_summands(call, [type_of(x) for x in call.operands])
        return None if decision is None else replace(decision, special=self)

    def write(self, local: Local, call: Call, decision: Decision) -> Node | list[Any]:
        if call.op in family("total"):
            return Sums().write(local, call, decision)
        if call.op in family("expand"):
            return Sized().write(local, call, decision)
        return local.same_call(call, decision)
