"""All contact with private torch API: one small, well-named function for each thing that is needed.

Supported torch: 2.11 to 2.15.  Nothing else in fxsp imports a name of torch that begins with an underscore.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import types
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

_T = TypeVar("_T")
_F = TypeVar("_F", bound=Callable[..., Any])

# --- simulation: operators and tracing on fakes ----------------------------------------------------------------------


def is_operator(target: Any) -> bool:
    """Whether a node's target is an overload of a registered operator (``torch.ops.aten.add.Tensor``)."""
    return isinstance(target, torch._ops.OpOverload)


def schema(target: Any) -> Any:
    """The schema of an operator overload: ``name``, ``arguments``, ``is_mutable``."""
    return target._schema


def is_pointwise(target: Any) -> bool:
    """Whether an operator overload maps elements, each on its own."""
    return torch.Tag.pointwise in target.tags


def packet_of(target: Any) -> Any:
    """All overloads of an operator overload's operator together (``torch.ops.aten.add``)."""
    return target.overloadpacket


def overload_of(op: Any) -> Any:
    """The operator overload that is meant by one, by a packet with one overload, or by a ``custom_op``; else None."""
    found = getattr(op, "_opoverload", op)
    if isinstance(found, torch._ops.OpOverloadPacket):
        names = found.overloads()
        found = getattr(found, names[0]) if len(names) == 1 else None
    return found if is_operator(found) else None


def trace_on_fakes(function: Callable[..., Any], inputs: Sequence[Any]) -> torch.fx.GraphModule:
    """``function`` as an ATen graph below autograd, static shapes; tensors it closes over become constants."""
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)


# --- options ----------------------------------------------------------------------------------------------------------


def inductor_modes() -> tuple[str, ...]:
    """The modes of ``torch.compile(mode=...)`` that Inductor knows."""
    try:
        from torch._inductor import list_mode_options
    except ImportError:  # the list moved: these have been there since the first release
        return ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
    return tuple(dict.fromkeys(("default", *list_mode_options())))


# --- Tracing ---------------------------------------------------------------------------------------------------------


def compile_fake_mode(values: Sequence[Any] = ()) -> Any:
    """The fake mode that the compilation in progress hands to backends, else that of ``values``, else a new one.

    Dynamo's own ``example_value`` metadata belongs to yet another mode, which shares only the shape environment.
    """
    from torch._guards import TracingContext, detect_fake_mode
    from torch._subclasses.fake_tensor import FakeTensorMode

    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None else None
    return mode or detect_fake_mode(list(values)) or FakeTensorMode()


def fake_mode_of(value: Any) -> Any:
    """The mode of a fake tensor; None for anything else."""
    return getattr(value, "fake_mode", None)


def fake_mode(symbolic: bool = False) -> Any:
    """A new fake mode; ``symbolic``: with a shape environment."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv() if symbolic else None)


def to_fake(value: Any, mode: Any) -> Any:
    """``value`` as a fake of ``mode``, with the symbols that Dynamo chose for its sizes; no tensor: unchanged."""
    from torch._guards import TracingContext
    from torch._subclasses.fake_tensor import FakeTensor

    if not isinstance(value, torch.Tensor) or (isinstance(value, FakeTensor) and value.fake_mode is mode):
        return value
    context = TracingContext.try_get()
    symbolic = context.tensor_to_context.get(value) if context is not None else None
    if symbolic is None:
        return mode.from_tensor(value, static_shapes=mode.shape_env is None or None)
    return mode.from_tensor(value, symbolic_context=symbolic, source=symbolic.tensor_source, trace=False)


def retrace(
    function: Callable[..., Any], inputs: Sequence[Any], mode: Any, decompositions: Mapping[Any, Any]
) -> torch.fx.GraphModule:
    """``function`` as a graph of ATen ops above autograd (``linear``, ``layer_norm``, ... stay whole).

    ``inputs`` are fakes of ``mode`` or numbers; ``decompositions`` is asked for each operator when it is called.
    Nodes get the metadata of the node that is being interpreted.
    """
    from torch.fx.experimental.proxy_tensor import decompose, get_proxy_mode, make_fx
    from torch.fx.traceback import preserve_node_meta

    def run(*args: Any) -> Any:
        # Not an argument of make_fx: that would copy the mapping, and lose that it decides at each call.
        own = getattr(get_proxy_mode(), "decomposition_table", {})
        with decompose(ChainMap(own, decompositions)):  # type: ignore[arg-type]
            return function(*args)

    with mode, preserve_node_meta():
        return make_fx(run, tracing_mode="real", pre_dispatch=True)(*inputs)


def traced_graph() -> torch.fx.Graph:
    """The graph that the enclosing :func:`retrace` is writing."""
    graph: torch.fx.Graph = _tracer().graph
    return graph


def _tracer() -> Any:
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    mode = get_proxy_mode()
    if mode is None:
        raise RuntimeError("no tracing in progress")
    return mode.tracer


def record_call(target: Any, args: Any, kwargs: Any, result: Any, *, name: str) -> torch.fx.Node:
    """Write a node of value ``result`` (fakes) into the graph being traced, and return it.

    Modules among the arguments come along as attributes.
    """
    from torch.fx.experimental.proxy_tensor import track_tensor_tree

    tracer = _tracer()

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


def wrap_operator() -> Any:
    """The higher-order operator that calls its first argument with the others."""
    return torch.ops.higher_order.wrap


def record_constant(name: str, value: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Write a ``get_attr`` node for a tensor constant into the graph being traced; ``fake`` is its value."""
    from torch.fx.experimental.proxy_tensor import track_tensor_tree

    tracer = _tracer()
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


