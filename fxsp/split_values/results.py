"""What a module returned, with other tensors in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["with_tensors"]


def with_tensors(output: Any, is_one: Callable[[Any], bool], change: Callable[[Tensor], Tensor]) -> Any:
    """``output``, nested containers included, with ``change(x)`` for each tensor ``x`` that ``is_one``.

    What holds none is returned as it is; a dataclass that is no dictionary is changed itself.
    """
    if isinstance(output, Tensor):
        return change(output) if is_one(output) else output
    if dataclasses.is_dataclass(output) and not isinstance(output, (type, Mapping)):
        for field in dataclasses.fields(output):
            old = getattr(output, field.name)
            new = with_tensors(old, is_one, change)
            if new is not old:
                object.__setattr__(output, field.name, new)  # a frozen one, too
        return output
    leaves, structure = pytree.tree_flatten(output)
    if not any(map(is_one, leaves)):
        return output
    return pytree.tree_unflatten([change(leaf) if is_one(leaf) else leaf for leaf in leaves], structure)
