"""Dynamo while it traces: module calls, frames and values."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from fxsp.torch_internals.recompiles import without_ddp
from fxsp.torch_internals.versions import missing

_T = TypeVar("_T")


@dataclass(frozen=True)
class Opaque:
    """A value that is no node of the graph, nor a constant or container: what it is instead."""

    why: str


#: Called before a module call; returns what is to be called with the result once it succeeded, or None.
ModuleCallHook = Callable[["Translation", torch.nn.Module, Sequence[Any], dict[str, Any]], Callable[[Any], None] | None]


_module_call_hook: ModuleCallHook | None = None


def hook_module_calls(hook: ModuleCallHook) -> None:
    """Have ``hook`` called for every ``nn.Module`` call that Dynamo traces; the last hook given is the one in force."""
    global _module_call_hook  # noqa: PLW0603  (there is one Dynamo)
    try:
        from torch._dynamo.variables import nn_module
    except ImportError as error:
        raise missing("torch._dynamo.variables.nn_module", error) from error
    _module_call_hook = hook
    # Every variant with its own `call_function`: unspecialized modules (all, today), FSDP's, the older kind.
    kinds = [
        kind
        for kind in vars(nn_module).values()
        if isinstance(kind, type) and kind.__name__.endswith("NNModuleVariable") and "call_function" in vars(kind)
    ]
    if not kinds:
        raise missing("UnspecializedNNModuleVariable.call_function")
    for kind in kinds:
        if not hasattr(vars(kind)["call_function"], "_fxsp_original"):
            kind.call_function = _observed(  # type: ignore[attr-defined]
                vars(kind)["call_function"]
            )


def _observed(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call_function(self: Any, tx: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        module = getattr(self, "value", None)
        done = None
        if _module_call_hook is not None and isinstance(module, torch.nn.Module):
            done = _module_call_hook(Translation(tx.output), module, args, kwargs)
        result = original(self, tx, args, kwargs)
        if done is not None:
            done(result)
        return result

    call_function._fxsp_original = original  # type: ignore[attr-defined]
    return call_function


class Translation:
    """One attempt of Dynamo at one frame, behind the few questions that capture asks."""

    def __init__(self, output: Any) -> None:
        self._output = output

    @staticmethod
    def current() -> Translation | None:
        """The one in progress in this thread (also while Dynamo calls the backend), or None."""
        from torch._dynamo import symbolic_convert

        tx = getattr(symbolic_convert.tls, "current_tx", None)
        return None if tx is None else Translation(tx.output)

    def compiler(self) -> Any:
        """The backend as Dynamo holds it, wrapped; the same object for all frames of one ``torch.compile``."""
        compiler = self._output.compiler_fn
        # Under DistributedDataParallel it is a method of an optimizer made for this frame, which holds the backend.
        return without_ddp(compiler)

    def compile_with(self, compiler: Any) -> None:
        """Have the graph of this attempt compiled by ``compiler``; the next attempt has the user's backend again."""
        self._output.compiler_fn = compiler

    def is_export(self) -> bool:
        """Whether the graph is traced to be kept, and not to be compiled."""
        return bool(self._output.export)

    def notes(self, create: Callable[[], _T]) -> _T:
        """An object of ours that lives as long as this attempt; a restart of the analysis begins with a fresh one."""
        return keep(self._output, create)

    def say(self, note: str) -> None:
        """Leave a note for the report of the graph that is being traced."""
        said = self.said()
        if note not in said:
            said.append(note)

    def said(self) -> list[str]:
        """The notes that were left."""
        notes: list[str] = self._output.__dict__.setdefault("_fxsp_said", [])
        return notes

    def graph(self) -> torch.fx.Graph:
        """The graph that is being built now: the frame's, or that of the body of a higher-order operator."""
        graph: torch.fx.Graph = self._output.current_tracer.graph
        return graph

    def root_graph(self) -> torch.fx.Graph:
        """The frame's graph, the one the backend receives."""
        output = self._output
        graph: torch.fx.Graph = output.root_tracer.graph if hasattr(output, "root_tracer") else output.graph
        return graph

    def tracer(self) -> Any:
        """What builds :meth:`graph`; the second argument of :func:`finish_value`."""
        return self._output.current_tracer

    def frame(self) -> tuple[types.CodeType, dict[str, Any]]:
        """Code and local variables (real values, as the frame began) of the traced frame."""
        return self._output.root_tx.f_code, self._output.root_tx.f_locals

    def callers(self) -> list[tuple[torch.nn.Module, types.FrameType]]:
        """The modules whose methods Python runs between the call of the compiled function and this frame, the first
        called first, and their frames: those whose own code Dynamo did not trace, or broke.
        """
        found = []
        for frame in _frames_between():
            code = frame.f_code
            owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
            if isinstance(owner, torch.nn.Module):
                found.append((owner, frame))
        return found

    def has_begun(self) -> bool:
        """Whether Python has run anything of the compiled function before this frame, but the call of its module."""
        call = torch.nn.Module._call_impl.__code__, torch.nn.Module._wrapped_call_impl.__code__
        for frame in _frames_between():
            module = frame.f_locals.get("self")
            if frame.f_code not in call or module is None or module._forward_pre_hooks:
                return True
        return self.is_resumed()

    def is_resumed(self) -> bool:
        """Whether the frame goes on after a graph break."""
        return self.frame()[0].co_name.startswith("torch_dynamo_resume_in")

    def returned(self, gm: torch.fx.GraphModule) -> Any:
        """What the frame returns, as :func:`read_value` gives it; Opaque if the graph ends in a graph break."""
        result = self._result(gm)
        if result is None:
            return Opaque("the graph ends in a graph break, before the module returns")
        return finish_value(read_value(result), self.tracer())

    def _result(self, gm: torch.fx.GraphModule) -> Any:
        """The Dynamo variable that the frame returns; None if the graph ends in a graph break."""
        reason = getattr(getattr(gm, "compile_subgraph_reason", None), "reason", "")
        stack = self._output.root_tx.stack
        return stack[-1] if reason == "return_value" and stack else None

    def is_piece(self, gm: torch.fx.GraphModule) -> bool:
        """Whether the graph is a part of the compiled function only: one after a graph break, before one, or below."""
        return self._result(gm) is None or self.has_begun()

    def output_names(self, gm: torch.fx.GraphModule) -> list[str]:
        """What the frame's code calls each output of ``gm``, ``"logits"`` or ``"cache.layers[0].keys"``, by position.

        ``""`` for one that is not found; nothing at all where the graph ends in a graph break.
        """
        result = self._result(gm)
        if result is None:
            return []
        stored = getattr(self._output.side_effects, "store_attr_mutations", {})
        names: dict[torch.fx.Node, str] = {}
        _name_values(result, "", stored, names, set())
        for item, attributes in list(stored.items()):  # what is kept in an object that the caller has
            if base := _source_name(item):
                for name, value in attributes.items():
                    _name_values(value, f"{base}.{name}", stored, names, set())
        outputs: Any = gm.graph.output_node().args[0]
        return [names.get(node, "") if isinstance(node, torch.fx.Node) else "" for node in outputs]

    def guarded(self) -> set[str]:
        """Sources of the values that the compiled code has guards on."""
        return {guard.name if isinstance(guard.name, str) else guard.name() for guard in self._output.guards}