def is_wrapper_subclass(value: Any) -> bool:
    """Whether a value is a tensor made of other tensors, which compilers see through (``__tensor_flatten__``)."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return isinstance(value, torch.Tensor) and is_traceable_wrapper_subclass(value)


def inner_names(value: Any) -> list[str]:
    """The attributes of a wrapper subclass that are the tensors which it is made of."""
    return [name for name in value.__tensor_flatten__()[0] if isinstance(getattr(value, name), torch.Tensor)]


def record_inner(value: Any) -> None:
    """Write nodes for the tensors that a wrapper subclass is made of, by ``getattr``; its own node has been written."""
    for name in inner_names(value):
        inner = getattr(value, name)
        record_call(getattr, (value, name), {}, inner, name=name.lstrip("_"))
        if is_wrapper_subclass(inner):
            record_inner(inner)


def trace_opened(function: Callable[..., Any], inputs: Sequence[Any]) -> torch.fx.GraphModule:
    """``function`` of fakes as an ATen graph below autograd, with what subclasses among them make of operators."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def run(*values: Any) -> Any:
        nodes = _tracer().tensor_tracker
        for value in filter(is_wrapper_subclass, values):
            record_inner(value)
            del nodes[value]
        return function(*values)

    mode = next(mode for value in inputs if (mode := fake_mode_of(value)) is not None)
    with mode:
        return make_fx(run, tracing_mode="real")(*inputs)


def is_recorded(value: torch.Tensor) -> bool:
    """Inside a :func:`retrace`: whether a node stands for this tensor."""
    from torch.fx.experimental.proxy_tensor import has_proxy_slot

    return bool(has_proxy_slot(value, _tracer()))


class Recorder:
    """The tracer of a :func:`retrace` as :func:`operators_first` hands it on: it records nothing by itself."""

    def __init__(self, mode: Any) -> None:
        self._mode = mode
        self._record = mode.__torch_dispatch__
        #: Grad mode as it was when the trace began.
        self.records_gradients = torch.is_grad_enabled()

    def record(self, op: Any, args: Any, kwargs: Any) -> Any:
        """The operator as a node above autograd, with everything that the trace does to one; returns its result."""
        return self._record(op, (), args, kwargs)

    def has(self, value: torch.Tensor) -> bool:
        """Whether a node stands for this tensor."""
        from torch.fx.experimental.proxy_tensor import has_proxy_slot

        return bool(has_proxy_slot(value, self._mode.tracer))

    def above_autograd(self) -> AbstractContextManager[Any]:
        """Record operators as they are called."""
        return self._mode  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def below_autograd(self, *opened: torch.Tensor) -> Iterator[None]:
        """Record what is left of operators below autograd, and inside ``__torch_dispatch__`` of the subclasses
        ``opened``: an operator on one that has a node would be recorded as it is.
        """
        from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode

        nodes = self._mode.tracer.tensor_tracker
        hidden = [(x, nodes.pop(x)) for x in opened if x in nodes]
        try:
            with ProxyTorchDispatchMode(self._mode.tracer, "real"):
                yield
        finally:
            for x, node in hidden:
                nodes[x] = node


@contextlib.contextmanager
def operators_first(asked: Callable[[Recorder, Any, Any, Any], Any]) -> Iterator[None]:
    """Inside a :func:`retrace`: ``asked(recorder, op, args, kwargs)`` runs each operator, and records what it is."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    mode: Any = get_proxy_mode()
    recorder = Recorder(mode)
    mode.__torch_dispatch__ = lambda op, _, args=(), kwargs=None: asked(recorder, op, args, kwargs or {})
    try:
        yield
    finally:
        del mode.__torch_dispatch__


def untraced() -> AbstractContextManager[Any]:
    """Inside a :func:`retrace`: run on fakes without writing nodes."""
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    return disable_proxy_modes_tracing()


def python_dispatch() -> AbstractContextManager[Any]:
    """What operators on fakes with symbolic sizes need outside of a trace."""
    from torch._dispatch.python import enable_python_dispatcher

    return enable_python_dispatcher()


def is_higher_order(target: Any) -> bool:
    """Whether a node's target is a higher-order operator (it takes graphs as arguments)."""
    return isinstance(target, torch._ops.HigherOrderOperator)


