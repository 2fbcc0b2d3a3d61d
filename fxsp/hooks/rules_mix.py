"""What functions that combine the elements of a dimension do to split values: products, norms, reductions.

As long as the dimension is another one than that of the tokens, each rank works on its own rows.  Otherwise the value
is gathered, and the function runs on all tokens; a result that has one row for each of them is split again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxsp.hooks.dispatch import gather, mark, note_gather, on_whole, rule
from fxsp.hooks.gradients import use
from fxsp.hooks.layout import layout_of, moved
from fxsp.hooks.rules import argument, elementwise, fit, marked
from fxsp.hooks.rules_shape import only_layout
from fxsp.hooks.spelling import is_reflected
from fxsp.hooks.where import refuse
from fxsp.torch_internals import in_backward

__all__: list[str] = []

Func = Callable[..., Any]


# --- products ---------------------------------------------------------------------------------------------------------


@rule("linear")
def linear(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x, *others = args
    rest = [*others, *kwargs.values()]
    layout = only_layout(name, x, rest)
    if layout.dim == x.dim() - 1:
        return on_whole(name, func, args, kwargs, None, "contracts over tokens")
    others = [use(value, layout.region) for value in others]
    return mark(func(x, *others, **{key: use(value, layout.region) for key, value in kwargs.items()}), layout)


@rule("matmul mm bmm mv dot")
def matmul(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """``[.., m, k] @ [.., k, n]``: queries stay split, and keys are gathered beside them; so is what is contracted."""
    a, b = args[0], argument(args, kwargs, 1, "other mat2 vec")
    if is_reflected(func):
        a, b = b, a
    if a.dim() < 2 or b.dim() < 2:
        return on_whole(name, torch.matmul, (a, b), {}, None, "of vectors is not followed")
    la, lb = layout_of(a), layout_of(b)
    if la is not None and la.dim == a.dim() - 1:  # contracted
        note_gather(name, la, a, "contracts over tokens")
        a, la = gather(a, la, used=lb is not None and lb.dim == b.dim() - 1), None
    if lb is not None and (lb.dim == b.dim() - 2 or (lb.dim == b.dim() - 1 and la is not None)):
        note_gather(name, lb, b, "needs all tokens of its second operand")
        b, lb = gather(b, lb, used=la is not None), None
    if la is None and lb is None:
        return torch.matmul(a, b)
    if la is not None and la.dim == a.dim() - 2:
        if lb is not None:
            refuse(name, "of values that are split along different dimensions is not followed")
        out = torch.matmul(a, use(b, la.region))
        return mark(out, moved(la, out.dim() - 2))
    if lb is not None and lb.dim == b.dim() - 1:
        out = torch.matmul(use(a, lb.region), b)
        return mark(out, moved(lb, out.dim() - 1))
    return _batched(name, a, b)


def _batched(name: str, a: Tensor, b: Tensor) -> Tensor:
    """Tokens along a dimension that both operands are a stack of."""
    sides = [x for x in (a, b) if layout_of(x) is not None]
    layout = layout_of(sides[0])
    assert layout is not None
    back = layout.dim - sides[0].dim()
    if len(sides) == 2:
        other = layout_of(b)
        assert other is not None
        if other.dim - b.dim() != back or other.lengths != layout.lengths:
            refuse(name, "of values that are split along different dimensions is not followed")
    out = torch.matmul(*(x if layout_of(x) is not None else fit(name, x, layout, back) for x in (a, b)))
    return mark(out, moved(layout, out.dim() + back))


@rule("addmm baddbmm")
def addmm(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    bias, a, b = args
    product = matmul("matmul", torch.matmul, (a, b), {})
    alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
    if layout_of(product) is None and layout_of(bias) is None:
        return bias * beta + product * alpha
    scaled = elementwise("mul", torch.mul, (bias, beta), {}) if layout_of(bias) is not None else bias * beta
    if layout_of(product) is not None:
        product = elementwise("mul", torch.mul, (product, alpha), {})
    return elementwise("add", torch.add, (product, scaled), {})


@rule("outer")
def outer(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    a, b = args[0], argument(args, kwargs, 1, "vec2 other")
    layout = layout_of(a)
    if layout is None:
        layout = layout_of(b)
        assert layout is not None
        return mark(func(use(a, layout.region), b), moved(layout, 1))
    other = layout_of(b)
    b = use(b, layout.region) if other is None else gather(b, other, used=True)
    return mark(func(a, b), layout)


@rule("einsum")
def einsum(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    equation = args[0]
    operands = list(args[1]) if isinstance(args[1], (list, tuple)) else list(args[1:])
    if not isinstance(equation, str) or "." in equation:
        refuse(name, "with an ellipsis or number lists is not followed")
    left, arrow, right = equation.replace(" ", "").partition("->")
    if not arrow:
        refuse(name, "without `->` is not followed")
    terms = left.split(",")
    layouts = [(term, layout_of(x)) for term, x in zip(terms, operands, strict=True)]
    letters = {term[found.dim]: found for term, found in layouts if found is not None}
    split = next((letter for letter in right if letter in letters), None)  # the leftmost of the result stays split
    layout = letters[split] if split is not None else None
    for i, x in enumerate(operands):
        own = layout_of(x)
        if own is not None and (split is None or terms[i][own.dim] != split):
            note_gather(name, own, x, "contracts over tokens, or keeps two token dimensions")
            x, own = gather(x, own, used=layout is not None), None
        if own is None and layout is not None:
            at = terms[i].find(split or "")
            x = fit(name, x, layout, at - x.dim()) if at >= 0 else use(x, layout.region)
        operands[i] = x
    out = func(equation, *operands)
    return out if layout is None else mark(out, moved(layout, right.index(split or "")))


# --- norms and tables -------------------------------------------------------------------------------------------------


@rule("layer_norm rms_norm")
def layer_norm(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x, *rest = args
    layout = only_layout(name, x)
    shape = argument(args, kwargs, 1, "normalized_shape")
    if layout.dim >= x.dim() - len(shape):
        return on_whole(name, func, args, kwargs, layout, "normalizes over tokens")
    kwargs = {key: use(value, layout.region) for key, value in kwargs.items()}
    return mark(func(x, *[use(value, layout.region) for value in rest], **kwargs), layout)


@rule("group_norm instance_norm batch_norm")
def group_norm(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return on_whole(name, func, args, kwargs, only_layout(name, args[0]), "normalizes over tokens")


@rule("embedding")
def embedding(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    first, second = args[0], argument(args, kwargs, 1, "weight indices")
    if first.dtype.is_floating_point:  # torch.embedding(weight, indices)
        layout = only_layout(name, second, [first])
        return mark(func(use(first, layout.region), second, *args[2:], **kwargs), layout)
    layout = only_layout(name, first, [second])
    kwargs = {key: value for key, value in kwargs.items() if key != "weight"}
    return mark(func(first, use(second, layout.region), *args[2:], **kwargs), layout)


@rule("one_hot")
def one_hot(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if argument(args, kwargs, 1, "num_classes", -1) < 0:
        refuse(name, "without num_classes depends on all tokens")
    return marked(func(*args, **kwargs), only_layout(name, args[0]))


# --- along one dimension ----------------------------------------------------------------------------------------------

#: Functions that keep the shape, or that of another dimension: name -> place and default of their `dim`.
_ALONG = {
    "softmax": (1, -1), "log_softmax": (1, -1), "softmin": (1, -1), "cumsum": (1, None), "cumprod": (1, None),
    "cummax": (1, None), "cummin": (1, None), "logcumsumexp": (1, None), "sort": (1, -1), "argsort": (1, -1),
    "flip": (1, None), "roll": (2, None), "normalize": (2, 1), "diff": (2, -1),
}  # fmt: skip
#: Functions whose result has another size along the dimension.
_RESIZED = {"glu": (1, -1), "topk": (2, -1), "kthvalue": (2, -1), "mode": (1, -1)}


@rule(" ".join((*_ALONG, *_RESIZED)))
def along(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x = args[0] if args else kwargs["input"]
    layout = only_layout(name, x)
    place, default = (_ALONG | _RESIZED)[name]
    dims = argument(args, kwargs, place, "dim dims axis", default)
    if dims is None and name in ("roll", "flip"):
        refuse(name, "of all elements is not followed")
    if layout.dim not in _normal(dims, x.dim()):
        return marked(func(*args, **kwargs), layout)
    return on_whole(name, func, args, kwargs, layout if name in _ALONG else None, "works along the tokens")


def _normal(dims: Any, ndim: int) -> set[int]:
    return {d % ndim for d in (dims if isinstance(dims, (tuple, list)) else [dims])}


#: Reductions: name -> places of `dim` and of `keepdim`.
_REDUCE = {
    **dict.fromkeys("sum mean amax amin nansum nanmean prod any all argmax argmin logsumexp".split(), (1, 2)),
    **dict.fromkeys("max min median nanmedian".split(), (1, 2)),
    **dict.fromkeys("var std var_mean std_mean".split(), (1, 3)),
    **dict.fromkeys("norm linalg_norm linalg_vector_norm vector_norm".split(), (2, 3)),
    "count_nonzero": (1, 99),
}


@rule(" ".join(_REDUCE))
def reduce(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x = args[0] if args else kwargs["input"]
    place, keep_place = _REDUCE[name]
    dims = argument(args, kwargs, place, "dim axis")
    if isinstance(dims, Tensor) or "other" in kwargs:
        return elementwise(name, func, args, kwargs)
    layout = only_layout(name, x)
    if isinstance(dims, bool) and name in ("var", "std", "var_mean", "std_mean"):  # x.var(unbiased)
        dims = None
    reduced = set(range(x.dim())) if dims is None or dims == () or dims == [] else _normal(dims, x.dim())
    if layout.dim in reduced:
        return on_whole(name, func, args, kwargs, None, "reduces over tokens")
    keep = argument(args, kwargs, keep_place, "keepdim", False)
    gone = 0 if keep else sum(1 for d in reduced if d < layout.dim)
    return marked(func(*args, **kwargs), moved(layout, layout.dim - gone))


# --- over windows, and losses -----------------------------------------------------------------------------------------


@rule(
    """
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
    avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d interpolate
    """
)
def windows(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """``[batch, channels, ...]``: tokens in the batch are independent of one another."""
    x, *rest = args
    layout = only_layout(name, x)
    if layout.dim != 0 or (name.endswith("d") and x.dim() < int(name[-2]) + 2):
        return on_whole(name, func, args, kwargs, layout, "works along the tokens")
    kwargs = {key: use(value, layout.region) for key, value in kwargs.items()}
    return mark(func(x, *[use(value, layout.region) for value in rest], **kwargs), layout)


@rule("cross_entropy nll_loss mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy kl_div cosine_similarity")
@rule("binary_cross_entropy_with_logits")
def loss(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return on_whole(name, func, args, kwargs, None, "compares all tokens")


@rule("equal allclose")
def comparison(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Of all tokens; beside rows that somebody cut out for this rank, of these."""
    a, b = args[0], argument(args, kwargs, 1, "other")
    layouts = [layout_of(a), layout_of(b)]
    if any(layout is None for layout in layouts) and a.shape == b.shape:
        return func(*args, **kwargs)
    return on_whole(name, func, args, kwargs, None, "compares all tokens")


@rule("numpy tolist __array__")
def rows_of_this_rank(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """To the model all tokens; to who looks from outside what this rank has."""
    region = only_layout(name, args[0]).region
    if region.alone or not (region.running or in_backward()):
        return func(*args, **kwargs)
    return on_whole(name, func, args, kwargs, None, "leaves torch")
