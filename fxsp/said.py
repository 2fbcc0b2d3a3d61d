"""What a person is told once a graph is partitioned: that a plan split next to nothing, and what outputs cost."""

from __future__ import annotations

import warnings

from fxsp.errors import StrictError, UnshardedWarning
from fxsp.passes.base import Program
from fxsp.share import LEAST, share_of

__all__ = ["EMPTY_PLAN", "say_share"]

EMPTY_PLAN = "the plan is empty: it names no module and no value"


def say_share(program: Program, strict: bool) -> None:
    """Put the share of the work that runs on shards into the report; if it is next to nothing, say so.

    Where implicit gathers name the operators that hold the work, that has been said.  Raises ``StrictError`` if
    ``strict``.
    """
    report = program.report
    share = share_of(program)
    report.share = share.part
    if share.part >= LEAST:
        return
    amount = "nothing" if not share.split else f"{share.part:.1%} of the work"
    text = f"the plan applied, but {amount} runs on shards: {share.holders(report.root)} of it"
    if share.split:
        report.notes.append(text)
    else:
        report.unsharded = text
    known = {(gather.op, gather.source) for gather in report.implicit_gathers}
    unsaid = sum(work for (op, _, source), work in share.whole.items() if (op, source) not in known)
    if 2 * unsaid < share.total - share.split:
        return
    remedy = (
        "annotate a value that is split where this work begins; an operator that the compiler does not know can be "
        "replaced by the operators that it consists of, an attention be named with fxsp.register_attention"
    )
    if strict:
        raise StrictError(f"{text}.\n  With strict=True this is an error: {remedy}.")
    warnings.warn(UnshardedWarning(f"{text}.\n  {remedy}; strict=True refuses it"), stacklevel=3)