def checkpoint_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a ``tag_activation_checkpoint`` node that belong to its body."""
    from torch._higher_order_ops.wrap import TagActivationCheckpoint

    return dict(TagActivationCheckpoint.divide_kwargs(kwargs)[1])


def checkpoint_policy(body: torch.fx.GraphModule) -> Callable[..., Any] | None:
    """The policy of a selective checkpoint: ``(result, op, *args, **kwargs)`` to the tag if it saves, else None.

    None for a plain checkpoint, which saves nothing.
    """
    from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext

    contexts = body.meta.get("_checkpoint_context_fn")
    ask = getattr(contexts()[0], "policy_fn", None) if contexts is not None else None
    if ask is None:
        return None

    def policy(result: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            context = SelectiveCheckpointContext(is_recompute=False, op_output=result)
        except TypeError:  # torch < 2.12
            context = SelectiveCheckpointContext(is_recompute=False)
        answer = ask(context, op, *args, **kwargs)
        if isinstance(answer, bool):
            return CheckpointPolicy.MUST_SAVE if answer else None
        return answer if answer in (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE) else None

    return policy


def checkpoint_tags(graph_id: int) -> dict[str, Any]:
    """The node metadata by which AOTAutograd's partitioner knows that a value is to be recomputed."""
    from torch.utils.checkpoint import CheckpointPolicy

    return {"recompute": CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": graph_id}


def saved_tag() -> dict[str, Any]:
    """The node metadata by which AOTAutograd's partitioner saves a value of a checkpoint."""
    from torch.utils.checkpoint import CheckpointPolicy

    return {"recompute": CheckpointPolicy.MUST_SAVE}


def is_recomputed(node: torch.fx.Node) -> bool:
    """Whether the node's tag says that its value is computed again in the backward pass."""
    from torch.utils.checkpoint import CheckpointPolicy

    return node.meta.get("recompute") in (CheckpointPolicy.PREFER_RECOMPUTE, CheckpointPolicy.MUST_RECOMPUTE)


def is_set_grad(target: Any) -> bool:
    """Whether a node's target sets grad mode."""
    return target is torch._C._set_grad_enabled


def is_enter_inference_mode(target: Any) -> bool:
    """Whether a node's target opens an inference-mode region (its argument says whether it is one)."""
    return target is torch.autograd.grad_mode._enter_inference_mode


def is_exit_inference_mode(target: Any) -> bool:
    """Whether a node's target closes an inference-mode region (its argument is the node that opened it)."""
    return target is torch.autograd.grad_mode._exit_inference_mode


def is_data_attribute(target: Any) -> bool:
    """Whether a node's target reads ``tensor.data``."""
    return target is getattr(torch._C._autograd, "_get_data_attr", None)


def is_set_storage(target: Any) -> bool:
    """Whether a node's target gives a tensor the memory of another (``set_``; Dynamo writes ``p.data = x`` so)."""
    return target == "set_" or target is torch.ops.aten.set_.source_Tensor or target is torch.Tensor.set_


def resizes_storage(gm: torch.fx.GraphModule) -> bool:
    """Whether Dynamo's graph frees or allocates the memory of its inputs, and computes with them."""
    targets = [node.target for node in gm.graph.nodes if node.op in ("call_function", "call_method")]
    resizes = [
        target for target in targets if is_operator(target) and schema(target).name.endswith("resize_storage_bytes_")
    ]
    return 0 < len(resizes) < len(targets)


def is_version_change(target: Any) -> bool:
    """Whether a node's target takes back what ``p.data = x`` counted as a write."""
    return getattr(target, "__name__", "").startswith("_lower_version_count_by_")


def is_hook_switch(target: Any) -> bool:
    """Whether a node's target allows or forbids hooks on saved tensors (``torch.func.grad`` does)."""
    return getattr(target, "__name__", "") in ("_saved_tensors_hooks_disable", "_saved_tensors_hooks_enable")


def is_attention_preference(target: Any) -> bool:
    """Whether a node's target says which kernels ``scaled_dot_product_attention`` may use from here on."""
    return target is getattr(torch.nn.attention, "_sdpa_kernel", None)


def is_enter_autocast(target: Any) -> bool:
    """Whether a node's target opens an autocast region."""
    return target is torch.amp.autocast_mode._enter_autocast


def is_exit_autocast(target: Any) -> bool:
    """Whether a node's target closes an autocast region (its argument is the node that opened it)."""
    return target is torch.amp.autocast_mode._exit_autocast


def is_functorch(target: Any) -> bool:
    """Whether a node's target changes or reads the stack of functorch transforms (vmap, grad, jvp)."""
    module = getattr(target, "__module__", None) or ""
    return module.startswith(("torch._functorch", "torch._C._functorch"))


#: name of a function that opens or closes a level of a functorch transform -> change of depth
_FUNCTORCH_LEVELS = {
    "_vmap_increment_nesting": 1,
    "_vmap_decrement_nesting": -1,
    "_grad_increment_nesting": 1,
    "_grad_decrement_nesting": -1,
    "_jvp_increment_nesting": 1,
    "_jvp_decrement_nesting": -1,
    "_func_increment_nesting": 1,
    "_func_decrement_nesting": -1,
}


def functorch_depth_change(target: Any) -> int:
    """+1 for a call that opens a level of a functorch transform, -1 for one that closes it, else 0."""
    return _FUNCTORCH_LEVELS.get(getattr(target, "__name__", ""), 0) if is_functorch(target) else 0


def is_functorch_gradient(target: Any) -> bool:
    """Whether a node's target differentiates what a functorch transform computed."""
    return is_functorch(target) and getattr(target, "__name__", "") == "_autograd_grad"


@contextlib.contextmanager
def functorch_levels() -> Iterator[None]:
    """What fails in here leaves no level of a functorch transform open."""
    functorch = torch._C._functorch
    depth = functorch.get_dynamic_layer_stack_depth()
    try:
        yield
    finally:
        if functorch.get_dynamic_layer_stack_depth() > depth:
            functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)


def any_autocast() -> bool:
    """Whether autocast is on for some device."""
    return torch._C._is_any_autocast_enabled()


def without_autocast() -> AbstractContextManager[Any]:
    """Autocast off for every device: how a normalized graph, whose casts are explicit, is compiled and run."""
    return torch._C._DisableAutocast()


def listen(called: Callable[[Any, Any, Any, Any], None]) -> AbstractContextManager[Any]:
    """``called(op, args, kwargs, result)`` for each operator below autograd that runs meanwhile."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Listener(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            called(func, args, kwargs or {}, result)
            return result

    return Listener()


@contextlib.contextmanager
def quiet_fakes() -> Iterator[None]:
    """An operator that fails on fakes raises, as ever, but torch does not log it: for trials that may fail."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def autocast_key(device: str) -> Any:
    """The dispatch key at which autocast for a device type acts; None if it has none, or is inside its own kernel."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    name = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU"}.get(device)
    key = getattr(torch._C.DispatchKey, name, None) if name else None
    if key is None:
        raise RuntimeError(f"autocast for {device} devices is not supported")
    return None if torch._C._dispatch_tls_is_dispatch_key_excluded(key) else key


def has_kernel(op: Any, key: Any) -> bool:
    """Whether an operator has a kernel of its own at a dispatch key."""
    return bool(op.has_kernel_for_dispatch_key(key))


def call_at(op: Any, key: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator's kernel at a dispatch key; what the kernel calls is dispatched (and traced) as usual."""
    return op._op_dk(key, *args, **kwargs)


