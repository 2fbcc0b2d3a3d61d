"""Which graph value is which module argument: module calls, recorded while Dynamo traces.

``torch.compile`` hands a backend a flat graph; a plan speaks of modules and argument names.  :func:`install` observes
every module call of a compilation that is ours, and :func:`capture`, called by the backend, returns for each the bound
arguments, the outputs and the region of nodes that were created during the call, as nodes of the graph at hand.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn

from fxsp import torch_internals
from fxsp.capture.encoder_paths import SUBSTITUTES
from fxsp.capture.graph_breaks import Splits
from fxsp.capture.module_calls import Captured, ModuleCall
from fxsp.capture.resolve import forward_signature, resolve_plan, submodules, unwrap
from fxsp.errors import PlanError
from fxsp.plan import PlanEntry, find_plan, owns_plan, parse_plan
from fxsp.torch_internals import Opaque, Translation

__all__ = [
    "Captured",
    "ModuleCall",
    "capture",
    "claim_with",
    "frame_module",
    "install",
    "modules_of_compilation",
    "splits_of_compilation",
    "watch_tracing",
]


@dataclass(eq=False)
class _Recorder:
    """The calls of one attempt to trace one frame."""

    #: With what builds the call's graph; arguments and outputs are yet as ``torch_internals.read_value`` gives them.
    calls: list[tuple[ModuleCall, Any] | None] = field(default_factory=list)
    ends: Iterator[int] = field(default_factory=itertools.count)


@dataclass(eq=False)
class _Seen:
    """Modules whose forward was a traced frame of one ``torch.compile``, the first one first."""

    modules: list[weakref.ref[nn.Module]] = field(default_factory=list)
    splits: Splits = field(default_factory=Splits)

    def add(self, module: nn.Module) -> None:
        if not any(module is known for known in self):
            self.modules.append(weakref.ref(module))

    def __iter__(self) -> Iterator[nn.Module]:
        return (module for ref in self.modules if (module := ref()) is not None)


# --- while Dynamo traces ----------------------------------------------------------------------------------------------


def claim_with(claim: Callable[[Translation, nn.Module], bool]) -> None:
    """Have ``claim`` asked of the module calls of other compilations: True makes that compilation ours."""
    _claims.append(claim)


_claims: list[Callable[[Translation, nn.Module], bool]] = []


def watch_tracing(begun: Callable[[Translation], None]) -> None:
    """Have ``begun`` told of each frame of a compilation that is ours, when it calls a module first."""
    _watchers.append(begun)


def install(is_ours: Callable[[object], bool]) -> None:
    """Record the module calls of every compilation whose backend, or a layer wrapped in it, ``is_ours``.

    May be called again: further predicates are added, and any of them suffices.
    """
    if is_ours not in _ours:
        _ours.append(is_ours)
    torch_internals.hook_module_calls(_enter)
    torch_internals.keep_lengths_symbolic(_is_ours)
    torch_internals.make_meta_tensors(_is_ours)
    torch_internals.substitute_functions(SUBSTITUTES, _is_ours)


_ours: list[Callable[[object], bool]] = []
_watchers: list[Callable[[Translation], None]] = []


def _is_ours(translation: Translation) -> bool:
    layers = torch_internals.backend_layers(translation.compiler())
    return any(is_ours(layer) for layer in layers for is_ours in _ours)


def _enter(
    translation: Translation, module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]
) -> Callable[[Any], None] | None:
    if not _is_ours(translation) and not any(claim(translation, module) for claim in _claims):
        return None
    recorder = translation.notes(_Recorder)
    if not recorder.calls:  # the frame may break before it reaches the backend: remember whose it is now
        _remember_frame(translation)
        for begun in _watchers:
            begun(translation)
    slot = len(recorder.calls)
    recorder.calls.append(None)
    before = next(iter(reversed(translation.graph().nodes)), None)
    read = torch_internals.read_value  # containers are read now: the call may change them
    bound = _bind(module, tuple(read(value) for value in args), {key: read(value) for key, value in kwargs.items()})

    def leave(result: Any) -> None:
        tracer, graph = translation.tracer(), translation.graph()
        last = next(iter(reversed(graph.nodes)), None)
        call = ModuleCall(module, bound, read(result), graph, before, last, next(recorder.ends))
        recorder.calls[slot] = (call, tracer)

    return leave


def _bind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Values by the argument names of the module's forward; keywords of ``**kwargs`` by their own names."""
    signature = forward_signature(module)
    try:
        bound = signature.bind_partial(*args, **kwargs)
    except TypeError:  # a wrapper's own convention, resolved before forward sees it
        return dict(kwargs)
    values: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            values.update(value)
        else:
            values[name] = value
    return values


