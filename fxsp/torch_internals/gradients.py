"""Hooks on gradients, the backward pass of a compiled graph, and the parameters that FSDP2 keeps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from fxsp.torch_internals.versions import missing


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
        raise missing("FSDPModule._get_fsdp_state, as it was,", error) from error


def when_gathered(follow: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
    """Have ``follow(sharded, gathered)`` called when FSDP2 makes the parameter that a module sees in its forward."""
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

        original = FSDPParam.init_unsharded_param
    except (ImportError, AttributeError) as error:
        raise missing("FSDPParam.init_unsharded_param", error) from error
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


def unseen_by_saving_hooks() -> AbstractContextManager[Any]:
    """What is saved for a backward pass inside does not reach hooks that are in force (a checkpoint counts there)."""
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


def in_backward() -> bool:
    """Whether this thread is inside a backward pass (where checkpoints recompute)."""
    return torch._C._current_graph_task_id() != -1


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
