"""Tensor subclasses: what they are made of, and what their operators do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from fxsp.torch_internals.fakes import fake_mode_of
from fxsp.torch_internals.trace import proxy_tracer, record_call


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
        nodes = proxy_tracer().tensor_tracker
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

    return bool(has_proxy_slot(value, proxy_tracer()))


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


#: What parts of a distributed value say: where they are (of a DTensor, and of ours).
_PLACED = ("placements", "placed")


def plain_tensors(value: Any) -> list[torch.Tensor] | None:
    """The tensors in memory of their own that a value consists of: itself, or the parts of a subclass.

    None if there are none to read on this rank alone: it is no tensor, or a fake, or a part of a distributed one.
    """
    if (
        not isinstance(value, torch.Tensor)
        or any(hasattr(value, a) for a in _PLACED)
        or fake_mode_of(value) is not None
    ):
        return None
    if is_wrapper_subclass(value):
        names, _ = value.__tensor_flatten__()  # type: ignore[attr-defined]
        parts = [plain_tensors(getattr(value, name)) for name in names]
        return None if None in parts else [tensor for part in parts for tensor in part or ()]
    if value.device.type == "meta" or value.layout != torch.strided:
        return None
    return [value]
