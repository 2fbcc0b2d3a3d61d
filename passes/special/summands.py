"""Summands that stay summands through what is linear in them; :mod:`fxsp.passes.rules.summands` says which."""

from __future__ import annotations

from dataclasses import replace

import torch

from fxsp.passes.base import Program
from fxsp.passes.graph import Call, Decision, type_of
from fxsp.passes.rules.families import family
from fxsp.passes.rules.summands import decide_summands
from fxsp.passes.special.sized import Sized
from fxsp.passes.special.special import Special
from fxsp.passes.special.sums import Sums
from fxsp.types import Type

__all__ = ["Summands"]


class Summands(Special):
    """Each rank's summand of the result; sums of them are wide, as those of tokens are."""

    ops = family("joins", "linear", "scale") | {torch.ops.aten.div.Tensor}

    def decide(self, call: Call, types: list[Type], program: Program) -> Decision | None:
        decision = decide_summands(call, [type_of(x) for x in call.operands])
        if decision is None:
            return None
        special = Sums() if call.op in family("total") else Sized() if call.op in family("expand") else self
        return replace(decision, special=special)
