"""Tracing once more what Dynamo traced: the tracer, its nodes, and who listens."""

from __future__ import annotations

import contextlib
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch


def trace_on_fakes(function: Callable[..., Any], inputs: Sequence[Any]) -> torch.fx.GraphModule:
    """``function`` as an ATen graph below autograd, static shapes; tensors it closes over become constants."""
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)


def retrace(
    function: Callable[..., Any], inputs: Sequence[Any], mode: Any, decompositions: Mapping[Any, Any]
) -> torch.fx.GraphModule:
    """``function`` as a graph of ATen ops above autograd (``linear``, ``layer_norm``, ... stay whole).

    ``inputs`` are fakes of ``mode`` or numbers; ``decompositions`` is asked for each operator when it is called.
    Nodes get the metadata of the node that is being interpreted.
    """
    from torch._functorch.predispatch import lazy_load_decompositions
    from torch.fx.experimental.proxy_tensor import decompose, get_proxy_mode, make_fx
    from torch.fx.traceback import preserve_node_meta

    def run(*args: Any) -> Any:
        # Not an argument of make_fx: that would copy the mapping, and lose that it decides at each call.
        own = getattr(get_proxy_mode(), "decomposition_table", {})
        with decompose(ChainMap(own, decompositions)):  # type: ignore[arg-type]
            return function(*args)

    with mode, preserve_node_meta():
        traced = make_fx(run, tracing_mode="real", pre_dispatch=True)(*inputs)
    # Up to 2.12 what vmap loads for itself is a node.
    for node in traced.graph.find_nodes(op="call_function", target=lazy_load_decompositions):
        traced.graph.erase_node(node)
    return traced


def traced_graph() -> torch.fx.Graph:
    """The graph that the enclosing :func:`retrace` is writing."""
    graph: torch.fx.Graph = proxy_tracer().graph
    return graph


def proxy_tracer() -> Any:
    """The tracer of the re-trace that is under way; an error outside of one."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    mode = get_proxy_mode()
    if mode is None:
        raise RuntimeError("no tracing in progress")
    return mode.tracer


def node_of(value: torch.Tensor) -> torch.fx.Node | None:
    """The node of the graph being traced that has this value, if it has one."""
    from torch.fx.experimental.proxy_tensor import get_proxy_slot

    slot = get_proxy_slot(value, proxy_tracer(), None)
    node: torch.fx.Node | None = getattr(getattr(slot, "proxy", slot), "node", None)
    return node


def record_call(target: Any, args: Any, kwargs: Any, result: Any, *, name: str) -> torch.fx.Node:
    """Write a node of value ``result`` (fakes) into the graph being traced, and return it.

    Modules among the arguments come along as attributes.
    """
    from torch.fx.experimental.proxy_tensor import track_tensor_tree

    tracer = proxy_tracer()

    def proxy_of(value: Any) -> Any:
        if isinstance(value, torch.nn.Module):
            return tracer.create_proxy("get_attr", add_module(tracer.root, f"{name}_body", value), (), {})
        return tracer.unwrap_proxy(value)

    args, kwargs = torch.utils._pytree.tree_map(proxy_of, (args, kwargs))
    proxy = tracer.create_proxy("call_function", target, args, kwargs, name=name)
    if isinstance(result, (torch.Tensor, torch.SymInt, tuple, list)):
        track_tensor_tree(result, proxy, constant=None, tracer=tracer)
    node: torch.fx.Node = proxy.node
    return node


def record_constant(name: str, value: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Write a ``get_attr`` node for a tensor constant into the graph being traced; ``fake`` is its value."""
    from torch.fx.experimental.proxy_tensor import track_tensor_tree

    tracer = proxy_tracer()
    name = name.replace(".", "_")
    while hasattr(tracer.root, name) and getattr(tracer.root, name) is not value:
        name += "_"
    if isinstance(value, torch.nn.Parameter):
        tracer.root.register_parameter(name, value)
    else:
        tracer.root.register_buffer(name, value)
    track_tensor_tree(fake, tracer.create_proxy("get_attr", name, (), {}), constant=None, tracer=tracer)
    return fake


def add_module(root: torch.nn.Module, name: str, module: torch.nn.Module) -> str:
    """Make ``module`` an attribute of ``root`` under a free name, and return that name."""
    base, count = name, 0
    while hasattr(root, name):
        if getattr(root, name) is module:
            return name
        count += 1
        name = f"{base}_{count}"
    root.add_module(name, module)
    return name


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """Inside a :func:`retrace`: run on fakes without writing nodes."""
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    # Up to 2.12 a function mode writes nodes for what vmap and grad do to their levels, tracer or not.
    writes = torch.__version__ < "2.13"
    with disable_proxy_modes_tracing(), torch._C.DisableTorchFunction() if writes else contextlib.nullcontext():
        yield


def python_dispatch() -> AbstractContextManager[Any]:
    """What operators on fakes with symbolic sizes need outside of a trace."""
    from torch._dispatch.python import enable_python_dispatcher

    return enable_python_dispatcher()


def listen(called: Callable[[Any, Any, Any, Any], None]) -> AbstractContextManager[Any]:
    """``called(op, args, kwargs, result)`` for each operator below autograd that runs meanwhile."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Listener(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            called(func, args, kwargs or {}, result)
            return result

    return Listener()


def rename_node(node: torch.fx.Node, name: str) -> None:
    """Give a node a name (a free one near it)."""
    node._rename(name)


def carry_dynamo_facts(old: torch.fx.GraphModule, new: torch.fx.GraphModule) -> None:
    """What AOTAutograd reads from Dynamo's graph besides the nodes: the sources of the inputs, the compile id."""
    new.meta.update(old.meta)
    for name in ("_param_name_to_source", "_source_to_user_stacks"):
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))
    # AOTAutograd takes buffers for inputs with a source; a constant, which ``GraphModule`` makes a buffer, is none.
    for name in [name for name in new._buffers if name not in getattr(old, "_param_name_to_source", {})]:
        constant = new._buffers.pop(name)
        setattr(new, name, constant)
    inputs, new_inputs = (g.graph.find_nodes(op="placeholder") for g in (old, new))
    for before, after in zip(inputs, new_inputs, strict=True):
        after.meta.update({key: value for key, value in before.meta.items() if key not in ("example_value", "val")})
        if hasattr(before, "_dynamo_source"):
            after._dynamo_source = before._dynamo_source