def overload_name(op: Any) -> str:
    """``"Tensor"`` for ``aten.add.Tensor``."""
    return str(op._overloadname)


def is_composite(op: Any) -> bool:
    """Whether an operator is defined by other operators at all times."""
    return bool(op._can_decompose())


def storage_key(tensor: torch.Tensor) -> int:
    """Equal for two tensors if and only if they share storage (while both live)."""
    from torch.multiprocessing.reductions import StorageWeakRef

    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):  # inside a vmap or grad: it has no storage of its own
        tensor = functorch.get_unwrapped(tensor)
    return int(StorageWeakRef(tensor.untyped_storage()).cdata)


def storage_ref(tensor: torch.Tensor) -> Any:
    """A weak reference to the storage: ``cdata`` (equal for equal storages) and ``expired()``."""
    from torch.multiprocessing.reductions import StorageWeakRef

    return StorageWeakRef(tensor.untyped_storage())


def is_plain_tensor(tensor: torch.Tensor) -> bool:
    """Whether it is no tensor subclass (but a parameter is), no fake, and not wrapped by a function transform."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    return plain and not wrapped


def plain_tensors(value: Any) -> list[torch.Tensor] | None:
    """The tensors in memory of their own that a value consists of: itself, or the parts of a subclass.

    None if there are none to read on this rank alone: it is no tensor, or a fake, or a part of a distributed one.
    """
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if not isinstance(value, torch.Tensor) or hasattr(value, "placements") or fake_mode_of(value) is not None:
        return None
    if is_traceable_wrapper_subclass(value):
        names, _ = value.__tensor_flatten__()
        parts = [plain_tensors(getattr(value, name)) for name in names]
        return None if None in parts else [tensor for part in parts for tensor in part or ()]
    if value.device.type == "meta" or value.layout != torch.strided:
        return None
    return [value]


def remembers_item(tensor: torch.Tensor) -> bool:
    """Whether a fake stands for a number (a Python float that Dynamo made an input), whose ``item()`` is symbolic."""
    return getattr(tensor, "item_memo", None) is not None


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes, either of them symbolic, are equal: as expressions, else for the sizes seen; adds no guard."""
    import sympy
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    a, b = (size.node if isinstance(size, torch.SymInt) else size for size in (a, b))
    x, y = (size if isinstance(size, int) else size.expr for size in (a, b))
    if x == y:
        return True
    if all(isinstance(size, sympy.Expr) and free_unbacked_symbols(size) for size in (x, y)):
        return True  # each trace has symbols of its own for sizes that depend on data
    hints = [size if isinstance(size, int) else (size.hint if size.has_hint() else None) for size in (a, b)]
    return None not in hints and hints[0] == hints[1]


def version(tensor: torch.Tensor) -> int:
    """Counts the in-place writes to a tensor and its views."""
    return tensor._version


def gradient_hooks(tensor: torch.Tensor) -> dict[int, Any]:
    """The hooks on a tensor's gradient by number, in their order; to be edited in place."""
    hooks: dict[int, Any] | None = tensor._backward_hooks
    return {} if hooks is None else hooks


