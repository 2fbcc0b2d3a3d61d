"""Fake tensors, and what memory a tensor is a view of."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch


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


@contextlib.contextmanager
def quiet_fakes() -> Iterator[None]:
    """An operator that fails on fakes raises, as ever, but torch does not log it: for trials that may fail."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


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
    kind = type(tensor)
    if (kind is not torch.Tensor and kind is not torch.nn.Parameter) or tensor.layout is not torch.strided:
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


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
