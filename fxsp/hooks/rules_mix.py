"""What functions that combine the elements of a dimension do to split values: products, norms, reductions.

As long as the dimension is another one than that of the tokens, each rank works on its own rows.  Otherwise the value
is gathered, and the function runs on all tokens; a result that has one row for each of them is split again.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxsp.hooks.dispatch import Call, gather, handle, mark, needs_whole
from fxsp.hooks.gradients import use
from fxsp.hooks.layout import layout_of, moved
from fxsp.hooks.rules import elementwise, fit, marked, run_used
from fxsp.hooks.spelling import is_reflected
from fxsp.hooks.where import note_gather, refuse
from fxsp.torch_internals import in_backward

__all__ = ["ALONG", "addmm", "along", "comparison", "einsum", "embedding", "loss", "matmul", "one_hot", "outer"]
__all__ += ["rows_of_this_rank"]


# --- products ---------------------------------------------------------------------------------------------------------


def _product(
    call: Call, operands: Sequence[Any], terms: Sequence[str], right: str, why: Sequence[str], run: Callable[..., Any]
) -> Any:
    """Dimensions have letters, as in ``einsum``; the leftmost one of the result that is split stays split.

    An operand that is split along another one, which is contracted or the result's too, is gathered, ``why``.
    """
    layouts = [layout_of(x) for x in operands]
    letters = {term[own.dim]: own for term, own in zip(terms, layouts, strict=True) if own is not None}
    split = next((letter for letter in right if letter in letters), "")
    kept = letters.get(split)
    local = []
    for x, term, own, reason in zip(operands, terms, layouts, why, strict=True):
        at = -1 if kept is None else term.find(split)
        if kept is None or own is None or own.dim != at or own.lengths != kept.lengths:
            if own is not None:
                note_gather(call.name, own, x, reason)
                x = gather(x, own, used=kept is not None and at < 0)
            if kept is not None and at >= 0:
                x = fit(call.name, x, kept, at - x.dim())
            elif kept is not None and own is None:
                x = use(x, kept.region)
        local.append(x)
    out = run(*local)
    return out if kept is None else mark(out, moved(kept, right.index(split)))


_OF_MATMUL = ("contracts over tokens", "needs all tokens of its second operand")


def matmul(call: Call) -> Any:
    """``[.., m, k] @ [.., k, n]``: queries stay split, and keys are gathered beside them; so is what is contracted."""
    a, b = call.x, call.get(1, "other mat2 vec")
    if is_reflected(call.func):
        a, b = b, a
    call = Call(call.name, torch.matmul, (a, b), {})
    if a.dim() < 2 or b.dim() < 2:
        return call.on_whole("of vectors is not followed")
    stack = string.ascii_uppercase[: max(a.dim(), b.dim()) - 2]
    terms = [stack[len(stack) + 2 - a.dim() :] + "mk", stack[len(stack) + 2 - b.dim() :] + "kn"]
    return _product(call, (a, b), terms, f"{stack}mn", _OF_MATMUL, torch.matmul)


def addmm(call: Call) -> Any:
    """``beta * bias + alpha * (a @ b)``."""
    bias, a, b = call.args
    product = matmul(Call("matmul", torch.matmul, (a, b), {}))
    product = handle(torch.mul, (product, call.kwargs.get("alpha", 1)), {})
    return handle(torch.add, (product, handle(torch.mul, (bias, call.kwargs.get("beta", 1)), {})), {})


def outer(call: Call) -> Any:
    """``[m], [n] -> [m, n]``."""
    return _product(call, (call.x, call.get(1, "vec2 other")), "mn", "mn", _OF_MATMUL, call.func)


def einsum(call: Call) -> Any:
    """The equation says what becomes of each dimension."""
    equation, *operands = call.args
    operands = list(operands[0]) if isinstance(operands[0], (list, tuple)) else operands
    if not isinstance(equation, str) or "." in equation:
        refuse(call.name, "with an ellipsis or number lists is not followed")
    left, arrow, right = equation.replace(" ", "").partition("->")
    if not arrow:
        refuse(call.name, "without `->` is not followed")
    why = ["contracts over tokens, or keeps two token dimensions"] * len(operands)
    return _product(call, operands, left.split(","), right, why, lambda *local: call.func(equation, *local))


# --- tables -----------------------------------------------------------------------------------------------------------


def embedding(call: Call) -> Any:
    """Split numbers of rows of a whole table, in either order of the arguments."""
    first, second = call.x, call.get(1, "weight indices")
    if first.dtype.is_floating_point:  # torch.embedding(weight, indices)
        first, second = second, first
    layout = Call(call.name, call.func, (first, second), {}).layout()
    return marked(run_used(call, layout), layout)


def one_hot(call: Call) -> Any:
    """A row of ``num_classes`` for each token."""
    if call.get(1, "num_classes", -1) < 0:
        refuse(call.name, "without num_classes depends on all tokens")
    return marked(call.run(), call.layout())


# --- along some dimensions --------------------------------------------------------------------------------------------


class _Along(NamedTuple):
    """What a function of one tensor works along, and what is done where that are the tokens."""

    names: str
    #: Where its argument ``dim`` stands, or the dimensions of a call; None: all.
    dims: int | Callable[[Call], Any]
    default: Any = None
    why: str = "works along the tokens"
    #: Whether the result has a row for each token even so.
    rows: bool = True
    #: Whether its arguments or results count tokens, so that numbers must not be local ones.
    counts: bool = False


def _windows(call: Call) -> Any:
    """``[batch, channels, ...]``: tokens in the batch are independent of one another."""
    x, name = call.x, call.name
    return None if name.endswith("d") and x.dim() < int(name[-2]) + 2 else range(1, x.dim())


def _padded(call: Call) -> list[int]:
    return [-1 - i // 2 for i, amount in enumerate(call.get(1, "pad")) if amount]


def _normalized(call: Call) -> range:
    return range(-len(call.get(1, "normalized_shape")), 0)


_REDUCED = """
    sum mean amax amin nansum nanmean prod any all argmax argmin logsumexp max min median nanmedian var std var_mean
    std_mean count_nonzero
