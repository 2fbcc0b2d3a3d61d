"""In-place operators, and the operators that compute the same value without writing."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from fxsp import torch_internals
from fxsp.errors import UnsupportedError
from fxsp.passes.builder import Writer
from fxsp.passes.graph import Call
from fxsp.passes.rules.families import family, names_of
from fxsp.source import describe
from fxsp.types import as_length, same_length

__all__ = ["NEW_VIEW", "functional_value", "gives_memory", "written_arguments"]

aten = torch.ops.aten

#: In-place operators that change what the variable sees, not the memory.
NEW_VIEW = frozenset(f"{name}_" for name in names_of("view"))

#: In-place operators for which no functional operator has the same name.
_FUNCTIONAL = {"normal_": "normal_functional"}


def written_arguments(node: Node) -> list[Node]:
    """The arguments that an operator call writes to."""
    if node.op != "call_function" or not torch_internals.is_operator(node.target):
        return []
    schema = torch_internals.schema(node.target)
    hidden = node.target in family("writes_statistics")
    if not schema.is_mutable and not hidden:
        return []
    call = Call(node)
    if not hidden:
        return call.written
    writes = call.get("training", call.get("use_input_stats"))
    values = [call["running_mean"], call["running_var"]] if writes else []
    return [n for n in values if n is not None]


def gives_memory(node: Node) -> bool:
    """Whether a node is the ``set_`` with which *normalize* gives an input its memory at the end."""
    return node.target is aten.set_.source_Tensor


def functional_value(w: Writer, node: Node, written: Node, read: Callable[[Node], Node]) -> Node:
    """What an in-place operator call writes, as a value: shape and dtype of ``written``, which has these facts.

    ``read`` gives the present value of an argument.  Raises :class:`UnsupportedError` if the operator is not known.
    """
    name = torch_internals.schema(node.target).name.removeprefix("aten::")
    found = Call(node).arguments
    if name in names_of("moves_memory"):
        raise UnsupportedError(f"{describe(node)} changes the memory of a tensor")
    if name == "copy_":
        return _fitted(w, read(found["src"]), written, read)
    if name == "zero_":
        return _filled(w, 0, written, read)
    if name == "fill_":
        value = found["value"]
        constant = _constant(w, value)
        if constant is not None or not isinstance(value, Node) or not isinstance(value.meta["val"], torch.Tensor):
            return _filled(w, value if constant is None else constant, written, read)
        return _fitted(w, read(value), written, read)
    target = _functional(node.target, name)
    if target is None:
        raise UnsupportedError(f"{describe(node)} writes in place, and no functional operator is known for it")
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), read)
    kwargs = {k: v for k, v in kwargs.items() if k != "out"}
    if name == "bernoulli_" and "p" in found:
        args = (args[0], found["p"])  # it has a default in place only
    return _fitted(w, w.call(target, *args, **kwargs), written, read)


def _functional(op: Any, name: str) -> Any:
    """``add_.Tensor`` and ``add.out`` -> ``add.Tensor``, ``__iand__.Tensor`` -> ``__and__.Tensor``; None if unknown."""
    overload = torch_internals.overload_name(op)
    if (name, overload) == ("bernoulli_", "float"):
        overload = "p"
    if (match := re.fullmatch(r"__i(\w+)__", name)) is not None:
        pure = f"__{match[1]}__"
    elif name in _FUNCTIONAL:
        pure = _FUNCTIONAL[name]
    elif name.endswith("_"):
        pure = name[:-1]
    else:
        return _without_out(op, name)
    found = getattr(getattr(aten, pure, None), overload, None)
    return found if found is not None and _types(found) == _types(op) else None


def _without_out(op: Any, name: str) -> Any:
    packet = getattr(aten, name)
    signature = [a for a in _signature(op) if a[0] != "out"]
    if len(signature) + 1 != len(_signature(op)):
        return None
    candidates = (getattr(packet, overload) for overload in packet.overloads())
    return next((c for c in candidates if _signature(c) == signature), None)


def _types(op: Any) -> list[str]:
    return [kind for _, kind in _signature(op)]


def _signature(op: Any) -> list[tuple[str, str]]:
    return [(a.name, re.sub(r"\(.*?\)", "", str(a.type))) for a in torch_internals.schema(op).arguments]


def _fitted(w: Writer, value: Node, written: Node, read: Callable[[Node], Node]) -> Node:
    """``value`` cast and broadcast to what it is written to."""
    have, want = value.meta["val"], written.meta["val"]
    if have.device != want.device:
        value = w.call(aten.to.device, value, want.device, want.dtype)
    elif have.dtype != want.dtype:
        value = w.call(aten.to.dtype, value, want.dtype)
    same = have.ndim == want.ndim and all(
        same_length(as_length(a), as_length(b)) for a, b in zip(have.shape, want.shape, strict=True)
    )
    return value if same else w.call(aten.expand.default, value, _sizes(w, written, read))


def _filled(w: Writer, value: Any, written: Node, read: Callable[[Node], Node]) -> Node:
    want = written.meta["val"]
    return w.call(aten.full.default, _sizes(w, written, read), value, dtype=want.dtype, device=want.device)


def _sizes(w: Writer, written: Node, read: Callable[[Node], Node]) -> list[Any]:
    shape = written.meta["val"].shape
    return list(shape) if all(isinstance(size, int) for size in shape) else w.sizes_of(read(written))


def _constant(w: Writer, value: Any) -> int | float | bool | None:
    """The number that a node is, if it is a constant of the graph module: ``x[0] = 1`` arrives as a tensor."""
    if not isinstance(value, Node) or value.target is not aten.lift_fresh_copy.default:
        return None
    source = value.args[0]
    if not isinstance(source, Node) or source.op != "get_attr" or w.graph.owning_module is None:
        return None
    tensor = getattr(w.graph.owning_module, str(source.target), None)
    if not isinstance(tensor, torch.Tensor) or tensor.ndim or tensor.is_complex() or tensor.device.type != "cpu":
        return None
    return tensor.item()
