"""What a person is told of a graph: that it runs whole, what is gathered, what a plan missed, what outputs cost.

All ranks of a group find out the same; the first one shows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor
from torch.fx import Node

from fxsp.cost.share import LEAST, on_shards, share_of
from fxsp.errors import (
    DegreeWarning,
    ImplicitGatherWarning,
    OutputGatherWarning,
    StrictError,
    UnshardedWarning,
)
from fxsp.inspection.wire import format_bytes
from fxsp.kernels.counts import split_bytes
from fxsp.passes.attention.operators import ATTENTION_OPS
from fxsp.passes.base import Program
from fxsp.passes.graph import Call, facts, shape_of
from fxsp.passes.work import has_work
from fxsp.report import GatherRecord, Report
from fxsp.source import warn
from fxsp.types import Shard

__all__ = ["say_degrees", "say_gathers", "say_outputs", "say_share", "say_unsharded"]

#: Outputs that are gathered may be this part of what a graph sends.
_MOST = 0.25
#: One hidden state, and as much again: what a model returns at its end, whatever else it returns.
_STATES = 2


def say_unsharded(report: Report, remedy: str, *, first: bool = True) -> None:
    """Warn that a graph runs whole, and why; ``first``: this is the first rank."""
    text = f"a graph of {report.root} runs whole on every rank (right, and not split): {report.unsharded}.\n  {remedy}"
    warn(UnshardedWarning(text.rstrip()), first=first)


def say_gathers(report: Report, *, first: bool = True) -> None:
    """One warning for each compile, not one for each gather; ``first``: this is the first rank."""
    gathers = [g for g in report.implicit_gathers if g.kind == "implicit"]
    if not gathers:
        return
    shown = "\n  ".join(str(g) for g in gathers[:8])
    more = f"\n  and {len(gathers) - 8} more" if len(gathers) > 8 else ""
    more += "\n  A SequenceParallelOutput before such an operator asks for the gather; strict=True refuses it"
    text = f"{len(gathers)} sharded values have to be gathered:\n  {shown}{more}"
    warn(ImplicitGatherWarning(text), first=first)


def say_degrees(program: Program) -> None:
    """One warning for each compile: what does not run by the degrees that were asked for."""
    ignored = list(dict.fromkeys(program.ignored_degrees))
    if ignored:
        more = f"\n  and {len(ignored) - 4} more" if len(ignored) > 4 else ""
        warn(DegreeWarning("\n  ".join(ignored[:4]) + more), first=program.ranks.rank == 0)


def say_share(program: Program) -> None:
    """Put the share of the work that runs on shards into the report; if it is next to nothing, say so.

    Where implicit gathers name the operators that hold the work, that has been said.  Raises ``StrictError`` under
    ``strict``.
    """
    report = program.report
    share = share_of(program)
    report.share = share.part
    if share.part >= LEAST:
        return
    amount = "nothing" if not share.split else f"{share.part:.1%} of the work"
    text = f"the plan applied, but {amount} runs on shards: {share.holders(report.root)} of it"
    known = {(gather.op, gather.source) for gather in report.implicit_gathers}
    unsaid = sum(work for (op, _, source), work in share.whole.items() if (op, source) not in known)
    said = 2 * unsaid < share.total - share.split
    if share.split or said:
        report.notes.append(text)
    else:
        report.unsharded = text
    if said:
        return
    remedy = (
        "annotate a value that is split where this work begins; an operator that the compiler does not know can be "
        "replaced by the operators that it consists of, an attention be named with fxsp.register_attention"
    )
    if program.options.strict:
        raise StrictError(f"{text}.\n  With strict=True this is an error: {remedy}.")
    warn(UnshardedWarning(f"{text}.\n  {remedy}; strict=True refuses it"), first=program.ranks.rank == 0)


def say_outputs(program: Program) -> None:
    """Say which outputs are more than a quarter of what the graph sends (forward), and what avoids it.

    Meant are outputs that need not be: keys and values of attentions, what is wider than a hidden state (logits), and
    what is, together, more than two of them (the states of all layers).  A hidden state has to be returned once by most
    models, and is often all that a small one sends.  A graph that ends in a graph break returns what the code after it
    needs: that is said elsewhere.  Raises ``StrictError`` under ``strict``.
    """
    report, number = program.report, program.number
    named = [gather for gather in report.implicit_gathers if gather.kind == "output" and gather.name]
    cached = _attended(program)
    caches = [gather for gather in named if gather.value in cached]
    others = [gather for gather in named if gather.value not in cached]
    state = max(_states(program), default=None)
    if state is None:
        others = []
    elif sum(number(gather.bytes) for gather in others) <= _STATES * state:
        others = [gather for gather in others if number(gather.bytes) > state]
    sent = sum(number(gather.bytes) for gather in (*caches, *others))
    total = sum(number(record.bytes) for record in report.collectives)
    if sent <= _MOST * total:
        return
    several = f"{len(caches) + len(others)} outputs are" if len(caches) + len(others) > 1 else "an output is"
    lines = [
        f"{several} {sent / total:.0%} of all bytes that this graph sends ({format_bytes(sent)} per rank, forward):"
    ]
    largest = sorted((*caches, *others), key=lambda gather: -number(gather.bytes))
    lines += [f"  {gather.name}, of {gather.module}: {format_bytes(gather.bytes)}" for gather in largest[:6]]
    lines += [f"  and {len(largest) - 6} more"] if len(largest) > 6 else []
    remedy = "; ".join(_remedies(caches, others))
    if program.options.strict:
        raise StrictError("\n  ".join([*lines, f"With strict=True this is an error: {remedy}."]))
    lines.append(f"To avoid it: {remedy}; strict=True refuses it")
    report.notes.append(lines[0].replace(" (", f", {', '.join(g.name for g in largest[:3])} (").rstrip(":"))
    warn(OutputGatherWarning("\n  ".join(lines)), first=program.ranks.rank == 0)


def _remedies(caches: Sequence[GatherRecord], others: Sequence[GatherRecord]) -> Iterator[str]:
    if caches:
        yield "no keys and values are returned with use_cache=False"
    if any("logits" in gather.name for gather in others):
        yield (
            "return the loss alone (compile the step that computes it), or the logits of the tokens that are needed "
            "(logits_to_keep=1)"
        )
    elif others:
        yield "return what is computed of it (a loss, a mean, some tokens) from the compiled function, instead of all"


def _attended(program: Program) -> set[str]:
    """Names of the values that are keys or values of an attention, or that these are views and copies of."""
    found: set[str] = set()
    for node in program.whole.graph.nodes:
        if node.target in ATTENTION_OPS:
            op, call = ATTENTION_OPS[node.target], Call(node)
            for name in (op.key, op.value):
                value = call[name]
                while isinstance(value, Node) and not has_work(value) and value.op == "call_function":
                    found.add(value.name)
                    tensors = [n for n in value.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
                    value = tensors[0] if len(tensors) == 1 else None
    return found


def _states(program: Program) -> Iterator[int]:
    """Bytes that a rank sends to gather a hidden state: queries and results of attentions, or what is multiplied."""
    number, size = program.number, program.ranks.size
    nodes = [n for n in program.whole.graph.nodes if on_shards(n)]
    attentions = [n for n in nodes if n.target in ATTENTION_OPS]
    values = [v for n in attentions for v in (n, Call(n)[ATTENTION_OPS[n.target].query])]
    for value in values or [v for n in nodes if has_work(n) for v in (n, *n.all_input_nodes)]:
        tensor, type_ = value.meta.get("val"), facts(value).type
        if isinstance(tensor, Tensor) and isinstance(type_, Shard):
            yield (size - 1) * number(split_bytes(shape_of(value), type_, tensor.element_size(), size))
