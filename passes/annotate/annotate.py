"""The plan becomes markers in the graph: ``fxsp.annotate`` nodes, identities that say where a sharding is wanted.

Input (plan ``{"blocks.0": {"x": SequenceParallelInput(1)}, "out": SequenceParallelOutput(1)}``)::

    %l_x_ : placeholder[target=L_x_]
    %h : call_function[target=torch.relu](args = (%l_x_,))
    %y : call_function[target=torch.tanh](args = (%h,))

Output (``relu`` is traced in ``blocks.0``, ``tanh`` in ``out``)::

    %l_x_ : placeholder[target=L_x_]
    %annotate : call_function[target=fxsp.annotate.default](args = (%l_x_, shard, 1, -1, blocks.0[x]: ...))
    %h : call_function[target=torch.relu](args = (%annotate,))
    %y : call_function[target=torch.tanh](args = (%h,))
    %annotate_1 : call_function[target=fxsp.annotate.default](args = (%y, gather, 1, -1, out: ...))

Afterwards every plan entry is either in the graph or in a record that says why it is not; the graph computes what it
did before.  An argument is replaced within the calls of its module only, an output everywhere after the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import guard_or_false

from fxsp import torch_internals
from fxsp.capture.module_calls import Captured, ModuleCall
from fxsp.capture.resolve import ResolvedEntry, resolve_plan
from fxsp.errors import OwnPlanWarning, PlanError, RunsWhole
from fxsp.kernels.ops import fxsp_ops
from fxsp.passes.annotate.dynamo_graph import (
    all_described,
    copy_origin,
    described,
    example_of,
    input_size,
    place_after,
    written_by,
)
from fxsp.passes.base import Pass, Program
from fxsp.passes.normalize.islands import closed_nodes
from fxsp.plan import PlanEntry, SequenceParallelPartialInput, refuse
from fxsp.report import PlanRecord
from fxsp.source import warn
from fxsp.torch_internals import Opaque
from fxsp.types import Ranks, as_length, quotient

__all__ = ["Annotate", "annotate", "remove_annotations", "say_own_plan"]


class Annotate(Pass):
    """After this pass the plan is in the graph."""

    def apply(self, program: Program) -> Program:
        captured = program.captured
        assert captured is not None
        if program.options.plan == "none":
            raise RunsWhole("the plan is 'none'", remedy=None)
        if captured.entries is None:
            return program  # *infer* finds one
        try:
            program.report.plan.extend(annotate(program.gm, captured, captured.entries, program.ranks))
        except PlanError as error:
            if program.options.plan is not None:
                raise
            say_own_plan(program, error)
            remove_annotations(program.gm)
            captured.entries = None
        return program


def remove_annotations(gm: fx.GraphModule) -> None:
    """Take all annotations out of Dynamo's graph and the bodies in it."""
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            found = module.graph.find_nodes(op="call_function", target=fxsp_ops.annotate.default)
            for node in found:
                node.replace_all_uses_with(node.args[0])
                module.graph.erase_node(node)
            if found:
                module.recompile()


def say_own_plan(program: Program, error: PlanError) -> None:
    """Warn that the plan that the model's class carries does not fit: another is looked for."""
    report = program.report
    text = f"the plan of {report.root} does not fit, and another is inferred: {error}"
    report.notes.append(f"the plan that the class carries does not fit: {str(error).splitlines()[0]}")
    warn(OwnPlanWarning(text), first=program.ranks.rank == 0)


