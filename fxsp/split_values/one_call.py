"""Functions of torch on split values, where no compiler is: the pipeline, on a graph of one call.

A residual between two blocks, a norm and a projection after the last one: each call is partitioned by the same rules as
a compiled graph, and its program is kept for the next call of its kind.  What has no rule for shards is gathered in it,
and that is said once.  What is no graph of one call (properties, writes, what returns no tensors) is left to
:mod:`fxsp.split_values.dispatch`.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
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
from fxsp.passes.rules.families import family, names_of
from fxsp.ranks.meetings import met
from fxsp.report import Report
from fxsp.said import say_gathers
from fxsp.source import user_frame
from fxsp.split_values.conversions import from_local, to_local
from fxsp.split_values.forward import recording
from fxsp.split_values.value import Placed, SplitTensor
from fxsp.types import Ranks, Shard

__all__ = ["call"]

#: Programs that are kept.
_KEPT = 4096
_programs: OrderedDict[Any, _OneCall | None] = OrderedDict()


@dataclass(frozen=True)
class _OneCall:
    """One call as the program of this rank."""

    run: Callable[..., Any]
    ranks: Ranks
    #: Which of the results are split, and how; their global shapes.
    left: dict[int, tuple[Shard, tuple[int, ...]]]
    spec: Any
    #: Of results that are views on one device: the input, by position among the tensors.
    views: dict[int, int]
    report: Report

    def _run(self, local: Sequence[Tensor]) -> Any:
        if not self.report.collectives:
            return self.run(*local)
        with met(self.ranks, f"runs {self.report.root} on split values{_place()}"):
            return self.run(*local)

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        local = [to_local(x) if isinstance(x, SplitTensor) else x for x in tensors]
        results = list(self._run(local))
        if (forward := recording()) is not None:
            forward.ran(self.report, {}, eager=True)
        for position, (type_, shape) in self.left.items():
            results[position] = from_local(results[position], Placed(type_, self.ranks), shape)
        for position, of in self.views.items():
            base, view = tensors[of], results[position]
            if isinstance(base, SplitTensor) and isinstance(view, SplitTensor):
                view.view_of(base)
        return tree_unflatten(results, self.spec)


def call(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """``func(*args, **kwargs)``; NotImplemented where that is no graph of one call."""
    if not _is_computation(func, kwargs):
        return NotImplemented
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    splits = [x for x in tensors if isinstance(x, SplitTensor)]
    ranks = splits[0].placed.ranks
    if any(x.placed.ranks != ranks for x in splits) or any(_is_odd(x) for x in tensors):
        return NotImplemented
    key = (func, spec, torch.is_grad_enabled(), torch_internals.autocast_state(), *map(_described, leaves))
    try:
        known = key in _programs
    except TypeError:  # an argument without a hash
        return NotImplemented
    if not known:
        if len(_programs) >= _KEPT:
            _programs.popitem(last=False)
        _programs[key] = _partitioned(func, leaves, spec, ranks)
    program = _programs[key]
    if program is None:
        return NotImplemented
    _programs.move_to_end(key)
    return program(tensors)


_NAMED = {"__getitem__": "index"}


def _is_computation(func: Any, kwargs: Any) -> bool:
    """Whether it is a function of tensors that writes to none."""
    if isinstance(func, torch._ops.OpOverload):
        return func.namespace == "aten" and not func._schema.is_mutable and func not in family("same_memory")
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):  # of a property
        return False
    if kwargs.get("out") is not None or kwargs.get("inplace") or name.startswith("__i"):
        return name == "__invert__"
    if getattr(func, "__module__", "") == "torch.nn.functional":
        return not name.endswith("_")
    plain = _NAMED.get(name, name.strip("_") if name.startswith("__") else name)
    plain = plain.removeprefix("r") if name.startswith("__r") and name != "__rshift__" else plain
    if plain.endswith("_") or plain.startswith("is_") or plain in names_of("same_memory"):
        return False
    return hasattr(torch.ops.aten, plain)


def _is_odd(x: Tensor) -> bool:
    if isinstance(x, SplitTensor):
        return not torch_internals.is_plain_tensor(x._local) or not x.is_floating_point()
    return not torch_internals.is_plain_tensor(x)


def _described(leaf: Any) -> Any:
    """What a program depends on."""
    if isinstance(leaf, slice):  # which has no hash
        return slice, leaf.start, leaf.stop, leaf.step
    if not isinstance(leaf, Tensor):
        return type(leaf), leaf
    placed = leaf.placed if isinstance(leaf, SplitTensor) else None
    strides = None if placed else leaf.stride()
    return placed, leaf.dtype, leaf.device, leaf.shape, strides, leaf.requires_grad


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
    say_gathers(program.report)
    run = compile_inner(program.gm, local_examples(inputs, program), "eager", training=training)
    if torch_internals.any_autocast():
        run = torch_internals.outside_autocast(run)
    left = {at: (type_, tuple(map(int, shape))) for at, (type_, shape) in program.left_split.items()}
    if any(at not in left for at in views):
        return None  # a view of the whole value
    program.report.root = name
    return _OneCall(run, ranks, left, spec, views, program.report)


def _place() -> str:
    frame = user_frame()
    return "" if frame is None else f" ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"


def _where() -> str:
    """The line that called, as a stack trace has it."""
    frame = user_frame()
    if frame is None:
        return ""
    return f'  File "{frame.f_code.co_filename}", line {frame.f_lineno}, in {frame.f_code.co_name}\n'
