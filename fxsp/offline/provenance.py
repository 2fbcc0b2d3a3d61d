"""Why: the chain of reasons behind a value, a module's attention, or a collective.

Every type carries its origin (the plan line, or the rule and the edge it came by), and every collective its reason;
here they are put in a row, from the value that was asked for back to the plan.
"""

from __future__ import annotations

import re

from torch.fx import Node

from fxsp.cost.formula import format_formulas
from fxsp.cost.metrics import Measures
from fxsp.inspection.report_text import legend_text
from fxsp.inspection.wire import format_bytes
from fxsp.passes.base import Program
from fxsp.passes.graph import facts, is_split, reachable
from fxsp.plan import did_you_mean, listing
from fxsp.report import CollectiveRecord
from fxsp.source import module_path, node_source
from fxsp.types import Shard

__all__ = ["UnknownNameError", "reasons"]


class UnknownNameError(KeyError):
    """Nothing in the explanation has this name."""

    def __str__(self) -> str:
        return str(self.args[0])


def reasons(name: str, program: Program, measures: Measures) -> list[str]:
    """Lines that say why; raises :class:`UnknownNameError` if there is no value and no module of that name.

    A name is that of a value of either program, of a collective, of a module, or of an input or parameter.
    """
    old = {n.name: n for n in program.whole.graph.nodes if n.op != "output"}
    new = {n.name: n for n in program.graph.nodes if n.op != "output"}
    collective = [i for i, record in enumerate(program.report.collectives) if record.value == name]
    if collective:
        return _collective(collective, program, measures, new, old)
    if name in old:
        return _value(old[name])
    if name in new:
        node = new[name]
        stands_for = facts(node).stands_for
        head = f"{name}: {facts(node).type or 'a step of a conversion'} {_place(node, program)}".rstrip()
        source = old.get(stands_for) or _ancestor(node, old)
        return [head, *(f"  {line}" for line in (_value(source) if source is not None else ()))]
    found = [n for n in old.values() if n.op == "placeholder" and _plain(n.name) == _plain(name)]
    if found:
        return _value(found[0])
    inside = [n for n in old.values() if name == program.report.root or _within(module_path(n), name)]
    if inside:
        return _module(name, inside, program, measures, new, old)
    modules = {module_path(n) for n in old.values()} - {""}
    known = [*modules, *old, *new]
    raise UnknownNameError(
        f'nothing is called "{name}": it is no module, no value and no collective of this graph.'
        f"{did_you_mean(name, known)}\n  Modules: {listing(sorted(modules))}"
    )


def _plain(name: str) -> str:
    """``blocks.0.qkv.weight`` and ``l_self_modules_blocks_modules_0_modules_qkv_parameters_weight_`` alike."""
    words = re.split(r"[._]+", name.lower())
    if words[0] in ("l", "g") and words[-1] == "":
        words = words[1:]
    return " ".join(w for w in words if w not in ("self", "kwargs", "modules", "parameters", "buffers", ""))


def _within(path: str, name: str) -> bool:
    return path == name or path.startswith(f"{name}.")


def _place(node: Node, program: Program | None = None) -> str:
    root = program.report.root if program is not None else ""
    parts = [part for part in (module_path(node) or root, node_source(node)) if part]
    return f"({', '.join(parts)})" if parts else ""


def _ancestor(node: Node, old: dict[str, Node]) -> Node | None:
    """The nearest value of the global program, split if there is one, that a step of a conversion was made of."""

    def named(current: Node) -> Node | None:
        return None if current is node else old.get(facts(current).stands_for)

    steps = reachable([node], lambda n: n.all_input_nodes, stop=lambda n: named(n) is not None)
    found = [value for n in steps if (value := named(n)) is not None]
    return next(filter(is_split, found), next(iter(found), None))


def _value(node: Node) -> list[str]:
    """The value, and the operands that its type came from, up to the plan."""
    lines: list[str] = []
    seen: set[Node] = set()
    current: Node | None = node
    while current is not None and current not in seen and len(lines) < 40:
        seen.add(current)
        type_ = facts(current).type
        shown = ", ".join(map(str, type_)) if isinstance(type_, tuple) else str(type_ if type_ is not None else "")
        lines.append(f"{current.name}: {shown} {_place(current)}".rstrip())
        origin = getattr(type_[0] if isinstance(type_, tuple) and type_ else type_, "origin", "")
        if origin:
            lines.append(f"  by {origin}")
        if "fxsp.annotate" in str(current.target):
            lines[-1] = f"  by the plan: {current.args[4]}"
            break
        decision = facts(current).decision
        if decision is not None and decision.reason:
            lines.append(f"  gathers: {decision.reason}")
        split = [n for n in current.all_input_nodes if isinstance(facts(n).type, Shard)]
        several = [n for n in current.all_input_nodes if isinstance(facts(n).type, tuple)]
        current = next(iter([*split, *several]), None)
    return lines