def annotate(gm: fx.GraphModule, capture: Captured, entries: Sequence[PlanEntry], ranks: Ranks) -> list[PlanRecord]:
    """Insert the plan's annotations into Dynamo's graph (and the bodies of its higher-order operators), in place.

    Returns a record per entry and module.  With one rank everything is checked and nothing inserted.  Raises
    :class:`~fxsp.errors.PlanError` for names that do not exist, dimensions out of range, an entry that does not
    match the structure of its value (a tuple, an output too many), and entries that contradict one another.
    """
    if capture.root is None:
        why = "; ".join(capture.notes) or "the module that the plan belongs to was not found"
        return [PlanRecord(str(entry), False, why) for entry in entries]
    rows = resolve_plan(entries, capture.root)
    outcomes: dict[ResolvedEntry, list[_Outcome]] = {row: [] for row in rows}
    writer = _Writer(capture, closed_nodes(gm), insert=ranks.size > 1)

    def of(call: ModuleCall, output: bool) -> list[ResolvedEntry]:
        return [row for row in by_module.get(id(call.module), []) if row.entry.is_output == output]

    by_module: dict[int, list[ResolvedEntry]] = {}
    for row in rows:
        by_module.setdefault(id(row.module), []).append(row)
    # Arguments first, outer calls before inner ones: the inner one then annotates what the outer one put there.
    for call in capture.calls:
        for row in of(call, output=False):
            outcomes[row].append(writer.argument(row, call))
    # Outputs in the order in which the calls end, so that an outer call finds what the inner one put there.
    for call in sorted(capture.calls, key=lambda c: c.ended):
        for row in of(call, output=True):
            outcomes[row].append(writer.output(row, call))
    if writer.inserted:
        for module in gm.modules():
            if isinstance(module, fx.GraphModule):
                module.graph.lint()
                module.recompile()
    return [_record(row, outcomes[row], gm, capture) for row in rows]


@dataclass(frozen=True)
class _Outcome:
    applied: bool
    detail: str
    single: bool = False


def _record(row: ResolvedEntry, outcomes: list[_Outcome], gm: fx.GraphModule, capture: Captured) -> PlanRecord:
    if not outcomes:
        return PlanRecord(str(row), False, _why_not_called(row, gm, capture))
    details = list(dict.fromkeys(outcome.detail for outcome in outcomes))
    calls = f" ({len(outcomes)} calls)" if len(outcomes) > 1 else ""
    applied, single = any(o.applied for o in outcomes), all(o.single for o in outcomes)
    return PlanRecord(str(row), applied, "; ".join(details) + calls, single)


def _why_not_called(row: ResolvedEntry, gm: fx.GraphModule, capture: Captured) -> str:
    if row.module is capture.root:
        return "the model's own call is not in this graph: " + ("; ".join(capture.notes) or "only parts of it are")
    own = {id(parameter) for parameter in row.module.parameters()}
    inputs = gm.graph.find_nodes(op="placeholder")
    if any(id(torch_internals.input_example(node)) in own for node in inputs):
        return (
            "module was not called in this graph, though its parameters are used: is its forward called directly, or "
            "are only parts of it called?"
        )
    return "module was not called in this graph"


