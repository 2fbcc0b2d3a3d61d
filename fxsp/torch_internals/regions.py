"""Regions of a graph with a mode of their own: checkpoints, grad mode, autocast, functorch's levels."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch


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


_LEVEL = re.compile(r"_(?:vmap|grad|jvp|func)_(in|de)crement_nesting")


def functorch_depth_change(target: Any) -> int:
    """+1 for a call that opens a level of a functorch transform, -1 for one that closes it, else 0."""
    level = _LEVEL.fullmatch(getattr(target, "__name__", "")) if is_functorch(target) else None
    return 0 if level is None else 1 if level[1] == "in" else -1


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


def outside_autocast(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` with :func:`without_autocast` at each call."""

    def call(*args: Any) -> Any:
        with without_autocast():
            return run(*args)

    return call


def autocast_state() -> tuple[Any, ...]:
    """What autocast does, for each device where it is on; equal for two moments if it does the same."""
    if not any_autocast():
        return ()
    devices = {"cpu", torch._C._get_accelerator().type}
    return tuple((d, torch.get_autocast_dtype(d)) for d in sorted(devices) if torch.is_autocast_enabled(d))