def _frames_between() -> list[types.FrameType]:
    """The frames of Python between the call of a compiled function and the one that Dynamo traces, outermost first."""
    from torch._dynamo import convert_frame, eval_frame

    found: list[types.FrameType] = []
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename == eval_frame.__file__ and code.co_name in ("compile_wrapper", "_fn"):
            return found[::-1]
        if code.co_filename == convert_frame.__file__:
            found.clear()  # Dynamo's own frames, and ours
        else:
            found.append(frame)
        frame = frame.f_back
    return []


def keep(owner: Any, create: Callable[[], _T]) -> _T:
    """An object of ours that lives as long as ``owner``, created when first asked for."""
    found = getattr(owner, "_fxsp_notes", None)
    if found is None:
        found = create()
        owner._fxsp_notes = found
    return found


def read_value(value: Any) -> Any:
    """A Dynamo variable as nested tuples, lists and dicts of proxies and constants; never realizes a lazy one.

    A lazy variable is kept as it is: :func:`finish_value` looks again once the frame is traced.
    """
    from torch._dynamo import variables as v

    if isinstance(value, v.LazyVariableTracker):  # first: `isinstance` with any other class realizes it
        if not value.is_realized():
            return value
        value = value.realize()
    if isinstance(value, (v.TensorVariable, v.SymNodeVariable)):
        return value.proxy
    if isinstance(value, v.ConstantVariable):
        return value.value
    if isinstance(value, v.ListVariable):
        return [read_value(item) for item in value.items]
    if isinstance(value, v.TupleVariable):
        return tuple(read_value(item) for item in value.items)
    if isinstance(value, v.ConstDictVariable):
        return {
            key.vt.as_python_constant() if key.vt.is_python_constant() else Opaque("key"): read_value(item)
            for key, item in value.items.items()
        }
    for name in ("_base_vt", "_dict_vt", "_tuple_vt"):  # subclasses of dict, tuple and list hold a plain one
        base = getattr(value, name, None)
        if base is not None:
            return read_value(base)
    return Opaque(f"a {value.python_type_name()}")