@dataclass
class _Writer:
    """Finds the values of calls, checks entries against them, and writes the annotations."""

    capture: Captured
    #: Nodes that are not opened, and what they are in: nothing can be split there.
    closed: dict[fx.Node, str]
    insert: bool
    inserted: dict[fx.Node, None] = field(default_factory=dict)
    #: A value -> it and the annotations that stand for it, in the order in which they were made.
    versions: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    #: The last node of a call, where an annotation of an earlier call's output follows it.
    ends: dict[ModuleCall, fx.Node] = field(default_factory=dict)
    #: The length of the values that a call splits for a ``shard_group``.
    groups: dict[tuple[str, ModuleCall], int | torch.SymInt] = field(default_factory=dict)

    # --- arguments

    def argument(self, row: ResolvedEntry, call: ModuleCall) -> _Outcome:
        value = self._argument_value(row, call)
        checked = self._check(row, call, value)
        if isinstance(checked, _Outcome):
            return checked
        node, dim, text_len = checked
        uses = [
            (version, [user for user in version.users if call.contains(user) and user not in self.inserted])
            for version in self._versions(node)
        ]
        uses = [(version, users) for version, users in uses if users]
        if not uses:
            return _Outcome(False, "the argument is not used during the call")
        island = next((self.closed[user] for _, users in uses for user in users if user in self.closed), None)
        uses = [(version, [user for user in users if user not in self.closed]) for version, users in uses]
        uses = [(version, users) for version, users in uses if users]
        if not uses:
            return _Outcome(False, f"the argument is only used inside of {island}, which is not opened")
        if any(write >= min(users) for _, users in uses for write in written_by(call.graph, node)):
            return _Outcome(False, "the tensor is written in place after the call began")
        for version, users in uses if self.insert else []:
            first = min(users)
            with call.graph.inserting_before(first):
                new = self._annotation(row, version, dim, self._length(text_len, call.graph), first)
            for user in users:
                user.replace_input_with(version, new)
        return self._applied(node, dim)

    def _argument_value(self, row: ResolvedEntry, call: ModuleCall) -> Any:
        name, part = row.entry.target, row.entry.part
        assert isinstance(name, str)
        if name not in call.arguments:
            return Opaque("the argument is not passed")
        value = call.arguments[name]
        if value is None or isinstance(value, Opaque):
            return value
        if isinstance(value, (list, tuple)):
            if part is None:
                raise refuse(
                    row,
                    f'"{name}" is a {type(value).__name__} of {len(value)} values; give a list of {len(value)} specs',
                )
            if len(value) != part[1]:
                raise refuse(row, f'"{name}" has {len(value)} values, and the plan lists {part[1]} specs for it')
            return value[part[0]]
        if part is not None:
            raise refuse(row, f'"{name}" is {described(value)}, not a tuple; give one spec instead of a list')
        return value

    # --- outputs

    def output(self, row: ResolvedEntry, call: ModuleCall) -> _Outcome:
        checked = self._check(row, call, self._output_value(row, call))
        if isinstance(checked, _Outcome):
            return checked
        node, dim, text_len = checked
        # A result is split where it is made, an output where the call ends.
        end = node if row.entry.is_result else self.ends.get(call, call.last)
        uses = []
        for version in self._versions(node):
            if version is node or (end is not None and not end < version):
                place = place_after(call.graph, version, end)
                uses.append((version, place, [user for user in version.users if place < user]))
        uses = [(version, place, users) for version, place, users in uses if users]
        if not uses:
            return _Outcome(False, "the output is not used after the call")
        if node in self.closed:
            return _Outcome(False, f"the output is a value inside of {self.closed[node]}, which is not opened")
        if any(write > node and (end is None or write > end) for write in written_by(call.graph, node)):
            return _Outcome(False, "the tensor is written in place after the call")
        for version, place, users in uses if self.insert else []:
            with call.graph.inserting_after(place):
                new = self._annotation(row, version, dim, self._length(text_len, call.graph), version)
            for user in users:
                user.replace_input_with(version, new)
            for other in self.capture.calls:
                if other.ended >= call.ended and self.ends.get(other, other.last) is end and other.graph is call.graph:
                    self.ends[other] = new
        return self._applied(node, dim)

    def _output_value(self, row: ResolvedEntry, call: ModuleCall) -> Any:
        outputs, target = call.outputs, row.entry.target
        if row.entry.is_result:
            return self.capture.result(call, str(target))
        if isinstance(outputs, dict):
            outputs = list(outputs.values())
        if isinstance(outputs, Opaque):
            return outputs
        several = isinstance(outputs, (list, tuple))
        values = list(outputs) if several else [outputs]
        if target is None:
            present = [value for value in values if value is not None]
            if len(present) != 1 and several:
                raise refuse(
                    row, f"the module returns {len(present)} values: {all_described(values)}; give a list of specs"
                )
            return present[0] if present else None
        assert isinstance(target, int)
        if target >= len(values):
            raise refuse(row, f"there is no output {target}; the module returns {len(values)}: {all_described(values)}")
        return values[target]

    # --- both

    def _check(self, row: ResolvedEntry, call: ModuleCall, value: Any) -> _Outcome | tuple[fx.Node, int, Any]:
        """The node, its dimension and the text length (a number, a node, or ``(node, dim)``: a size of it)."""
        what = "result" if row.entry.is_result else "output" if row.entry.is_output else "argument"
        if value is None:
            return _Outcome(False, f"the {what} is None")
        if isinstance(value, Opaque):
            return _Outcome(False, value.why)
        if not isinstance(value, fx.Node) or not isinstance(example_of(value), torch.Tensor):
            return _Outcome(False, f"the {what} is {described(value)}, not a tensor")
        shape, spec = tuple(example_of(value).shape), row.entry.spec
        if spec.expected_dims is not None and spec.expected_dims != len(shape):
            return _Outcome(
                False,
                f"the tensor {described(value)} is {len(shape)}-D, not {spec.expected_dims}-D as expected_dims says",
            )
        if not -len(shape) <= row.entry.dim < len(shape):
            raise refuse(
                row, f"dimension {row.entry.dim} is out of range: the tensor {described(value)} is {len(shape)}-D"
            )
        dim = row.entry.dim % len(shape)
        if isinstance(shape[dim], int) and shape[dim] == 0:
            return _Outcome(False, f"dimension {dim} of the tensor {described(value)} is empty")
        self._check_group(row, call, shape[dim])
        if isinstance(shape[dim], int) and shape[dim] == 1 and row.entry.kind == "shard":
            why = f"dimension {dim} of the tensor {described(value)} is one token: it stays whole"
            return _Outcome(False, why, single=True)
        unit = getattr(spec, "unit", 1)
        if quotient(as_length(shape[dim]), unit) is None:
            return _Outcome(
                False, f"dimension {dim} of the tensor {described(value)} does not consist of units of {unit}"
            )
        text_len: Any = -1
        if isinstance(spec, SequenceParallelPartialInput):
            text_len = self._text_length(spec.text_len_source, call)
            if isinstance(text_len, Opaque):
                return _Outcome(False, f"text_len_source: {text_len.why}")
            # Of a size that may vary this is a guard: what splits the rest needs a rest.
            if isinstance(text_len, int) and guard_or_false(shape[dim] <= text_len):
                return _Outcome(
                    False, f"{text_len} text tokens leave nothing to split of {described(value)} along {dim}"
                )
        return value, dim, text_len

    def _check_group(self, row: ResolvedEntry, call: ModuleCall, length: int | torch.SymInt) -> None:
        """Refuse values of one group that one call splits, and that are of different lengths."""
        group = getattr(row.entry.spec, "shard_group", None)
        if group is None or row.entry.kind == "gather":
            return
        known = self.groups.setdefault((group, call), length)
        if guard_or_false(known != length):
            raise refuse(
                row,
                f"the values of shard_group={group!r} must have the same global sequence length, and these have "
                f"{known} and {length} tokens",
            )

    def _text_length(self, source: str | int, call: ModuleCall) -> Any:
        if isinstance(source, int):
            return source
        calls = (c for c in self.capture.calls if c.module is self.capture.root)
        root = next((c for c in calls if c.graph is call.graph), None)
        holder = call if source in call.arguments or root is None else root
        if source not in holder.arguments:
            return Opaque(f'"{source}" is not passed in this graph')
        value = holder.arguments[source]
        if isinstance(value, Opaque):
            return Opaque(f'"{source}" is {value.why}')
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        example = example_of(value) if isinstance(value, fx.Node) else None
        if isinstance(example, (int, torch.SymInt)):
            return input_size(call.graph, example) or (
                value if value in call.graph.nodes else Opaque(f'"{source}" is computed after the call')
            )
        if not isinstance(example, torch.Tensor) or example.ndim == 0:
            return Opaque(
                f'"{source}" is {described(value)}; it must be an integer, or a tensor with a token dimension'
            )
        dim = 0 if example.ndim <= 2 else 1
        size = example.shape[dim]
        return size if isinstance(size, int) else (value, dim)

    def _length(self, text_len: Any, graph: fx.Graph) -> Any:
        """The text length as an argument of a node; a size that is not known yet becomes a node of its own."""
        if not isinstance(text_len, tuple):
            return text_len
        node, dim = text_len
        with graph.inserting_after(place_after(graph, node)):
            size = graph.call_function(torch.ops.aten.sym_size.int, (node, dim))
        size.meta["example_value"] = example_of(node).shape[dim]
        copy_origin(node, size)
        return size

    def _annotation(self, row: ResolvedEntry, value: fx.Node, dim: int, text_len: Any, origin: fx.Node) -> fx.Node:
        args: tuple[Any, ...] = (value, row.entry.kind, dim, text_len, str(row))
        unit = getattr(row.entry.spec, "unit", 1)
        if unit > 1:
            args = (*args, unit)
        new = value.graph.call_function(fxsp_ops.annotate.default, args)
        new.meta["example_value"] = example_of(value)
        copy_origin(origin, new)
        self.inserted[new] = None
        versions = next((v for v in self.versions.values() if value in v), None)
        (self.versions.setdefault(value, [value]) if versions is None else versions).append(new)
        return new

    def _versions(self, node: fx.Node) -> list[fx.Node]:
        return sorted(self.versions.get(node, [node]))

    def _applied(self, node: fx.Node, dim: int) -> _Outcome:
        alone = "" if self.insert else "; one rank: nothing to split"
        return _Outcome(True, f"{described(node)} along {dim}{alone}")