def gathered_parameters(module: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    """The parameters that FSDP2 keeps for a module: the sharded ones, and the gathered ones that there are so far."""
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(module, FSDPModule):
        return
    try:
        state: Any = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # torch < 2.12
            groups = [group for group in [state._fsdp_param_group] if group is not None]
        for parameter in [parameter for group in groups for parameter in group.fsdp_params]:
            yield parameter.sharded_param
            if hasattr(parameter, "_unsharded_param"):
                yield parameter._unsharded_param
    except AttributeError as error:
        raise _missing("FSDPModule._get_fsdp_state, as it was,", error) from error


def when_gathered(follow: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
    """Have ``follow(sharded, gathered)`` called when FSDP2 makes the parameter that a module sees in its forward."""
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

        original = FSDPParam.init_unsharded_param
    except (ImportError, AttributeError) as error:
        raise _missing("FSDPParam.init_unsharded_param", error) from error
    if hasattr(original, "_fxsp_original"):
        return

    @functools.wraps(original)
    def init_unsharded_param(self: Any) -> None:
        before = hasattr(self, "_unsharded_param")
        original(self)
        if not before:
            follow(self.sharded_param, self._unsharded_param)

    init_unsharded_param._fxsp_original = original  # type: ignore[attr-defined]
    FSDPParam.init_unsharded_param = init_unsharded_param  # type: ignore[method-assign]


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


# --- Dynamo: module calls, frames and values while it traces ----------------------------------------------------------


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
        raise _missing("torch._dynamo.variables.nn_module", error) from error
    _module_call_hook = hook
    # Every variant with its own `call_function`: unspecialized modules (all, today), FSDP's, the older kind.
    kinds = [
        kind
        for kind in vars(nn_module).values()
        if isinstance(kind, type) and kind.__name__.endswith("NNModuleVariable") and "call_function" in vars(kind)
    ]
    if not kinds:
        raise _missing("UnspecializedNNModuleVariable.call_function")
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


def on_recompile_limit(reached: Callable[[Any, types.CodeType, str], None]) -> None:
    """Have ``reached(compiler, code, reason)`` called when Dynamo leaves a function to Python, compiled too often.

    The guards that failed are the reason.  What it raises is raised to the user.
    """
    try:
        from torch._dynamo import convert_frame

        original = convert_frame.exceeds_recompile_limit
    except (ImportError, AttributeError) as error:
        raise _missing("torch._dynamo.convert_frame.exceeds_recompile_limit", error) from error

    @functools.wraps(original)
    def exceeds_recompile_limit(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        variables = sys._getframe(1).f_locals
        if found[0] and "compiler_fn" in variables and "code" in variables:
            reached(variables["compiler_fn"], variables["code"], recompile_reason())
        return found

    convert_frame.exceeds_recompile_limit = exceeds_recompile_limit


def keep_graphs_whole(is_ours: Callable[[object], bool]) -> None:
    """Have Dynamo's DDPOptimizer leave graphs whole for backends that are ours: in pieces their bindings are lost."""
    try:
        from torch._dynamo.backends.distributed import DDPOptimizer

        original = DDPOptimizer.compile_fn
    except (ImportError, AttributeError) as error:
        raise _missing("torch._dynamo.backends.distributed.DDPOptimizer.compile_fn", error) from error

    @functools.wraps(original)
    def compile_fn(self: Any, gm: torch.fx.GraphModule, example_inputs: Any, **settings: Any) -> Any:
        if any(is_ours(layer) for layer in backend_layers(self.backend_compile_fn)):
            return self.backend_compile_fn(gm, example_inputs, **settings)
        return original(self, gm, example_inputs, **settings)

    DDPOptimizer.compile_fn = compile_fn  # type: ignore[method-assign]


def keep_lengths_symbolic(is_ours: Callable[[Translation], bool]) -> None:
    """Have Dynamo trace ``torch.as_tensor(length)`` as ``torch.tensor(length)`` where the translation is ours.

    The former makes a symbolic length the number that it happens to be, and so costs a compilation per length; Dynamo
    has a remedy for the latter only.
    """
    try:
        from torch._dynamo.variables import SymNodeVariable, TorchInGraphFunctionVariable

        handlers = TorchInGraphFunctionVariable._get_handlers()
    except (ImportError, AttributeError):
        return  # another compilation per length, and nothing else

    def as_tensor(self: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
        data = args[0] if args else kwargs.get("data")
        if not isinstance(data, SymNodeVariable) or not is_ours(Translation(tx.output)):
            return None
        return TorchInGraphFunctionVariable(torch.tensor).call_function(tx, [*args], kwargs)

    handlers.setdefault(torch.as_tensor, as_tensor)


def substitute_functions(
    table: Mapping[Callable[..., Any], Callable[..., Any]], is_ours: Callable[[Translation], bool]
) -> None:
    """Have Dynamo trace, for each function that is a key of ``table``, the other one, where the translation is ours."""
    try:
        from torch._dynamo.variables import UserFunctionVariable

        original = UserFunctionVariable.call_function
    except (ImportError, AttributeError):
        return  # a graph break more, and nothing else
    if hasattr(original, "_fxsp_original"):
        return

    @functools.wraps(original)
    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        function = getattr(self, "fn", None)
        new = table.get(function) if isinstance(function, types.FunctionType) else None
        if new is None or not is_ours(Translation(tx.output)):
            return original(self, tx, args, kwargs)
        return UserFunctionVariable(new).call_function(  # type: ignore[arg-type]
            tx, [*self.self_args(), *args], kwargs
        )

    call_function._fxsp_original = original  # type: ignore[attr-defined]
    UserFunctionVariable.call_function = call_function  # type: ignore[method-assign]


def mask_helpers(canonical: _F, causal: _F) -> dict[Callable[..., Any], Callable[..., Any]]:
    """The functions of torch's transformer modules that make masks alike, and that ask whether one is causal, with what
    stands for them; without those that this version lacks.
    """
    from torch.nn import functional
    from torch.nn.modules import transformer

    found = {
        getattr(functional, "_canonical_mask", None): canonical,
        getattr(transformer, "_detect_is_causal_mask", None): causal,
    }
    return {old: new for old, new in found.items() if old is not None}


def restart_for_numbers(mode: Any) -> None:
    """Have Dynamo trace this graph anew, now, if AOTAutograd would ask for it once all passes have run.

    Under ``dynamic=True`` a ``float`` (the epsilon of a norm) is an input of the graph, until it is found that its
    value was needed: AOTAutograd looks for such inputs last, and Dynamo begins again without them.
    """
    try:
        import sympy
        from torch._dynamo.exc import TensorifyScalarRestartAnalysis
        from torch._dynamo.symbolic_convert import TensorifyState
        from torch.fx.passes._tensorify_python_scalars import _is_tensorify_enabled
        from torch.utils._sympy.symbol import SymT, symbol_is_type
    except ImportError:
        return  # the graph is partitioned twice, and nothing else
    env = getattr(mode, "shape_env", None)
    known = getattr(env, "replacements", {})
    fixed = [str(s) for s, n in known.items() if symbol_is_type(s, SymT.FLOAT) and isinstance(n, sympy.Number)]
    new = [name for name in fixed if not TensorifyState.should_specialize(name)]
    if new and _is_tensorify_enabled():
        for name in new:
            TensorifyState.specialize(name)
        raise TensorifyScalarRestartAnalysis


def is_restart(error: BaseException) -> bool:
    """Whether Dynamo translates the frame once more after this, and compiles another graph instead."""
    from torch._dynamo.exc import RestartAnalysis

    return isinstance(error, RestartAnalysis)


def _missing(what: str, error: Exception | None = None) -> RuntimeError:
    reason = f": {error}" if error else ""
    return RuntimeError(f"torch {torch.__version__} has no {what}{reason}; fxsp supports torch 2.11 to 2.15")


def backend_layers(compiler: Any) -> Iterator[Any]:
    """A compiler function and everything that it wraps: Dynamo's debug wrapper, ``torch.compile``'s, partials."""
    seen: set[int] = set()
    pending = [compiler]
    while pending:
        layer = pending.pop()
        if layer is None or id(layer) in seen:
            continue
        seen.add(id(layer))
        yield layer
        names = ("_torchdynamo_orig_backend", "compiler_fn", "__wrapped__", "func")
        pending += [getattr(layer, name, None) for name in names]


def options_for(backend: Any, compiler: Any) -> dict[str, Any] | None:
    """The options of ``torch.compile`` for a backend, from what it does with frames; None for another backend."""
    for layer in backend_layers(compiler):
        if getattr(layer, "compiler_fn", None) is backend:
            return dict(getattr(layer, "kwargs", {}).get("options") or {})
    return None


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
        return getattr(getattr(compiler, "__self__", None), "backend_compile_fn", compiler)

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
        from torch._dynamo import convert_frame, eval_frame

        found: list[tuple[torch.nn.Module, types.FrameType]] = []
        frame: types.FrameType | None = sys._getframe()
        while frame is not None:
            code = frame.f_code
            if code.co_filename == eval_frame.__file__ and code.co_name in ("compile_wrapper", "_fn"):
                return found[::-1]
            if code.co_filename == convert_frame.__file__:
                found.clear()  # Dynamo's own frames, and ours
            owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
            if isinstance(owner, torch.nn.Module):
                found.append((owner, frame))
            frame = frame.f_back
        return []

    def is_resumed(self) -> bool:
        """Whether the frame goes on after a graph break."""
        return self.frame()[0].co_name.startswith("torch_dynamo_resume_in")

    def returned(self, gm: torch.fx.GraphModule) -> Any:
        """What the frame returns, as :func:`read_value` gives it; Opaque if the graph ends in a graph break."""
        reason = getattr(getattr(gm, "compile_subgraph_reason", None), "reason", "")
        stack = self._output.root_tx.stack
        if reason != "return_value" or not stack:
            return Opaque("the graph ends in a graph break, before the module returns")
        return finish_value(read_value(stack[-1]), self.tracer())

    def output_names(self, gm: torch.fx.GraphModule) -> list[str]:
        """What the frame's code calls each output of ``gm``, ``"logits"`` or ``"cache.layers[0].keys"``, by position.

        ``""`` for one that is not found; nothing at all where the graph ends in a graph break.
        """
        reason = getattr(getattr(gm, "compile_subgraph_reason", None), "reason", "")
        if reason != "return_value" or not self._output.root_tx.stack:
            return []
        stored = getattr(self._output.side_effects, "store_attr_mutations", {})
        names: dict[torch.fx.Node, str] = {}
        _name_values(self._output.root_tx.stack[-1], "", stored, names, set())
        for item, attributes in list(stored.items()):  # what is kept in an object that the caller has
            if base := _source_name(item):
                for name, value in attributes.items():
                    _name_values(value, f"{base}.{name}", stored, names, set())
        outputs: Any = gm.graph.output_node().args[0]
        return [names.get(node, "") if isinstance(node, torch.fx.Node) else "" for node in outputs]

    def guarded(self) -> set[str]:
        """Sources of the values that the compiled code has guards on."""
        return {guard.name if isinstance(guard.name, str) else guard.name() for guard in self._output.guards}


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


# --- symbolic sizes ---------------------------------------------------------------------------------------------------


def depends_on_data(size: Any) -> bool:
    """Whether a size (as an expression) is known at run time only: the number of places where a mask is true."""
    import sympy
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return isinstance(size, sympy.Expr) and bool(free_unbacked_symbols(size))


def size_hint(size: Any, mode: Any) -> int:
    """A size (a number or an expression) as a number, for the inputs at hand; ``mode`` is the fake mode it is from.

    A size that depends on data counts as 1: how many there will be is not known.
    """
    import sympy

    if not isinstance(size, sympy.Expr):
        return int(size)
    env = getattr(mode, "shape_env", None)
    known = {} if env is None else getattr(env, "backed_var_to_val", None) or env.var_to_val
    value = size.xreplace(known)
    return int(value.subs(dict.fromkeys(value.free_symbols, 1)))


def symint_hint(size: Any) -> int:
    """A ``SymInt`` as a number, for the inputs at hand."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def known_equalities(gm: torch.fx.GraphModule) -> list[Any]:
    """Expressions of sizes that are zero: what tracing the graph has found out, and the compiled code has guards on."""
    import sympy

    modes = (fake_mode_of(node.meta.get("val")) for node in gm.graph.find_nodes(op="placeholder"))
    env = next((mode.shape_env for mode in modes if mode is not None and mode.shape_env is not None), None)
    if env is None:
        return []
    from torch.utils._sympy.functions import FloorDiv

    exact = [mod.args for mod in sorted(env.divisible, key=str)]
    return [
        *(env.replace(n - k * FloorDiv(n, k)) for n, k in exact),
        # In the symbols that are left: sizes of inputs no longer name those that tracing has replaced.
        *(env.replace(guard.expr.lhs - guard.expr.rhs) for guard in env.guards if isinstance(guard.expr, sympy.Eq)),
    ]


def sympy_to_fx(expr: Any, symbols: Mapping[Any, torch.fx.Node], graph: torch.fx.Graph) -> torch.fx.Node:
    """Nodes at the end of ``graph`` that compute a sympy expression of sizes from the nodes of its symbols."""
    import sympy
    from torch.fx.proxy import GraphAppendingTracer, Proxy
    from torch.utils._sympy.functions import FloorDiv
    from torch.utils._sympy.interp import sympy_interp
    from torch.utils._sympy.reference import PythonReferenceAnalysis

    # A size is a whole number, so what it divides by divides it; Python's `n ** -1` would be a float.
    numerator, denominator = sympy.fraction(sympy.together(expr))
    if denominator != 1:
        expr = FloorDiv(numerator, denominator)
    tracer = GraphAppendingTracer(graph)
    values = {symbol: Proxy(symbols[symbol], tracer) for symbol in expr.free_symbols}
    return sympy_interp(PythonReferenceAnalysis, values, expr).node  # type: ignore[no-any-return]


# --- Inductor and AOTAutograd -----------------------------------------------------------------------------------------


def functional_collectives() -> Any:
    """The collectives that compilers see: ``all_reduce``, ``all_to_all_single``, ..., ``wait_tensor``."""
    import torch.distributed._functional_collectives  # registers the shapes of their results

    return torch.ops._c10d_functional


def graph_pass(run: Callable[[torch.fx.Graph], None], uuid: str) -> Any:
    """``run`` as a pass for Inductor's configuration; ``uuid`` names its behaviour in the keys of Inductor's caches."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class FxspPass(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            run(graph)

        def uuid(self) -> str:
            return uuid

    return FxspPass()


def mode_patches(mode: str | None) -> dict[str, Any]:
    """The settings of Inductor that ``torch.compile(mode=...)`` stands for."""
    if mode is None or mode == "default":
        return {}
    from torch._inductor import list_mode_options

    return list_mode_options(mode)


def known_settings(patches: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``patches`` that this version of Inductor has."""
    from torch._inductor import config

    known = config.get_config_copy()
    return {name: value for name, value in patches.items() if name in known}


def inductor_decompositions() -> dict[Any, Callable[..., Any]]:
    """What Inductor has decomposed before its post-grad passes."""
    from torch._inductor.decomposition import select_decomp_table

    return dict(select_decomp_table())


def inductor(gm: torch.fx.GraphModule, inputs: Sequence[Any], patches: Mapping[str, Any]) -> Callable[..., Any]:
    """Compile with Inductor, with settings for this compile only."""
    from torch._inductor.compile_fx import compile_fx

    compiled: Any = compile_fx(gm, inputs, config_patches=dict(patches))
    return compiled  # type: ignore[no-any-return]


def inductor_settings(compiler: Any) -> dict[str, Any] | None:
    """The settings with which ``torch.compile`` calls Inductor, if that is what it calls."""
    from torch import _TorchCompileInductorWrapper

    found = [layer for layer in backend_layers(compiler) if isinstance(layer, _TorchCompileInductorWrapper)]
    return dict(found[0].config) if found else None


def aot_autograd(
    gm: torch.fx.GraphModule,
    inputs: Sequence[Any],
    compiler: Callable[[torch.fx.GraphModule, Sequence[Any]], Callable[..., Any]],
    joint: Callable[[torch.fx.Graph], None],
) -> Callable[..., Any]:
    """AOTAutograd around ``compiler`` (forward, backward and inference); ``joint`` edits joint graphs in place."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    def partition(graph: torch.fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
        joint(graph.graph)
        graph.recompile()
        return min_cut_rematerialization_partition(graph, joint_inputs, **kwargs)

    return aot_autograd(
        fw_compiler=compiler, bw_compiler=compiler, partition_fn=partition, keep_inference_input_mutations=True
    )(gm, inputs)


def functionalized(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` traced without in-place operations; operators around Triton kernels become the kernels."""
    from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize

    return dispatch_functionalize(function, FunctionalTensorMode())


def kernel_calls(graph: torch.fx.Graph) -> list[tuple[Any, dict[str, Any]]]:
    """The Triton kernels in a graph made of a :func:`functionalized` function, with their arguments by name."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_functional

    return [
        (
            kernel_side_table.get_kernel(node.kwargs["kernel_idx"]),
            {
                **kernel_side_table.get_constant_args(node.kwargs["constant_args_idx"]),
                **torch.fx.map_arg(node.kwargs["kwargs"], lambda n: n.meta["val"]),
            },
        )
        for node in graph.nodes
        if node.target is triton_kernel_wrapper_functional
    ]


def boxed(gm: torch.fx.GraphModule) -> Callable[[list[Any]], Any]:
    """The graph as a function of one list, which it empties: inputs are freed after their last use."""
    from torch.fx.graph import _BoxedCodeGen

    gm.graph.set_codegen(_BoxedCodeGen())
    gm.recompile()
    forward = gm.forward

    def run(args: list[Any]) -> Any:
        return forward(args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


# --- hooks: functions on split tensors, and who is looking ------------------------------------------------------------

#: A context in which functions take all tensors as plain ones, and no mode sees them.  Dynamo knows the class itself.
plain_functions: Callable[[], AbstractContextManager[Any]] = torch._C.DisableTorchFunction


def set_compiler(compiler: Any) -> Any:
    """What Dynamo does with the frames of this thread (None: nothing); returns what it did before."""
    from torch._C._dynamo.eval_frame import set_eval_frame

    return set_eval_frame(compiler)


def only_inlined(function: _F) -> _F:
    """Have Dynamo trace ``function`` as a part of its callers, but never compile it for itself."""
    from torch._dynamo.eval_frame import skip_code

    skip_code(function.__code__)
    return function


def in_backward() -> bool:
    """Whether this thread is inside a backward pass (where checkpoints recompute)."""
    return torch._C._current_graph_task_id() != -1


def custom_function(x: torch.Tensor) -> str:
    """The name of the custom ``autograd.Function`` that a tensor came out of; nothing for those of torch (checkpoints)
    and ours, and for any other tensor."""
    return custom_function_of(x.grad_fn)


def custom_function_of(node: Any) -> str:
    """The name of the custom ``autograd.Function`` that a node of the autograd graph is, as :func:`custom_function`."""
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        return ""
    function: Any = type(node)._forward_cls  # type: ignore[attr-defined]
    known = function.__module__.partition(".")[0] in ("torch", "fxsp")
    return "" if known else f"{function.__qualname__}.apply"


def checkpoint_looks() -> bool:
    """Whether a checkpoint asks for the shape of a tensor, to compare what it recomputed with what it had."""
    from torch.utils.checkpoint import _default_meta_extractor

    frame = sys._getframe(1)
    for _ in range(8):  # the frames of a `__torch_function__`
        if frame is None or frame.f_code is _default_meta_extractor.__code__:
            return frame is not None
        frame = frame.f_back  # type: ignore[assignment]
    return False


def group_named(name: str) -> Any:
    """The process group of this name; None if there is none."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    try:
        return _resolve_process_group(name)  # type: ignore[arg-type]
    except (ValueError, RuntimeError, LookupError):
        return None


def group_store(group: Any) -> Any:
    """A store that all ranks of ``group`` share, on a connection of its own where it can be had; None if there is none.

    It is the default store of the process, which every group was made through.
    """
    from torch.distributed import distributed_c10d

    if str(torch.distributed.get_backend(group)) == "fake":  # a store that keeps nothing: there are no other ranks
        return None
    try:
        store: Any = distributed_c10d._get_default_store()
    except (ValueError, RuntimeError):
        return None
    try:
        # Waiting for one key on a connection holds up everyone else on it.
        return store.clone()
    except (AttributeError, NotImplementedError, RuntimeError):
        return store


def group_lives(group: Any) -> bool:
    """Whether a process group has not been destroyed yet."""
    from torch.distributed import distributed_c10d

    return group in distributed_c10d._world.pg_map


def group_timeout(group: Any) -> float:
    """Seconds after which a collective of the group fails."""
    from torch.distributed import distributed_c10d

    found = []
    for device in getattr(group, "_device_types", ()):
        options = getattr(group._get_backend(device), "options", None)
        found.append(getattr(options, "_timeout", distributed_c10d.default_pg_timeout).total_seconds())
    return float(max(found, default=distributed_c10d.default_pg_timeout.total_seconds()))


def recompile_reason() -> str:
    """The guards that failed, if the compilation in progress is one of a frame that had been compiled; else ""."""
    from torch._dynamo import convert_frame

    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == convert_frame.__file__ and "recompile_reason" in frame.f_locals:
            return str(frame.f_locals["recompile_reason"] or "").partition("User stack trace")[0]
        frame = frame.f_back
    return ""


def has_gloo(group: Any) -> bool:
    """Whether tensors on the CPU travel by gloo in a process group."""
    try:
        return str(group._get_backend(torch.device("cpu")).name()) == "gloo"
    except RuntimeError:  # none for this device
        return False


#: A tag that no one sends with.
_NOBODY = 2**31 - 1009


def close_connections(group: Any) -> None:
    """Close this process's connections of a gloo group: operations on it fail, here and on the others that wait for it.

    Callable from any thread.  Of another backend's group nothing is closed.
    """
    from datetime import timedelta

    import torch.distributed as dist

    if group is None or not has_gloo(group):
        return
    # gloo has no call for it, but does it when an operation times out. Nobody answers this one.
    other = 0 if dist.get_rank(group) else 1
    with contextlib.suppress(RuntimeError):
        work = dist.irecv(torch.empty(1, device="cpu"), group=group, group_src=other, tag=_NOBODY)
        if work is not None:
            work.wait(timedelta(milliseconds=1))


#: What torch's backends say when a collective fails.
_COLLECTIVE_ERRORS = (
    "gloo",
    "NCCL",
    "Timed out waiting",
    "Connection closed by peer",
    "Connection reset by peer",
    "Application timeout caused pair closure",
)


def is_collective_error(error: BaseException) -> bool:
    """Whether a collective failed: a connection is gone, or an answer did not come in time."""
    if isinstance(error, getattr(torch.distributed, "DistError", ())):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _COLLECTIVE_ERRORS)


def wrap_backward(results: Any, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> bool:
    """Have ``wrap`` of AOTAutograd's backward pass run in its place, for the graph that returned ``results``.

    True if it was found, or there is nothing to wait for: no result needs a gradient.
    """
    tensors = [x for x in torch.utils._pytree.tree_leaves(results) if isinstance(x, torch.Tensor) and x.requires_grad]
    for x in tensors:
        function = getattr(type(x.grad_fn), "_forward_cls", None)
        run = getattr(function, "_backward_impl", None)
        if run is not None:
            if not hasattr(run, "_fxsp_original"):
                wrapped = wrap(run)
                wrapped._fxsp_original = run  # type: ignore[attr-defined]
                function._backward_impl = staticmethod(wrapped)  # type: ignore[union-attr]
            return True
    return False


# --- logs -------------------------------------------------------------------------------------------------------------


def tracing_artifacts() -> bool:
    """Whether ``TORCH_TRACE`` asks for the artifacts of compilations."""
    from torch._logging._internal import trace_log

    return bool(os.environ.get("TORCH_TRACE")) and bool(trace_log.handlers)


def trace_artifact(name: str, text: str) -> None:
    """``text`` as an artifact of the compilation in progress, as tlparse reads it."""
    from torch._logging import trace_structured

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=lambda: text)


# --- errors -----------------------------------------------------------------------------------------------------------


def unwrapped_by_dynamo(error: Exception) -> Exception:
    """``error`` as an exception of the same type, and of the type that Dynamo passes on to the user as it is."""
    from torch._dynamo.exc import ShortenTraceback

    kind = type(error)
    both = type(kind.__name__, (kind, ShortenTraceback), {"__module__": kind.__module__, "__init__": _plain_init})
    return both(*error.args).with_traceback(error.__traceback__)  # type: ignore[no-any-return]


def _plain_init(self: Any, *args: Any) -> None:
    Exception.__init__(self, *args)
    self.first_useful_frame = None
