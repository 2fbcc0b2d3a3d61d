"""``torch.compile(model, backend="sp")``: the Dynamo backend.

One call compiles one graph: capture, annotate, normalize, functionalize, the pipeline, then the inner compiler.  What
cannot be normalized runs unsharded on every rank, with a warning that says why; a wrong plan, a wrong option or an
unsupported construct is an error before anything ran.
"""

from __future__ import annotations

import threading
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch.fx import GraphModule

from fxsp import torch_internals
from fxsp.capture.capture import Capture, capture, install, modules_of_compilation, splits_of_compilation
from fxsp.capture.graph_breaks import remembering
from fxsp.config import Options, resolve_degrees, resolve_ranks
from fxsp.errors import DegreeWarning, FxspError, ImplicitGatherWarning, UnshardedWarning, UnsupportedError
from fxsp.inner import compile_inner, needs_values
from fxsp.inspection.stages import StageWriter
from fxsp.passes.annotate.annotate import annotate
from fxsp.passes.annotate.carry import carry, is_worth_splitting
from fxsp.passes.attention.degrees import IGNORED
from fxsp.passes.base import Program
from fxsp.passes.functionalize.functionalize import functionalize
from fxsp.passes.normalize.normalize import normalize
from fxsp.passes.normalize.regions import open_regions
from fxsp.passes.partition.defer import scale_summands
from fxsp.passes.pipeline import STAGES, Runner, partition_program
from fxsp.passes.propagate.propagate import is_annotate
from fxsp.passes.verify import infer_local
from fxsp.plan import PlanEntry, SequenceParallelConfig
from fxsp.process_groups import missing_group, on_its_group
from fxsp.ranks.alike import Alike, decisions
from fxsp.ranks.channel import channel_of
from fxsp.ranks.checks import check_inputs
from fxsp.ranks.failures import guarded
from fxsp.ranks.watcher import watch
from fxsp.report import Report
from fxsp.said import EMPTY_PLAN, say_outputs, say_share
from fxsp.simulation.first_call import Trial
from fxsp.source import input_name
from fxsp.summands import Convention
from fxsp.types import Ranks

__all__ = ["Before", "compile_graph", "keep_report", "left_to_hooks", "reports", "sp"]

_reports: list[Report] = []
_lock = threading.Lock()


def reports() -> list[Report]:
    """The reports of all graphs that this process has compiled, or left to hooks, newest last."""
    with _lock:
        return list(_reports)


def keep_report(report: Report) -> None:
    """Add a report to those of this process."""
    with _lock:
        _reports.append(report)


