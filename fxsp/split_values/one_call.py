"""Functions of torch on split values, where no compiler is: the pipeline, on a graph of one call.

A residual between two blocks, a norm and a projection after the last one: each call is partitioned by the same rules as
a compiled graph, and its program is kept for the next call of its kind.  What has no rule for shards is gathered in it,
and that is said once.  What is no graph of one call (properties, writes, what returns no tensors) is left to
:mod:`fxsp.split_values.dispatch`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from fxsp import torch_internals
from fxsp.config import Options
from fxsp.errors import FxspError
from fxsp.inner import compile_inner
from fxsp.partitioning import give_local_values, is_training, local_examples
from fxsp.passes.base import Program
from fxsp.passes.pipeline import Runner, compile_program
from fxsp.ranks.meetings import met
from fxsp.report import Report
from fxsp.said import say_gathers
from fxsp.source import line_of, user_frame
from fxsp.split_values.conversions import from_local, to_local
from fxsp.split_values.forward import recording
from fxsp.split_values.signature import computes, quick_signature, signature
from fxsp.split_values.value import Kind, Placed, SplitTensor
from fxsp.types import Ranks, Shard

__all__ = ["call"]

#: Programs that are kept.
_KEPT = 4096
_programs: dict[Any, _OneCall | None] = {}
#: The same programs, by what :func:`quick_signature` finds.
_quick: dict[Any, _OneCall] = {}
#: No program is known, not even that there is none.
_NEW: Any = object()


@dataclass(eq=False)
class _OneCall:
    """One call as the program of this rank."""

    run: Callable[..., Any]
    ranks: Ranks
    #: Which of the results are split, and how; their global shapes.
    left: dict[int, tuple[Placed, tuple[int, ...]]]
    #: The structure of the results; None: it is one tensor.
    spec: Any
    #: Of results that are views on one device: the input, by position among the tensors.
    views: dict[int, int]
    report: Report
    #: Whether the ranks meet in it.
    collective: bool
    #: Of results that were in order when it ran first, as they always are then: what they are.
    kinds: dict[int, Kind] = field(default_factory=dict)
    #: That of its only result, if it is no view.
    only: Kind | None = None

    def _run(self, local: Sequence[Tensor]) -> Any:
        line = line_of(user_frame())
        with met(self.ranks, f"runs {self.report.root} on split values{line and f' ({line})'}"):
            return self.run(*local)

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        grad = torch.is_grad_enabled()
        local = []
        for x in tensors:
            if type(x) is SplitTensor:  # without a call, where there is nothing to look after
                rows = x._rows
                usual = rows.family is None and not rows.shared and not (grad and x.requires_grad)
                local.append(rows.local if usual else to_local(x))
            else:
                local.append(x)
        found = self._run(local) if self.collective else self.run(*local)
        if (forward := recording()) is not None:
            forward.ran(self.report, {}, eager=True)
        if self.only is not None and not (grad and found[0].requires_grad):
            return SplitTensor(found[0], self.only.placed, self.only.shape, None, self.only)
        results = list(found)
        for position, (placed, shape) in self.left.items():
            rows, kind = results[position], self.kinds.get(position)
            if kind is None or (grad and rows.requires_grad):
                value = results[position] = from_local(rows, placed, shape)
                if value.local() is rows:
                    self.kinds[position] = value.kind()
                    if self.spec is None and not self.views:
                        self.only = value.kind()
            else:
                results[position] = SplitTensor(rows, placed, shape, None, kind)
        for position, of in self.views.items():
            base, view = tensors[of], results[position]
            if isinstance(base, SplitTensor) and isinstance(view, SplitTensor):
                view.view_of(base)
        return results[0] if self.spec is None else tree_unflatten(results, self.spec)


def call(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """``func(*args, **kwargs)``; NotImplemented where that is no graph of one call."""
    quick, tensors = (None, []) if kwargs else quick_signature(func, args)
    if quick is not None and (known := _quick.get(quick)) is not None:
        return known(tensors)
    if not computes(func, kwargs):
        return NotImplemented
    found = signature(func, args, kwargs)
    if found is None:
        return NotImplemented
    key, tensors = found
    try:
        program = _programs.get(key, _NEW)
    except TypeError:  # an argument without a hash
        return NotImplemented
    if program is _NEW:
        leaves, spec = tree_flatten((args, kwargs))
        ranks = next(x.placed.ranks for x in tensors if isinstance(x, SplitTensor))
        program = _partitioned(func, leaves, spec, ranks)
        if len(_programs) >= _KEPT:
            _programs.clear()  # shapes that change for ever
            _quick.clear()
        _programs[key] = program
    if program is None:
        return NotImplemented
    if quick is not None:
        _quick[quick] = program
    return program(tensors)


def _partitioned(func: Callable[..., Any], leaves: Sequence[Any], spec: Any, ranks: Ranks) -> _OneCall | None:
    """The program of one call; None if it is none."""
    mode = torch_internals.fake_mode()
    graph, arrivals = Graph(), {}
    inputs: list[Tensor] = []
    nodes: list[Any] = []
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            nodes.append(leaf)
            continue
        node = graph.placeholder(f"x{len(inputs)}")
        with mode:
            plain = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)
        node.meta["example_value"] = plain.requires_grad_(leaf.requires_grad)
        if isinstance(leaf, SplitTensor):
            arrivals[len(inputs)] = leaf.placed.type
        nodes.append(node)
        inputs.append(node.meta["example_value"])
    args, kwargs = tree_unflatten(nodes, spec)
    method = func.__name__ if getattr(Tensor, func.__name__, None) is func else None
    made = graph.call_method(method, args, kwargs) if method else graph.call_function(func, args, kwargs)
    made.meta["stack_trace"] = _where()
    values = tree_map_only(torch.fx.Node, lambda node: node.meta["example_value"], (args, kwargs))
    try:
        with (
            mode,
            torch_internals.quiet_fakes(),
            torch_internals.plain_functions(),
            torch_internals.unseen_by_saving_hooks(),
        ):
            result = func(*values[0], **values[1])
    except (RuntimeError, TypeError, ValueError, LookupError, AssertionError):
        return None  # not of shapes alone, or wrong: it says so itself, where it runs
    results, result_spec = tree_flatten(result)
    if not results or not all(isinstance(x, Tensor) for x in results) or any(x is y for x in results for y in inputs):
        return None
    made.meta["example_value"] = result
    several = not isinstance(result, Tensor)
    if several and not all(type(result) in (tuple, list) and r is s for r, s in zip(result, results, strict=True)):
        return None
    outputs = [graph.call_function(operator.getitem, (made, i)) for i in range(len(results))] if several else [made]
    for node, value in zip(outputs, results, strict=True):
        node.meta["example_value"] = value
    graph.output(tuple(outputs))
    memory = {torch_internals.storage_key(x): at for at, x in enumerate(inputs)}
    views = {at: memory[key] for at, x in enumerate(results) if (key := torch_internals.storage_key(x)) in memory}
    if views and torch.is_inference_mode_enabled():
        return None  # writes are not counted
    return _compiled(GraphModule({}, graph), func.__name__, inputs, arrivals, views, ranks, result_spec)


def _compiled(
    gm: GraphModule,
    name: str,
    inputs: list[Any],
    arrivals: dict[int, Shard],
    views: dict[int, int],
    ranks: Ranks,
    spec: Any,
) -> _OneCall | None:
    training = is_training(inputs)
    program = Program(gm, ranks, training=training, options=Options(), inputs=inputs)
    program.arrivals, program.split_outputs = arrivals, True
    try:
        program = compile_program(program, Runner())
    except FxspError:
        return None
    give_local_values(program)
    say_gathers(program.report, first=program.ranks.rank == 0)
    run = compile_inner(program.gm, local_examples(inputs, program), "eager", training=training)
    run = _alone(program.gm) or run
    if torch_internals.any_autocast():
        run = torch_internals.outside_autocast(run)
    left = {at: (Placed(type_, ranks), tuple(map(int, shape))) for at, (type_, shape) in program.left_split.items()}
    if any(at not in left for at in views):
        return None  # a view of the whole value
    program.report.root = name
    return _OneCall(
        run, ranks, left, None if spec.is_leaf() else spec, views, program.report, bool(program.report.collectives)
    )


def _alone(gm: GraphModule) -> Callable[..., Any] | None:
    """What runs a program that is one operator of ATen on its inputs as they come: not even its code."""
    *inputs, node, output = gm.graph.nodes
    usual = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten" and not node.kwargs
    if not usual or any(x.op != "placeholder" for x in inputs) or list(node.args) != inputs:
        return None
    if output.args[0] != (node,):
        return None
    operator = node.target._op
    return lambda *args: (operator(*args),)


def _where() -> str:
    """The line that called, as a stack trace has it."""
    frame = user_frame()
    if frame is None:
        return ""
    return f'  File "{frame.f_code.co_filename}", line {frame.f_lineno}, in {frame.f_code.co_name}\n'
