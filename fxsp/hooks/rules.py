"""What elementwise functions do to split values, and how operands are brought together.

Operands align from the right, as in broadcasting.  A whole operand beside a split one has at the token dimension size
one (it serves all tokens), the global length (its own rows are taken), or it was made from a local length, like
``torch.arange(x.shape[1])``: on every rank but the first such a value would be wrong, so it is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fxsp.hooks.dispatch import Call, gather, mark, needs_whole, shard
from fxsp.hooks.gradients import use
from fxsp.hooks.layout import Layout, global_size, is_constant, layout_of, local_size, means_local, moved, same_tokens
from fxsp.hooks.sizes import meaning, split_size
from fxsp.hooks.spelling import is_in_place
from fxsp.hooks.where import note_gather, refuse
from fxsp.torch_internals import checkpoint_looks, in_backward

__all__ = ["aligned", "as_strided", "copy", "description", "dropout", "elementwise", "fit", "marked", "random"]
__all__ += ["run_used", "same_shape", "sizes"]


def marked(out: Any, layout: Layout | None) -> Any:
    """All tensors of a result, marked with one layout (None: they are whole)."""
    if layout is None:
        return out
    if isinstance(out, Tensor):
        return mark(out, layout)
    if isinstance(out, (tuple, list)):
        # For Dynamo, which allows no attributes on the values of one function, values of their own.
        alone = torch.compiler.is_compiling()
        return type(out)([mark(x.view_as(x) if alone else x, layout) if isinstance(x, Tensor) else x for x in out])
    return out


def run_used(call: Call, layout: Layout) -> Any:
    """The call on local values, whole ones beside them."""
    return call.with_values(lambda x: x if layout_of(x) is not None else use(x, layout.region))


#: What tests compare a rank's rows with, they have cut out themselves.
_COMPARISONS = frozenset("eq ne not_equal isclose".split())


def fit(name: str, x: Tensor, layout: Layout, back: int) -> Tensor:
    """A whole tensor as an operand of split ones whose token dimension is ``back`` (negative) from the end."""
    size = x.shape[back] if x.dim() >= -back else 1
    if size == global_size(layout) and size != 1:
        return shard(x, moved(layout, x.dim() + back))
    if size == local_size(layout) and size != 1 and name not in _COMPARISONS and x.stride(back) and not is_constant(x):
        refuse(
            name,
            f"combines split tokens with a value of the local length {size}, of which hooks do not know which tokens "
            "it belongs to (positions made from x.shape?).  Name it in the plan, make it of the global length, or, if "
            "it is the same for all tokens, by expand or zeros_like",
        )
    return use(x, layout.region)  # type: ignore[no-any-return]


def aligned(name: str, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Layout, int]:
    """Operands of an elementwise function: local values, their common layout, its dimension from the end (< 0).

    Of operands that are split along different dimensions (queries against keys) the leftmost one stays split.
    """
    best: Layout | None = None
    back = 0
    for x in tensors:
        layout = layout_of(x)
        if layout is not None and layout.dim - x.dim() < back:
            best, back = layout, layout.dim - x.dim()
    assert best is not None
    result = []
    for x in tensors:
        layout = layout_of(x)
        if layout is None:
            result.append(fit(name, x, best, back))
        elif layout.dim - x.dim() != back:
            note_gather(name, layout, x, "combines values that are split along different dimensions")
            result.append(fit(name, gather(x, layout, used=False), best, back))
        elif same_tokens(layout, best):
            result.append(x)
        elif global_size(layout) == global_size(best):
            note_gather(name, layout, x, "combines values whose tokens are split in different ways")
            result.append(shard(gather(x, layout, used=False), moved(best, layout.dim)))
        else:
            needs_whole(name, f"combines {global_size(best)} split tokens with {global_size(layout)} others", best)
    return result, best, back


# --- elementwise ------------------------------------------------------------------------------------------------------


def elementwise(call: Call) -> Any:
    """Functions of one tensor or several, row by row."""
    name, values = call.name, call.values
    if call.kwargs.get("out") is not None:
        refuse(name, "writes into an `out` argument")
    places = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
    if name == "where" and len(values) == 1:
        needs_whole(name, "with one argument lists positions, which differ by rank", layout_of(values[0]))
    new, layout, back = aligned(name, [values[i] for i in places])
    if is_in_place(call.func) and new[0] is not call.args[0]:
        needs_whole(name, "writes split tokens into a whole tensor, in place", layout)
    for i, value in zip(places, new, strict=True):
        values[i] = value
    count = len(call.args)
    out = call.func(*values[:count], **dict(zip(call.kwargs, values[count:], strict=True)))
    return mark(out, moved(layout, out.dim() + back))


def same_shape(call: Call) -> Any:
    """Functions of one tensor, row by row, and attributes of its shape; further tensors lend their dtype or device."""
    return marked(call.run(), layout_of(call.x))


def description(call: Call) -> Any:
    """What is said of the local tensor, and new tensors that only take its dtype and device."""
    return call.run()


def sizes(call: Call) -> Any:
    """The sizes of one process, where they are to be told apart."""
    name, layout, found = call.name, layout_of(call.x), call.run()
    if layout is None or means_local(layout) or (in_backward() and checkpoint_looks()):
        return found
    local, whole = local_size(layout), global_size(layout)
    if name in ("numel", "nelement", "__len__"):
        if name == "__len__" and layout.dim != 0:
            return found
        size = split_size(found // local * whole, found, layout.region)
        return int(meaning(size)) if name == "__len__" else size
    if isinstance(found, int):
        return split_size(whole, local, layout.region) if call.dim(1) == layout.dim else found
    return torch.Size([split_size(whole, local, layout.region) if i == layout.dim else n for i, n in enumerate(found)])


def as_strided(call: Call) -> Any:
    """Refused."""
    refuse(call.name, "takes elements by their place in memory, which differs by rank")


def copy(call: Call) -> Any:
    """``target.copy_(source)``: a new local buffer becomes split."""
    target, source = call.x, call.get(1, "src other")
    layout = layout_of(source)
    if layout_of(target) is None and layout is not None and target.dim() == source.dim():
        if target.shape[layout.dim] != source.shape[layout.dim]:
            needs_whole(call.name, "writes split tokens into a whole tensor", layout)
        return mark(call.run(), layout)
    return elementwise(call)


# --- randomness -------------------------------------------------------------------------------------------------------


def _global_like(x: Tensor, layout: Layout) -> Tensor:
    shape = list(x.shape)
    shape[layout.dim] = global_size(layout)
    return torch.ones(shape, dtype=x.dtype, device=x.device)


def dropout(call: Call) -> Any:
    """The draw of one process, of which each rank takes its rows."""
    x, p = call.x, call.get(1, "p", 0.5)
    layout = layout_of(x)
    if layout is None or not call.get(2, "training train", True) or p == 0:
        return marked(call.run(), layout)
    noise = shard(F.dropout(_global_like(x, layout), p, True), layout)
    return mark(x.mul_(noise) if call.get(3, "inplace", False) else x * noise, layout)


def random(call: Call) -> Any:
    """The draw of one process, of which each rank takes its rows."""
    x, layout = call.x, layout_of(call.x)
    if layout is None or is_in_place(call.func):
        needs_whole(call.name, "draws in place", layout)
    whole = gather(x, layout, used=False) if call.name == "bernoulli" else _global_like(x, layout)
    return shard(call.func(whole, *call.args[1:], **call.kwargs), layout)
