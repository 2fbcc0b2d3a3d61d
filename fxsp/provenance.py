"""Why: the chain of reasons behind a value, a module's attention, or a collective.

Every type carries its origin (the plan line, or the rule and the edge it came by), and every collective its reason;
here they are put in a row, from the value that was asked for back to the plan.
"""

from __future__ import annotations

from torch.fx import Node

from fxsp.formula import format_formulas
from fxsp.measures import Measures
from fxsp.passes.base import Program
from fxsp.plan import did_you_mean, listing
from fxsp.printer import format_bytes
from fxsp.report import CollectiveRecord
from fxsp.source import module_path, node_source
from fxsp.types import Shard

__all__ = ["UnknownNameError", "reasons"]


class UnknownNameError(KeyError):
    """Nothing in the explanation has this name."""

    def __str__(self) -> str:
        return str(self.args[0])


def reasons(name: str, program: Program, measures: Measures) -> list[str]:
    """Lines that say why; raises :class:`UnknownNameError` if there is no value and no module of that name."""
    old = {n.name: n for n in program.facts["global"].graph.nodes if n.op != "output"}
    new = {n.name: n for n in program.graph.nodes if n.op != "output"}
    records = program.report.collectives
    collective = next((i for i, record in enumerate(records) if record.value == name), None)
    if collective is not None:
        return _collective(records[collective], collective, program, measures, new[name], old)
    if name in old:
        return _value(old[name])
    if name in new:
        node = new[name]
        stands_for = node.meta.get("global_name", "")
        head = f"{name}: {node.meta.get('sp', 'a step of a conversion')} {_place(node)}".rstrip()
        return [head, *(f"  {line}" for line in (_value(old[stands_for]) if stands_for in old else ()))]
    inside = [n for n in old.values() if _within(module_path(n), name)]
    if inside:
        return _module(name, inside, program, measures, new, old)
    modules = {module_path(n) for n in old.values()} - {""}
    known = [*modules, *old, *new]
    raise UnknownNameError(
        f'nothing is called "{name}": it is no module, no value and no collective of this graph.'
        f"{did_you_mean(name, known)}\n  Modules: {listing(sorted(modules))}"
    )


def _within(path: str, name: str) -> bool:
    return path == name or path.startswith(f"{name}.")


def _place(node: Node) -> str:
    parts = [part for part in (module_path(node), node_source(node)) if part]
    return f"({', '.join(parts)})" if parts else ""


def _value(node: Node) -> list[str]:
    """The value, and the operands that its type came from, up to the plan."""
    lines: list[str] = []
    seen: set[Node] = set()
    current: Node | None = node
    while current is not None and current not in seen and len(lines) < 40:
        seen.add(current)
        type_ = current.meta.get("sp")
        shown = ", ".join(map(str, type_)) if isinstance(type_, tuple) else str(type_ if type_ is not None else "")
        lines.append(f"{current.name}: {shown} {_place(current)}".rstrip())
        origin = getattr(type_[0] if isinstance(type_, tuple) and type_ else type_, "origin", "")
        if origin:
            lines.append(f"  by {origin}")
        if "fxsp.annotate" in str(current.target):
            lines[-1] = f"  by the plan: {current.args[4]}"
            break
        decision = current.meta.get("sp_call")
        if decision is not None and decision.reason:
            lines.append(f"  gathers: {decision.reason}")
        split = [n for n in current.all_input_nodes if isinstance(n.meta.get("sp"), Shard)]
        several = [n for n in current.all_input_nodes if isinstance(n.meta.get("sp"), tuple)]
        current = next(iter([*split, *several]), None)
    return lines


def _collective(
    record: CollectiveRecord, i: int, program: Program, measures: Measures, node: Node, old: dict[str, Node]
) -> list[str]:
    formula = measures.formulas[i]
    lines = [f"{record.value}: {record.kind}, {format_bytes(measures.sent[i])} per rank {_place(node)}".rstrip()]
    if formula is not None:
        lines.append(f"  bytes: {format_formulas([formula], measures.names)}")
    lines.append(f"  why: {record.reason or 'a value is needed in another form'}")
    lines.append(f"  what would remove it: {_remedy(record, program)}")
    source = next((n for n in [node, *node.all_input_nodes] if n.meta.get("global_name") in old), None)
    if source is not None:
        lines += [f"  {line}" for line in _value(old[source.meta["global_name"]])]
    return lines


def _remedy(record: CollectiveRecord, program: Program) -> str:
    if "attention" in record.reason:
        return "only keys and values that are whole on every rank (then attention is local), or fewer ranks"
    if "graph output" in record.reason:
        return "an output that is no sequence (its mean, say), or a larger graph: a graph break ends the split region"
    if record.kind == "all_reduce":
        return "no sum over tokens here; it is as small as its result"
    if any(record.reason == p.entry for p in program.report.plan):
        return f"taking the entry `{record.reason}` out of the plan: the value then stays split as long as it can"
    return "an operator that does not need all tokens in place of this one, or leaving its operand out of the plan"


def _module(
    name: str, inside: list[Node], program: Program, measures: Measures, new: dict[str, Node], old: dict[str, Node]
) -> list[str]:
    lines = [f"{name}: {len(inside)} values"]
    for record in program.report.attentions:
        if _within(record.module, name):
            lines.append(
                f"  attention: {record.method} ({record.source}){'; ' if record.detail else ''}{record.detail}"
            )
            lines += [f"    not {method}: {why}" for method, why in record.rejected]
    for i, collective in enumerate(program.report.collectives):
        if _within(collective.module, name) and collective.value in new:
            chain = _collective(collective, i, program, measures, new[collective.value], old)
            lines += [f"  {line}" for line in chain[:4]]
    for gather in program.report.implicit_gathers:
        if _within(gather.module, name):
            lines.append(f"  implicit gather: {gather}")
    split = next((n for n in inside if isinstance(n.meta.get("sp"), Shard)), None)
    if split is not None:
        lines += ["  its first split value:", *(f"    {line}" for line in _value(split))]
    else:
        lines.append("  nothing in it is split")
    return lines