def _source_name(value: Any) -> str:
    """Where Dynamo found a value; ``""`` for one that the frame made."""
    try:
        name = getattr(getattr(value, "source", None), "name", "")
        return str(name() if callable(name) else name)
    except NotImplementedError:  # a source that lives for a moment only
        return ""


def _name_values(
    value: Any, name: str, stored: Mapping[Any, Mapping[str, Any]], names: dict[torch.fx.Node, str], seen: set[int]
) -> None:
    """Put the tensors in a Dynamo variable into ``names``; ``stored`` are the attributes that were set of objects."""
    from torch._dynamo import variables as v

    if isinstance(value, v.LazyVariableTracker):
        if not value.is_realized():
            return
        value = value.realize()
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, v.TensorVariable):
        names.setdefault(value.proxy.node, name or "the result")
        return
    attributes = dict(stored.get(value, {})) if isinstance(value, v.VariableTracker) else {}
    for key, item in attributes.items():
        _name_values(item, f"{name}.{key}" if name else key, stored, names, seen)
    for inner in (value, *(getattr(value, part, None) for part in ("_base_vt", "_dict_vt", "_tuple_vt"))):
        if isinstance(inner, v.ConstDictVariable):
            for key, item in inner.items.items():
                text = key.vt.as_python_constant() if key.vt.is_python_constant() else "?"
                _name_values(item, f"{name}[{text!r}]" if name else str(text), stored, names, seen)
        elif isinstance(inner, (v.ListVariable, v.TupleVariable)):
            for index, item in enumerate(inner.items):
                _name_values(item, f"{name}[{index}]", stored, names, seen)


def finish_value(value: Any, tracer: Any) -> Any:
    """The result of :func:`read_value` with nodes of ``tracer``'s graph for proxies; what has no node is Opaque."""
    from torch._dynamo import variables as v

    if type.__instancecheck__(v.LazyVariableTracker, value):
        if value.is_realized():
            return finish_value(read_value(value), tracer)
        return None if value.peek_value() is None else Opaque("not used by the traced code")
    if isinstance(value, torch.fx.Proxy):
        return _node_in(value, tracer)
    if type(value) in (list, tuple):
        return type(value)(finish_value(item, tracer) for item in value)
    if type(value) is dict:
        return {key: finish_value(item, tracer) for key, item in value.items()}
    return value


def _node_in(proxy: torch.fx.Proxy, tracer: Any) -> torch.fx.Node | Opaque:
    """A value of an outer graph is an input of the body of a higher-order operator: that input's node."""
    if proxy.node.graph is tracer.graph:
        node: torch.fx.Node = proxy.node
        return node
    lifted = tracer.lifted_freevars.get(proxy)
    if lifted is None and isinstance(number := proxy.node.meta.get("example_value"), torch.SymInt):
        lifted = tracer.bound_symbols.get(number.node.expr)
    return Opaque("not used by the traced code") if lifted is None else lifted.node


def input_source(node: torch.fx.Node) -> str:
    """Where Dynamo found a graph input, ``"L['hidden_states']"``; ``""`` if it did not say."""
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return name() if callable(name) else name


def input_example(node: torch.fx.Node) -> Any:
    """The real value that Dynamo traced a graph input with, or None."""
    argument = node.meta.get("grapharg")
    return None if argument is None else argument.example


def forget_examples(gm: torch.fx.GraphModule) -> None:
    """Let go of the values that a graph was traced with: a parameter that somebody refers to can't be swapped."""
    for node in gm.graph.find_nodes(op="placeholder"):
        node.meta.pop("grapharg", None)
