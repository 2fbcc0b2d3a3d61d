"""Functions by the name that a rule has: one for an operator, a method, a function and their in-place variants."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["is_in_place", "is_reflected", "name_of"]


@torch.compiler.assume_constant_result  # Dynamo does not know the name of a builtin
def name_of(func: Any) -> str:
    """``"add"`` for ``torch.add``, ``x.add_``, ``x + y``, ``torch.ops.aten.add.Tensor``; ``".shape"``."""
    name: str = func.__name__
    if name == "__get__":
        return f".{func.__self__.__name__}"
    if name.startswith("__") and name.endswith("__"):
        return _DUNDER.get(name, name)
    if isinstance(func, torch._ops.OpOverloadPacket) and not func._qualified_op_name.startswith("aten::"):
        return func._qualified_op_name
    if "." in name:  # an operator; those of other libraries are not known by their name alone
        namespace = getattr(func, "namespace", "aten")
        name = name.partition(".")[0] if namespace == "aten" else f"{namespace}::{name}"
    return name.rstrip("_") or name


@torch.compiler.assume_constant_result
def is_in_place(func: Any) -> bool:
    """Whether a function writes to its first argument."""
    name: str = func.__name__
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name != "__invert__")
    return name.partition(".")[0].endswith("_")


@torch.compiler.assume_constant_result
def is_reflected(func: Any) -> bool:
    """Whether a function is the reflected operator, ``y.__radd__(x)`` for ``x + y``."""
    return bool(func.__name__.startswith("__r"))


_BINARY = "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift"
_ALIAS = {"truediv": "div", "floordiv": "floor_divide", "mod": "remainder", "and": "bitwise_and"}
_ALIAS |= {"or": "bitwise_or", "xor": "bitwise_xor", "lshift": "bitwise_left_shift", "rshift": "bitwise_right_shift"}
_DUNDER = {f"__{kind}{op}__": _ALIAS.get(op, op) for op in _BINARY.split() for kind in ("", "r", "i")}
_DUNDER |= {f"__{op}__": op for op in "eq ne lt le gt ge neg abs getitem setitem".split()}
_DUNDER |= {"__invert__": "bitwise_not", "__div__": "div", "__idiv__": "div", "__rdiv__": "div", "__pos__": "positive"}