def frame_module(translation: Translation) -> nn.Module | None:
    """``self`` of the traced frame, if that is a module."""
    code, variables = translation.frame()
    first = code.co_varnames[0] if code.co_argcount else "self"
    owner = variables.get(first, variables.get("self"))
    owner = owner if isinstance(owner, nn.Module) else variables.get("self")
    if owner is None and not code.co_argcount and code.co_flags & inspect.CO_VARARGS:
        # A decorator around forward that names no argument: `def wrapped(*args, **kwargs)`.
        given = variables.get(code.co_varnames[code.co_kwonlyargcount], ())
        if given and isinstance(given[0], nn.Module) and any(code is known for known in _forward_codes(given[0])):
            owner = given[0]
    return unwrap(owner) if isinstance(owner, nn.Module) else None


def _seen(translation: Translation) -> _Seen:
    return torch_internals.keep(translation.compiler(), _Seen)


def _remember_frame(translation: Translation) -> None:
    owner = frame_module(translation)
    if owner is not None:
        _seen(translation).add(owner)


# --- in the backend ---------------------------------------------------------------------------------------------------


def capture(gm: fx.GraphModule, plan: Any = None, root: nn.Module | None = None) -> Captured:
    """The module calls of the graph that Dynamo hands to the backend; call it from the backend, before changing ``gm``.

    ``plan`` is the plan of the options (a dictionary or entries); without one, the plan is that of the first module of
    the frame that carries one; ``"infer"`` and ``"none"``: there is none.  ``root`` is the module that the plan is for,
    if that is known.  Raises :class:`PlanError` if a plan fits no module of the frame.
    """
    translation = Translation.current()
    if translation is None:
        return _without_frame(plan, "the graph was not made by torch.compile: nothing is known about its modules")
    if translation.root_graph() is not gm.graph:
        return _without_frame(plan, "the graph was split or rewritten after tracing (DDPOptimizer?): bindings are lost")
    _remember_frame(translation)
    graphs = {id(module.graph) for module in gm.modules() if isinstance(module, fx.GraphModule)}
    recorded = [entry for entry in translation.notes(_Recorder).calls if entry is not None]
    calls = [_finished(call, tracer) for call, tracer in recorded if id(call.graph) in graphs]
    own = _frame_call(translation, gm)
    if own is not None:
        calls.insert(0, own)
    found = _find_root(translation, calls, plan, root)
    found.calls = calls
    found.splits = _seen(translation).splits
    found.around = list(_calls_around(translation))
    if found.root is None:
        return found
    paths: dict[int, list[str]] = {}
    for path, module in submodules(found.root):
        paths.setdefault(id(module), []).append(path)
    for call in calls:
        call.paths = tuple(paths.get(id(call.module), ()))
    if len(calls) - (own is not None) < len(recorded):
        found.notes.append("some module calls were traced into graphs that Dynamo dropped; they are not considered")
    if not found.calls_of(found.root):
        resumed = " (it goes on after a graph break)" if translation.is_resumed() else ""
        found.notes.append(
            f"the graph{resumed} is a part of {type(found.root).__name__} only: the model's own arguments and outputs "
            "are not known in it"
        )
    return found


def splits_of_compilation() -> Splits:
    """What the graphs of the present ``torch.compile`` returned and had split."""
    translation = Translation.current()
    return Splits() if translation is None else _seen(translation).splits