def sp(
    gm: GraphModule, example_inputs: Sequence[Any], *, options: dict[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """The backend ``"sp"``: ``gm`` as a function that computes the same, with its token sequence split over the ranks.

    ``gm`` is Dynamo's graph, ``example_inputs`` its inputs, ``options`` those of :class:`fxsp.config.Options`.
    Raises :class:`~fxsp.errors.FxspError`: ``OptionError``, ``PlanError``, ``UnsupportedError`` or ``StrictError``.
    """
    try:
        try:
            parsed = Options.parse(options, mode)
            ranks = resolve_ranks(parsed)
        except FxspError as error:
            _say_refused(options, error)
            raise
        return _compile(gm, example_inputs, parsed, ranks)
    except FxspError as error:
        # Dynamo would wrap it in an error of its own, whose type says nothing.
        raise torch_internals.unwrapped_by_dynamo(error) from error.__cause__


class Before:
    """Another backend, which gets the program of one rank: what ``sp`` makes of the graph, compiled by ``compiler``.

    ``root`` is the module that ``plan`` is for.  What ``sp`` refuses runs whole on every rank, with a warning.
    """

    def __init__(
        self,
        compiler: Any,
        root: torch.nn.Module,
        plan: Sequence[PlanEntry],
        config: SequenceParallelConfig | None,
        group: Any,
    ) -> None:
        # Of DDP's optimizer the backend: it would cut the graph in pieces.
        self.compiler_fn = getattr(getattr(compiler, "__self__", None), "backend_compile_fn", compiler)
        self.func = sp  # what this is for who looks through the layers of a backend
        self.__name__ = f"sp before {getattr(self.compiler_fn, '__name__', 'another')}"
        self._root = weakref.ref(root)
        options = Options.parse({"plan": plan, "config": config, "group": group})
        self.options = replace(options, inner=self.compiler_fn)

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            return _compile(gm, example_inputs, self.options, resolve_ranks(self.options), self._root())
        except FxspError as error:
            raise torch_internals.unwrapped_by_dynamo(error) from error.__cause__


install(lambda backend: backend is sp)
torch_internals.keep_graphs_whole(lambda backend: backend is sp)


def _say_refused(options: dict[str, Any] | None, error: FxspError) -> None:
    """Tell the other ranks, which wait for this one, that its options are refused."""
    given = options if isinstance(options, Mapping) else {}
    try:
        only = Options.parse({name: given[name] for name in ("group", "mesh") if given.get(name) is not None})
        ranks = resolve_ranks(only)
    except FxspError:
        return  # of which group it is a member is not known
    channel = channel_of(only.process_group(), ranks)
    if channel is not None:
        channel.failed(error)


def _limit_reached(compiler: Any, code: CodeType, reason: str) -> None:
    """Dynamo leaves a function to Python from now on: right on all ranks, or refused on all of them."""
    # Under DistributedDataParallel it is a method of an optimizer, which holds the backend.
    compiler = getattr(getattr(compiler, "__self__", None), "backend_compile_fn", compiler)
    layers = torch_internals.backend_layers(compiler)
    before = next((layer for layer in layers if isinstance(layer, Before)), None)
    given = torch_internals.options_for(sp, compiler)
    if before is None and given is None:
        return
    options = before.options if before is not None else Options.parse(given)
    channel = channel_of(options.process_group(), resolve_ranks(options))
    if channel is None:
        return
    where = f"{code.co_name} ({Path(code.co_filename).name}:{code.co_firstlineno})"
    what = (
        f"has reached Dynamo's recompile limit and runs {where} uncompiled, whole on every rank; the last guard that "
        f"failed: {' '.join(reason.split())}"
    )
    try:
        channel.agree("uncompiled", what, {})
    except FxspError as error:
        raise torch_internals.unwrapped_by_dynamo(error) from error.__cause__
    warnings.warn(UnshardedWarning(f"this process {what}"), stacklevel=2)


torch_internals.on_recompile_limit(_limit_reached)


def _compile(
    gm: GraphModule, inputs: Sequence[Any], options: Options, ranks: Ranks, root: torch.nn.Module | None = None
) -> Callable[..., Any]:
    if options.inner != "eager":
        torch_internals.restart_for_numbers(torch_internals.compile_fake_mode(inputs))
    channel = channel_of(options.process_group(), ranks)
    if channel is None:
        return _compile_here(gm, inputs, options, ranks, root).run
    watch()
    alike = Alike(gm, inputs, options, ranks)
    channel.agree("compile", alike.what, alike.topics)
    try:
        made = _compile_here(gm, inputs, options, ranks, root)
    except BaseException as error:
        if not torch_internals.is_restart(error):  # which all ranks do
            channel.failed(error)
        raise
    # What one rank could not compile would keep the others waiting in their first collective.
    channel.agree("compiled", alike.what.replace("compiles", "has compiled", 1), made.decided)
    run = made.run
    if made.split:  # a graph that runs whole waits for nobody
        run = guarded(run, channel, alike.graph)
    if made.planned and options.check_inputs is not False:
        run = check_inputs(run, alike, channel, each_call=options.check_inputs is True and made.split)
    return on_its_group(run, ranks) if made.split else run


@dataclass(frozen=True)
class _Made:
    """A compiled graph, what was decided about it, and whether a plan speaks of it, and splits it."""

    run: Callable[..., Any]
    decided: dict[str, str]
    planned: bool
    split: bool


def _compile_here(
    gm: GraphModule, inputs: Sequence[Any], options: Options, ranks: Ranks, root: torch.nn.Module | None
) -> _Made:
    report, program = compile_graph(gm, inputs, options, ranks, root=root)
    keep_report(report)
    try:
        return _run(gm, inputs, options, ranks, root, report, program)
    except Exception as error:
        if torch_internals.is_restart(error):
            with _lock:
                _reports.remove(report)
        raise


def _run(
    gm: GraphModule,
    inputs: Sequence[Any],
    options: Options,
    ranks: Ranks,
    root: torch.nn.Module | None,
    report: Report,
    program: Program | None,
) -> _Made:
    splits = splits_of_compilation()
    around = [*modules_of_compilation(), *([] if root is None else [root])]
    convention = Convention(ranks.size if options.grad_reduce == "defer" else 1, around)
    if program is None:
        decided = decisions(report, None)
        run = remembering(_finish(gm, inputs, options, report), report.split_outputs, splits)
        return _Made(convention.holding(run, inputs), decided, planned=bool(report.plan), split=False)
    names = [
        input_name(torch_internals.input_source(node)) or str(node.target)
        for node in gm.graph.find_nodes(op="placeholder")
    ]
    trial = Trial(program, open_regions(gm).forward, names, options.process_group()) if options.verify else None
    if options.deferred:
        scale_summands(program.gm, ranks.size)
    decided = decisions(report, program.gm)
    run = remembering(_finish(program.gm, inputs, options, report, normalized=True), report.split_outputs, splits)
    for graph in (program.gm, program.facts["global"]):
        torch_internals.forget_examples(graph)
    if trial is not None:
        run = trial.wrap(run)
    return _Made(convention.holding(run, inputs), decided, planned=True, split=True)


def left_to_hooks(compiler: Any, module: torch.nn.Module) -> None:
    """Of a model that ``compiler`` gave up, and hooks run: gradients are left as its options say, if they are ours."""
    options = torch_internals.options_for(sp, compiler)
    if options is not None and options.get("grad_reduce") == "defer":
        Convention(resolve_ranks(Options.parse(options)).size, [module]).hold()


def compile_graph(
    gm: GraphModule,
    inputs: Sequence[Any],
    options: Options,
    ranks: Ranks,
    stages: StageWriter | None = None,
    root: torch.nn.Module | None = None,
) -> tuple[Report, Program | None]:
    """Dynamo's graph as the program of one rank, up to the inner compiler; no program where it stays whole.

    ``root`` is the module that the plan is for, where that is known; what is unsupported in it stays whole, too.
    Where it stays whole, ``gm`` computes what it did before, and the report says why.
    """
    _check_stages(options)
    report = Report()
    captured = capture(gm, options.plan, root)
    report.notes.extend(captured.notes)
    if captured.root is not None:
        report.root = type(captured.root).__name__
    translation = torch_internals.Translation.current()
    report.notes.extend(translation.said() if translation is not None else [])
    report.outputs.extend(map(input_name, translation.output_names(gm)) if translation is not None else [])
    runner = stages or StageWriter(options.print, ranks)
    runner.text("captured", gm, report)
    if captured.entries is None:
        report.unsharded = "no plan: give options={'plan': ...}, or the model a _sp_plan or _cp_plan"
        if ranks.size > 1:
            warnings.warn(UnshardedWarning(f"this graph is not split. {report.unsharded}"), stacklevel=2)
        return report, None
    report.plan.extend(annotate(gm, captured, captured.entries, ranks))
    carried = carry(gm, captured, captured.entries) if ranks.size > 1 else []
    report.plan.extend(carried)
    runner.text("annotated", gm, report)
    if ranks.size == 1:
        missing = "" if ranks.group else missing_group()
        report.unsharded = f"one rank. {missing}" if missing else "one rank" if captured.entries else EMPTY_PLAN
        return report, None
    if not any(record.applied for record in report.plan):
        report.unsharded = "no entry of the plan applies to this graph" if captured.entries else EMPTY_PLAN
        _say_unsharded(report, captured)
        return report, None
    try:
        strict = options.strict and not carried
        program = _partition(gm, inputs, replace(options, strict=strict), ranks, report, runner)
    except UnsupportedError as error:
        # A split that the plan did not ask for here is no reason to refuse anything.
        if not getattr(error, "whole_graph", False) and not carried and root is None:
            raise
        report.unsharded = str(error)
        _say_unsharded(report, captured)
        _remove_annotations(gm)
        return report, None
    if carried and not is_worth_splitting(program):
        report.unsharded = "the plan says nothing about it, and it has too little to do for splitting it again"
        report.plan[-len(carried) :] = [replace(record, applied=False) for record in carried]
        report.collectives.clear()
        report.backward.clear()
        report.implicit_gathers.clear()
        _say_unsharded(report, captured)
        _remove_annotations(gm)
        return report, None
    _say_gathers(report)
    say_share(program, options.strict and not carried)
    say_outputs(program, options.strict and not carried)
    _say_degrees(program)
    return report, program


def _is_training(inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)


def _partition(
    gm: GraphModule,
    inputs: Sequence[Any],
    options: Options,
    ranks: Ranks,
    report: Report,
    runner: StageWriter,
) -> Program:
    start = time.perf_counter()
    try:
        normal = normalize(gm, inputs)
        report.timings["normalized"] = time.perf_counter() - start
        runner.text("normalized", normal, report)
        start = time.perf_counter()
        normal = functionalize(normal)
        report.timings["functionalized"] = time.perf_counter() - start
    except UnsupportedError as error:
        # Nothing is known about the types of such a graph: it can still run whole.
        error.whole_graph = True  # type: ignore[attr-defined]
        raise
    for node, value in zip(normal.graph.find_nodes(op="placeholder"), inputs, strict=True):
        node.meta["is_parameter"] = isinstance(value, torch.nn.Parameter)
    runner.text("functionalized", normal, report)
    degrees = resolve_degrees(options, ranks.size)
    program = Program(
        normal,
        ranks,
        report,
        training=_is_training(inputs),
        strict=options.strict,
        grad_reduce="defer" if options.deferred else options.grad_reduce,
        rng=options.rng,
        ulysses_degree=degrees.ulysses,
        ring_degree=degrees.ring,
        gather_degree=degrees.allgather,
        latency=options.latency,
        bandwidth=options.bandwidth,
        gather_limit=options.gather_limit,
    )
    program = partition_program(program, Runner(runner.watch, runner.program))
    torch_internals.carry_dynamo_facts(gm, program.gm)
    if needs_values(options.inner):
        # AOTAutograd traces the local graph again; without it the local values have to be known here.
        infer_local(program)
        for node in program.graph.nodes:
            node.meta["val"] = node.meta.get("local_val")
    return program


def _finish(
    gm: GraphModule, inputs: Sequence[Any], options: Options, report: Report, *, normalized: bool = False
) -> Callable[..., Any]:
    """Hand the graph to the inner compiler."""
    if not normalized and torch_internals.resizes_storage(gm):
        return gm.forward  # AOTAutograd would free the memory before it is used
    training = _is_training(inputs)
    if not normalized and (training or options.inner == "eager"):
        gm = open_regions(gm)
    start = time.perf_counter()
    if not normalized or not torch_internals.any_autocast():
        compiled = compile_inner(gm, inputs, options.inner, options.mode, training)
        report.timings["inner"] = time.perf_counter() - start
        return compiled
    with torch_internals.without_autocast():
        inner = compile_inner(gm, inputs, options.inner, options.mode, training)
    report.timings["inner"] = time.perf_counter() - start

    def run(*args: Any) -> Any:
        # The casts of autocast are nodes of the graph.
        with torch_internals.without_autocast():
            return inner(*args)

    return run


def _check_stages(options: Options) -> None:
    from fxsp.errors import OptionError
    from fxsp.plan import did_you_mean, listing

    for stage in options.print:
        if stage not in STAGES:
            raise OptionError(
                f"option 'print' names a stage {stage!r} that does not exist.{did_you_mean(stage, STAGES)}\n"
                f"  Stages: {listing(STAGES)}"
            )


def _say_unsharded(report: Report, captured: Capture) -> None:
    name = type(captured.root).__name__ if captured.root is not None else "a function"
    remedy = "fxsp.explain shows what the plan reaches; rewrite that line, or keep it out with torch.compiler.disable"
    text = f"a graph of {name} runs whole on every rank (right, and not split): {report.unsharded}.\n  {remedy}"
    warnings.warn(UnshardedWarning(text), stacklevel=2)


def _say_gathers(report: Report) -> None:
    """One warning for each compile, not one for each gather."""
    gathers = [g for g in report.implicit_gathers if g.kind == "implicit"]
    if not gathers:
        return
    shown = "\n  ".join(str(g) for g in gathers[:8])
    more = f"\n  and {len(gathers) - 8} more" if len(gathers) > 8 else ""
    more += "\n  A SequenceParallelOutput before such an operator asks for the gather; strict=True refuses it"
    warnings.warn(
        ImplicitGatherWarning(f"{len(gathers)} sharded values have to be gathered:\n  {shown}{more}"), stacklevel=2
    )


def _say_degrees(program: Program) -> None:
    """One warning for each compile: what does not run by the degrees that were asked for."""
    ignored = list(dict.fromkeys(program.facts.get(IGNORED, [])))
    if ignored:
        more = f"\n  and {len(ignored) - 4} more" if len(ignored) > 4 else ""
        warnings.warn(DegreeWarning("\n  ".join(ignored[:4]) + more), stacklevel=2)


def _remove_annotations(gm: GraphModule) -> None:
    for module in gm.modules():
        if not isinstance(module, GraphModule):
            continue
        for node in list(module.graph.nodes):
            if is_annotate(node):
                node.replace_all_uses_with(node.args[0])
                module.graph.erase_node(node)
        module.recompile()
