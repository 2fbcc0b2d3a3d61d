"""``torch.compile(model, backend="sp")``: the Dynamo backend.

One call compiles one graph: the pipeline (:mod:`fxsp.passes.pipeline`), then the inner compiler.  What cannot be
normalized runs unsharded on every rank, with a warning that says why; a wrong plan, a wrong option or an unsupported
construct is an error before anything ran.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch.fx import GraphModule

from fxsp import torch_internals
from fxsp.capture.capture import (
    frame_module,
    install,
    modules_of_compilation,
    splits_of_compilation,
    watch_tracing,
)
from fxsp.capture.graph_breaks import remembering
from fxsp.config import Options, resolve_ranks
from fxsp.errors import FxspError, UnshardedWarning
from fxsp.inner import compile_inner
from fxsp.measured import find_machine
from fxsp.model_report import compiled_for
from fxsp.partitioning import compile_graph, is_training, local_examples
from fxsp.passes.base import Program
from fxsp.passes.normalize.regions import open_regions
from fxsp.passes.partition.defer import scale_summands
from fxsp.plan import PlanEntry, SequenceParallelConfig
from fxsp.process_groups import on_its_group
from fxsp.ranks.alike import Alike, decisions
from fxsp.ranks.channel import channel_of
from fxsp.ranks.checks import check_inputs
from fxsp.ranks.failures import guarded
from fxsp.ranks.watcher import watch
from fxsp.report import Report
from fxsp.simulation.first_call import Trial
from fxsp.source import input_names, warn
from fxsp.split_values.boundary import Edge
from fxsp.split_values.calls import models_around
from fxsp.split_values.entrance import SplitFirst, watch_entrances
from fxsp.summands import Convention
from fxsp.telling import begin, end, tell_summary
from fxsp.torch_internals import Translation
from fxsp.types import Ranks

__all__ = ["Before", "keep_report", "left_to_hooks", "reports", "sp"]

#: How many reports a process keeps: one that compiles for ever (lengths that change, models that come and go) must not
#: grow for ever.
REPORTS_KEPT = 4096
_reports: deque[Report] = deque(maxlen=REPORTS_KEPT)
_lock = threading.Lock()


def reports() -> list[Report]:
    """The reports of the graphs that this process has compiled, or left to hooks: the last :data:`REPORTS_KEPT`, newest
    last.
    """
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
    with torch_internals.through_dynamo(FxspError):
        try:
            parsed = Options.parse(options, mode)
            ranks = resolve_ranks(parsed)
            parsed = _on_its_machine(parsed, ranks, example_inputs)
        except FxspError as error:
            _say_refused(options, error)
            raise
        return _compile(gm, example_inputs, parsed, ranks)


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
        self.compiler_fn = torch_internals.without_ddp(compiler)
        self.func = sp  # what this is for who looks through the layers of a backend
        self.__name__ = f"sp before {getattr(self.compiler_fn, '__name__', 'another')}"
        self._root = weakref.ref(root)
        options = Options.parse({"plan": plan, "config": config, "group": group})
        self.options = replace(options, inner=self.compiler_fn)

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        with torch_internals.through_dynamo(FxspError):
            ranks = resolve_ranks(self.options)
            options = _on_its_machine(self.options, ranks, example_inputs)
            return _compile(gm, example_inputs, options, ranks, self._root())


def _on_its_machine(options: Options, ranks: Ranks, inputs: Sequence[Any]) -> Options:
    """The options with the machine that was measured for the ranks, if none is given."""
    found = find_machine(ranks, inputs) if options.machine is None else None
    return options if found is None else replace(options, machine=found)


install(lambda backend: backend is sp)
torch_internals.keep_graphs_whole(lambda backend: backend is sp)
watch_entrances(sp)


def _begun(translation: Translation) -> None:
    if torch_internals.options_for(sp, translation.compiler()) is not None:
        begin("tracing", f"tracing {_frame_name(translation)}")


def _frame_name(translation: Translation | None) -> str:
    """The class of the module whose frame is traced, or the name of the function."""
    if translation is None:
        return "a function"
    owner = frame_module(translation)
    return translation.frame()[0].co_name if owner is None else type(owner).__name__


watch_tracing(_begun)


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
    compiler = torch_internals.without_ddp(compiler)
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
    with torch_internals.through_dynamo(FxspError):
        channel.agree("uncompiled", what, {})
    warn(UnshardedWarning(f"this process {what}"))


torch_internals.on_recompile_limit(_limit_reached)


def _compile(
    gm: GraphModule, inputs: Sequence[Any], options: Options, ranks: Ranks, root: torch.nn.Module | None = None
) -> Callable[..., Any]:
    steps = begin("partitioning", f"partitioning {_frame_name(Translation.current())}")
    try:
        run, report = _compile_alike(gm, inputs, options, ranks, root)
        steps.stop()
        tell_summary(report, ranks, next(iter(modules_of_compilation()), root), steps.seconds)
    finally:
        end()
    return run


def _compile_alike(
    gm: GraphModule, inputs: Sequence[Any], options: Options, ranks: Ranks, root: torch.nn.Module | None
) -> tuple[Callable[..., Any], Report]:
    # Who tries out a graph, or goes before another backend, gives it whole values.
    splits = root is None and not options.verify
    edge = Edge(gm, inputs, ranks, splits=splits, always=splits and options.outputs == "split")
    inputs = edge.inputs
    if options.inner != "eager":
        torch_internals.restart_for_numbers(torch_internals.compile_fake_mode(inputs))
    channel = channel_of(options.process_group(), ranks)
    if channel is None:
        made = _compile_here(gm, edge, options, ranks, root)
        return edge.crossing(made.run, made.report), made.report
    watch()
    alike = Alike(gm, inputs, options, ranks)
    alike.topics.update(edge.topics())
    channel.agree("compile", alike.what, alike.topics)
    try:
        made = _compile_here(gm, edge, options, ranks, root)
    except SplitFirst as first:
        channel.agree("split first", alike.what, {"inputs to split": str(first)})
        raise
    except BaseException as error:
        if not torch_internals.is_restart(error):  # which all ranks do
            channel.failed(error)
        raise
    # What one rank could not compile would keep the others waiting in their first collective.
    channel.agree("compiled", alike.what.replace("compiles", "has compiled", 1), made.decided)
    run = made.run
    if made.split:  # a graph that runs whole waits for nobody
        run = guarded(run, channel, alike.graph)
    run = edge.crossing(run, made.report)
    if made.planned and options.check_inputs is not False:
        run = check_inputs(run, alike, channel, each_call=options.check_inputs is True and made.split)
    return on_its_group(run, ranks) if made.split else run, made.report


@dataclass(frozen=True)
class _Made:
    """A compiled graph, what was decided about it, and whether a plan speaks of it, and splits it."""

    run: Callable[..., Any]
    report: Report
    decided: dict[str, str]
    planned: bool
    split: bool


def _compile_here(gm: GraphModule, edge: Edge, options: Options, ranks: Ranks, root: torch.nn.Module | None) -> _Made:
    report, program = compile_graph(
        gm, edge.inputs, options, ranks, root=root, arrivals=edge.arrivals, split_outputs=edge.regional
    )
    if program is None:
        edge.stay_whole()
    elif (first := edge.split_first(program)) is not None:
        raise first
    else:
        edge.leave(program)
    keep_report(report)
    try:
        made = _run(gm, edge.inputs, options, ranks, root, report, program)
    except Exception as error:
        if torch_internals.is_restart(error):
            with _lock:
                _reports.remove(report)
        raise
    compiled_for(modules_of_compilation(), report)
    return made


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
    convention = Convention(ranks.size if options.grad_reduce == "defer" else 1, around, models_around)
    if program is None:
        decided = decisions(report, None)
        run = remembering(_finish(gm, inputs, options, report), report.split_outputs, splits)
        return _Made(convention.holding(run, inputs), report, decided, planned=bool(report.plan), split=False)
    trial = (
        Trial(program, open_regions(gm).forward, input_names(gm), options.process_group()) if options.verify else None
    )
    if options.deferred:
        scale_summands(program.gm, ranks.size)
    decided = decisions(report, program.gm)
    gathered = [row for row in report.split_outputs if row[0] not in program.left_split]
    finished = _finish(program.gm, local_examples(inputs, program), options, report, normalized=True)
    run = remembering(finished, gathered, splits)
    for graph in (program.gm, program.whole):
        torch_internals.forget_examples(graph)
    if trial is not None:
        run = trial.wrap(run)
    return _Made(convention.holding(run, inputs), report, decided, planned=True, split=True)


def left_to_hooks(compiler: Any, module: torch.nn.Module) -> None:
    """Of a model that ``compiler`` gave up, and hooks run: gradients are left as its options say, if they are ours."""
    options = torch_internals.options_for(sp, compiler)
    if options is not None and options.get("grad_reduce") == "defer":
        Convention(resolve_ranks(Options.parse(options)).size, [module]).hold()


def _finish(
    gm: GraphModule, inputs: Sequence[Any], options: Options, report: Report, *, normalized: bool = False
) -> Callable[..., Any]:
    """Hand the graph to the inner compiler."""
    if not normalized and torch_internals.resizes_storage(gm):
        return gm.forward  # AOTAutograd would free the memory before it is used
    training = is_training(inputs)
    if not normalized and (training or options.inner == "eager"):
        gm = open_regions(gm)
    # The casts of autocast are nodes of a normalized graph.
    explicit = normalized and torch_internals.any_autocast()
    start = time.perf_counter()
    inner_name = options.inner if isinstance(options.inner, str) else getattr(options.inner, "__name__", "its compiler")
    begin(inner_name, f"compiling {report.root} by {inner_name}")
    with torch_internals.without_autocast() if explicit else nullcontext():
        inner = compile_inner(gm, inputs, options.inner, options.mode, training)
    report.timings["inner"] = time.perf_counter() - start
    return torch_internals.outside_autocast(inner) if explicit else inner