"""
_WINDOWS = """
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d avg_pool1d avg_pool2d avg_pool3d
    max_pool1d max_pool2d max_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d interpolate
"""
_ROWS = (
    _Along("linear", lambda call: -1, why="contracts over tokens", rows=False),
    _Along("layer_norm rms_norm", _normalized, why="normalizes over tokens"),
    _Along("group_norm instance_norm batch_norm", lambda call: None, why="normalizes over tokens"),
    _Along("softmax log_softmax softmin sort argsort", 1, -1),
    _Along("cumsum cumprod cummax cummin logcumsumexp flip", 1),
    _Along("roll", 2),
    _Along("normalize", 2, 1),
    _Along("diff", 2, -1),
    _Along("glu mode", 1, -1, rows=False),
    _Along("topk kthvalue", 2, -1, rows=False),
    _Along(_REDUCED, 1, why="reduces over tokens", rows=False),
    _Along("norm linalg_norm linalg_vector_norm vector_norm", 2, why="reduces over tokens", rows=False),
    _Along(_WINDOWS, _windows),
    _Along("unbind", 1, 0, "takes the tokens apart", counts=True),
    _Along("view_as_complex", lambda call: -1, why="makes complex numbers of pairs of tokens", counts=True),
    _Along("repeat_interleave", 2, why="repeats tokens", counts=True),
    _Along("pad constant_pad_nd", _padded, why="adds tokens", counts=True),
)
#: Names -> what these functions work along.
ALONG = {name: row for row in _ROWS for name in row.names.split()}


def along(call: Call) -> Any:
    """Each rank has its rows, as long as it works along other dimensions."""
    if call.name in ("max", "min") and (isinstance(call.get(1, ""), Tensor) or "other" in call.kwargs):
        return elementwise(call)
    x, layout, entry = call.x, call.layout(), ALONG[call.name]
    if isinstance(entry.dims, int):
        dims = call.get(entry.dims, "dim dims axis", entry.default)
        dims = None if isinstance(dims, bool) or dims == () or dims == [] else dims  # a bool: x.var(unbiased)
    else:
        dims = entry.dims(call)
    if dims is None and call.name in ("roll", "flip"):
        refuse(call.name, "of all elements is not followed")
    dims = range(x.dim()) if dims is None else dims
    mixed = {d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)}
    if layout.dim in mixed:
        if entry.counts:
            needs_whole(call.name, entry.why, layout)
        return call.on_whole(entry.why, layout if entry.rows else None)
    out = run_used(call, layout)
    gone = (out if isinstance(out, Tensor) else out[0]).dim() < x.dim()
    return marked(out, moved(layout, layout.dim - gone * sum(d < layout.dim for d in mixed)))


# --- what leaves torch, or compares -----------------------------------------------------------------------------------


def loss(call: Call) -> Any:
    """A number for all tokens."""
    return call.on_whole("compares all tokens")


def comparison(call: Call) -> Any:
    """Of all tokens; beside rows that somebody cut out for this rank, of these."""
    a, b = call.x, call.get(1, "other")
    if (layout_of(a) is None or layout_of(b) is None) and a.shape == b.shape:
        return call.run()
    return call.on_whole("compares all tokens")


def rows_of_this_rank(call: Call) -> Any:
    """To the model all tokens; to who looks from outside what this rank has."""
    region = call.layout().region
    return call.run() if region.alone or not (region.running or in_backward()) else call.on_whole("leaves torch")