def modules_of_compilation() -> list[nn.Module]:
    """The modules around, of and in the present frame, as far as they are known; several times where nested."""
    translation = Translation.current()
    if translation is None:
        return []
    calls = [entry[0] for entry in translation.notes(_Recorder).calls if entry is not None]
    return _candidates(translation, calls)


def _finished(call: ModuleCall, tracer: Any) -> ModuleCall:
    """The call with nodes for values: now that the frame is traced, all that is used has one."""
    arguments = {name: torch_internals.finish_value(value, tracer) for name, value in call.arguments.items()}
    return replace(call, arguments=arguments, outputs=torch_internals.finish_value(call.outputs, tracer))


def _without_frame(plan: Any, note: str) -> Captured:
    return Captured(None, None if plan is None or isinstance(plan, str) else parse_plan(plan), notes=[note])


def _find_root(translation: Translation, calls: list[ModuleCall], plan: Any, root: nn.Module | None) -> Captured:
    candidates = _candidates(translation, calls)
    owners = [module for module in candidates if owns_plan(module)]
    if root is not None:
        entries = None if plan is None or isinstance(plan, str) else parse_plan(plan)
        return Captured(root, entries, notes=_other_plans(root, owners))
    outside = _outside(candidates)
    if plan is None or isinstance(plan, str):
        owners = owners if plan is None else []
        whose = [module for module in outside if owns_plan(module)] if plan is None and not owners else []
        if not owners and not whose:
            return Captured(candidates[0] if candidates else None, None)
        owner = [*owners, *whose][0]
        entries = parse_plan(find_plan(owner))
        return Captured(owner, entries, part=None if owners else candidates[0], notes=_other_plans(owner, owners))
    entries = parse_plan(plan)
    if not candidates:
        return Captured(
            None,
            entries,
            notes=["no module is called or visible in the traced frame (a part of one, after a graph break?)"],
        )
    fits: list[int] = []
    for module in candidates:
        fits.append(sum(_resolves((entry,), module) for entry in entries))
        if fits[-1] == len(entries) and _resolves(entries, module):
            _seen(translation).add(module)
            return Captured(module, entries)
    for module in outside:
        if _resolves(entries, module):
            return Captured(module, entries, part=candidates[0])
    best = candidates[fits.index(max(fits))]
    resolve_plan(entries, best)  # raises: names what is wrong with the entry in the module that fits best
    raise AssertionError("unreachable: the plan was refused a moment ago")


def _other_plans(root: nn.Module, owners: Sequence[nn.Module]) -> list[str]:
    """Notes on models that have a plan of their own, and are no part of ``root``."""
    inside = {id(module) for _, module in submodules(root)}
    others = [type(module).__name__ for module in owners if id(module) not in inside]
    return [f"the plan of {name} is not used: one graph follows one plan" for name in others]


def _resolves(entries: Sequence[PlanEntry], module: nn.Module) -> bool:
    try:
        resolve_plan(entries, module)
    except PlanError:
        return False
    return True


def _candidates(translation: Translation, calls: list[ModuleCall]) -> list[nn.Module]:
    """Modules that the plan may belong to, likeliest first.

    First the modules that call the frame (a frame after a graph break, or in a forward that Dynamo skips, is often a
    block's), then the known roots around it, then the frame's own module, the modules among its variables, and the
    modules that are called.
    """
    _, variables = translation.frame()
    here = [frame_module(translation)]
    here += [unwrap(value) for value in variables.values() if isinstance(value, nn.Module)]
    here += [unwrap(call.module) for call in calls]
    local = [module for module in here if module is not None]
    ids = {id(module) for module in local}
    around = [known for known in _seen(translation) if any(id(part) in ids for _, part in submodules(known))]
    callers = [unwrap(module) for module, _ in translation.callers()]
    return list({id(module): module for module in [*callers, *around, *local]}.values())