def _collective(
    which: list[int], program: Program, measures: Measures, new: dict[str, Node], old: dict[str, Node]
) -> list[str]:
    """One collective, or the steps of a ring, which are one value."""
    record, node = program.report.collectives[which[0]], new[program.report.collectives[which[0]].value]
    formulas = [f for i in which if (f := measures.forward[i].formula) is not None]
    sent = format_bytes(sum(measures.forward[i].bytes for i in which))
    times = f"{len(which)} x " if len(which) > 1 else ""
    lines = [f"{record.value}: {times}{record.kind}, {sent} per rank {_place(node, program)}".rstrip()]
    if formulas:
        lines.append(f"  bytes: {format_formulas(formulas, measures.names)}; {legend_text(measures)}")
    lines.append(f"  why: {record.reason or 'a value is needed in another form'}")
    attention = next(
        (a for a in program.report.attentions if (a.module, a.source) == (record.module, record.source)), None
    )
    if attention is not None and "attention" in record.reason:
        lines.append(f"  method: {attention.method}" + (f"; {attention.detail}" if attention.detail else ""))
        lines += [f"    not {method}: {why}" for method, why in attention.rejected]
    lines.append(f"  what would remove it: {_remedy(record, program)}")
    gradients: dict[tuple[str, str], list[int]] = {}
    for b in measures.backward:
        if b.record.value == record.value:
            gradients.setdefault((b.record.kind, b.record.reason), []).append(b.bytes)
    for (kind, reason), sizes in gradients.items():
        times = f"{len(sizes)} x " if len(sizes) > 1 else ""
        lines.append(f"  backward: {times}{kind}, {format_bytes(sum(sizes))} per rank: {reason}")
    source = old.get(facts(node).stands_for) or _ancestor(node, old)
    if source is not None:
        lines += ["  it comes from:", *(f"    {line}" for line in _value(source))]
    return lines


def _remedy(record: CollectiveRecord, program: Program) -> str:
    reason = record.reason
    if "written out" in reason:
        return 'scaled_dot_product_attention (attn_implementation="sdpa" in transformers): its heads are exchanged'
    if "keys and values" in reason and record.kind == "all_gather":
        return "keys and values that are whole on every rank already, or ulysses_degree and ring_degree in the options"
    if "attention" in reason:
        return "only keys and values that are whole on every rank (then attention is local), or fewer ranks"
    if "graph output" in reason:
        return "an output that is no sequence (its mean, say), or a larger graph: a graph break ends the split region"
    if "not opened" in reason:
        return "ordinary operators in place of what is not opened: they run on shards"
    if record.kind == "all_reduce":
        return "no sum over tokens here; it is as small as its result"
    if any(reason == p.entry for p in program.report.plan):
        return f"taking the entry `{reason}` out of the plan: the value then stays split as long as it can"
    if "is needed as" in reason:
        return "a plan that splits both values in the same way"
    if "written" in reason:
        return "not writing a value that is split to an input or buffer"
    return "an operator that does not need all tokens in place of this one, or leaving its operand out of the plan"


def _module(
    name: str, inside: list[Node], program: Program, measures: Measures, new: dict[str, Node], old: dict[str, Node]
) -> list[str]:
    lines = [f"{name}: {len(inside)} values"]
    whole = name == program.report.root
    lines += [
        f"  plan: {entry.entry}: " + ("applied" if entry.applied else f"not applied: {entry.detail}")
        for entry in program.report.plan
        if _within(re.split(r"[\[:]", entry.entry)[0], name) or (whole and entry.entry.startswith("<root>"))
    ]
    for record in program.report.attentions:
        if whole or _within(record.module, name):
            lines.append(
                f"  attention: {record.method} ({record.source}){'; ' if record.detail else ''}{record.detail}"
            )
            lines += [f"    not {method}: {why}" for method, why in record.rejected]
    places: dict[str, list[int]] = {}
    for i, collective in enumerate(program.report.collectives):
        if (whole or _within(collective.module, name)) and collective.value in new:
            places.setdefault(collective.value, []).append(i)
    for which in places.values():
        chain = _collective(which, program, measures, new, old)
        lines += [f"  {line}" for line in chain if not line.startswith(("  method", "  it comes from", "    "))]
    for gather in program.report.implicit_gathers:
        if whole or _within(gather.module, name):
            lines.append(f"  implicit gather: {gather}")
    split = next((n for n in inside if isinstance(facts(n).type, Shard)), None)
    if split is not None:
        lines += ["  its first split value:", *(f"    {line}" for line in _value(split))]
    else:
        lines.append("  nothing in it is split")
    return lines
