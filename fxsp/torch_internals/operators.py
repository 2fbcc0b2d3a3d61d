"""Operators: their schemas, overloads, tags and kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch


def is_operator(target: Any) -> bool:
    """Whether a node's target is an overload of a registered operator (``torch.ops.aten.add.Tensor``)."""
    return isinstance(target, torch._ops.OpOverload)


def schema(target: Any) -> Any:
    """The schema of an operator overload: ``name``, ``arguments``, ``is_mutable``."""
    return target._schema


class Parameter(NamedTuple):
    """One argument of an operator's schema; ``default`` is None where there is none."""

    name: str
    default: Any
    has_default: bool
    kwarg_only: bool
    is_written: bool


@cache
def parameters(target: Any) -> tuple[Parameter, ...]:
    """The arguments of an operator overload's schema, in order."""
    return tuple(
        Parameter(
            known.name,
            known.default_value,
            known.has_default_value(),
            known.kwarg_only,
            known.alias_info is not None and known.alias_info.is_write,
        )
        for known in schema(target).arguments
    )


def arguments_of(node: torch.fx.Node) -> dict[str, Any]:
    """The arguments of an operator call by name, in the order of the schema, defaults included."""
    args, kwargs = node.args, node.kwargs
    return {
        known.name: args[i] if i < len(args) else kwargs.get(known.name, known.default)
        for i, known in enumerate(parameters(node.target))
    }


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


def wrap_operator() -> Any:
    """The higher-order operator that calls its first argument with the others."""
    return torch.ops.higher_order.wrap


def is_higher_order(target: Any) -> bool:
    """Whether a node's target is a higher-order operator (it takes graphs as arguments)."""
    return isinstance(target, torch._ops.HigherOrderOperator)


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


def functional_collectives() -> Any:
    """The collectives that compilers see: ``all_reduce``, ``all_to_all_single``, ..., ``wait_tensor``."""
    import torch.distributed._functional_collectives  # registers the shapes of their results

    return torch.ops._c10d_functional


def inductor_decompositions() -> dict[Any, Callable[..., Any]]:
    """What Inductor has decomposed before its post-grad passes."""
    from torch._inductor.decomposition import select_decomp_table

    return dict(select_decomp_table())


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