def _outside(parts: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules that Python runs, and that the first of the frame's modules is a part of, the innermost first."""
    if not parts:
        return []
    known = {id(module) for module in parts}
    outside = [unwrap(module) for module in reversed(torch_internals.calls_under_way())]
    return [m for m in outside if id(m) not in known and any(part is parts[0] for _, part in submodules(m))]


def _calls_around(translation: Translation) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """Modules whose forward is under way, outside of this graph, and its arguments as far as they can be seen."""
    for module, frame in translation.callers():
        owner, code = unwrap(module), frame.f_code
        at = (code.co_name, code.co_filename, code.co_firstlineno)  # Dynamo runs code of its own, with these names
        if any(at == (c.co_name, c.co_filename, c.co_firstlineno) for c in _forward_codes(owner)):
            variables = frame.f_locals
            yield owner, {name: variables[name] for name in forward_signature(owner).parameters if name in variables}


# --- the traced frame as a call ---------------------------------------------------------------------------------------


def _frame_call(translation: Translation, gm: fx.GraphModule) -> ModuleCall | None:
    """The frame as a call of its module, if its code is that module's forward (or a decorator around it)."""
    code, variables = translation.frame()
    owner = frame_module(translation)
    if owner is None or not any(code is known for known in _forward_codes(owner)):
        return None
    inputs = _Inputs(gm.graph, translation.guarded())
    arguments = _frame_arguments(code, variables, owner, inputs)
    body = [node for node in gm.graph.nodes if node.op not in ("placeholder", "output")]
    last = body[-1] if body else None
    return ModuleCall(owner, arguments, translation.returned(gm), gm.graph, None, last)


def _forward_codes(module: nn.Module) -> list[types.CodeType]:
    """Code of the forward and of each decorator around it."""
    codes: list[types.CodeType] = []
    for function in (vars(module).get("forward"), type(module).forward):
        while function is not None:
            plain = getattr(function, "__func__", function)
            plain = plain.func if isinstance(plain, functools.partial) else plain  # a registry of hooks
            if hasattr(plain, "__code__"):
                codes.append(plain.__code__)
            function = getattr(function, "__wrapped__", None)
    return codes


def _frame_arguments(
    code: types.CodeType, variables: dict[str, Any], owner: nn.Module, inputs: _Inputs
) -> dict[str, Any]:
    """The frame's parameters as they were passed, bound to the signature of the undecorated forward."""
    count = code.co_argcount
    names = code.co_varnames[: count + code.co_kwonlyargcount]
    args = [inputs.value(variables[name], f"L[{name!r}]") for name in names[:count] if name in variables]
    kwargs = {name: inputs.value(variables[name], f"L[{name!r}]") for name in names[count:] if name in variables}
    stars = bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    starred = code.co_varnames[len(names) : len(names) + stars]
    for name in starred:
        values = variables.get(name, ())
        if isinstance(values, dict):
            kwargs.update({key: inputs.value(item, f"L[{name!r}][{key!r}]") for key, item in values.items()})
        else:
            args += [inputs.value(item, f"L[{name!r}][{index}]") for index, item in enumerate(values)]
    return _bind(owner, tuple(args[1:]), kwargs)


class _Inputs:
    """The graph inputs, found by where Dynamo took them from, or by the tensor that it traced with."""

    def __init__(self, graph: fx.Graph, guarded: set[str]) -> None:
        nodes = graph.find_nodes(op="placeholder")
        self._guarded = guarded
        self._by_source = {torch_internals.input_source(node): node for node in nodes}
        self._by_tensor = {id(torch_internals.input_example(node)): node for node in nodes}
        self._by_tensor.pop(id(None), None)

    def value(self, value: Any, source: str) -> Any:
        """A real value of the frame as nodes and constants."""
        if source in self._by_source:
            return self._by_source[source]
        if id(value) in self._by_tensor:
            return self._by_tensor[id(value)]
        if isinstance(value, (list, tuple)):
            items = [self.value(item, f"{source}[{index}]") for index, item in enumerate(value)]
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, dict):
            return {key: self.value(item, f"{source}[{key!r}]") for key, item in value.items()}
        # A number that the code does not depend on has no guard: the next call may bring another one.
        if value is None or (isinstance(value, (bool, int, float, str)) and source in self._guarded):
            return value
        return Opaque("not used by the traced code")
