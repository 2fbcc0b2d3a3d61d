"""What elementwise functions do to split values, and how operands are brought together.

Operands align from the right, as in broadcasting.  A whole operand beside a split one has at the token dimension size
one (it serves all tokens), the global length (its own rows are taken), or it was made from a local length, like
``torch.arange(x.shape[1])``: on every rank but the first such a value would be wrong, so it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fxsp.hooks.dispatch import gather, is_constant, mark, needs_whole, note_gather, rule, shard
from fxsp.hooks.gradients import use
from fxsp.hooks.layout import Layout, global_size, layout_of, local_size, means_local, moved, same_tokens
from fxsp.hooks.sizes import meaning, split_size
from fxsp.hooks.spelling import is_in_place
from fxsp.hooks.where import refuse
from fxsp.torch_internals import checkpoint_looks, in_backward

__all__ = ["aligned", "argument", "fit", "marked", "separate", "tensors_in"]

Func = Callable[..., Any]


def argument(args: Sequence[Any], kwargs: Mapping[str, Any], index: int, names: str, default: Any = None) -> Any:
    """An argument by position, or by any of its names."""
    if index < len(args):
        return args[index]
    return next((kwargs[name] for name in names.split() if name in kwargs), default)


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among the values."""
    return [value for value in values if isinstance(value, Tensor)]


def marked(out: Any, layout: Layout | None) -> Any:
    """All tensors of a result, marked with one layout (None: they are whole)."""
    if layout is None:
        return out
    if isinstance(out, Tensor):
        return mark(out, layout)
    if isinstance(out, (tuple, list)):
        return type(out)([marked(item, layout) for item in separate(out)])
    return out


def separate(items: Sequence[Any]) -> list[Any]:
    """The values of one function; for Dynamo, which allows no attributes on them otherwise, values of their own."""
    if not torch.compiler.is_compiling():
        return list(items)
    return [item.view_as(item) if isinstance(item, Tensor) else item for item in items]


#: What tests compare a rank's rows with, they have cut out themselves.
_COMPARISONS = frozenset("eq ne not_equal isclose".split())


def fit(name: str, x: Tensor, layout: Layout, back: int) -> Tensor:
    """A whole tensor as an operand of split ones whose token dimension is ``back`` (negative) from the end."""
    if x.dim() < -back:
        return use(x, layout.region)  # type: ignore[no-any-return]
    size, whole, local = x.shape[back], global_size(layout), local_size(layout)
    if size == whole and whole != 1:
        return shard(x, moved(layout, x.dim() + back))
    if size == local and size != 1 and name not in _COMPARISONS and x.stride(back) != 0 and not is_constant(x):
        refuse(
            name,
            f"combines split tokens with a value of the local length {local}, of which hooks do not know which tokens "
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
            result.append(fit(name, gather(x, layout, used=True), best, back))
        elif same_tokens(layout, best):
            result.append(x)
        elif global_size(layout) == global_size(best):
            note_gather(name, layout, x, "combines values whose tokens are split in different ways")
            result.append(shard(gather(x, layout, used=False), moved(best, layout.dim)))
        else:
            needs_whole(name, f"combines {global_size(best)} split tokens with {global_size(layout)} others", best)
    return result, best, back


# --- elementwise ------------------------------------------------------------------------------------------------------


@rule(
    """
    add sub subtract rsub mul multiply div divide true_divide floor_divide remainder fmod pow float_power
    maximum minimum fmax fmin atan2 arctan2 hypot logaddexp logaddexp2 xlogy copysign nextafter heaviside
    eq ne not_equal lt less le less_equal gt greater ge greater_equal isclose
    logical_and logical_or logical_xor logical_not bitwise_and bitwise_or bitwise_xor bitwise_not
    bitwise_left_shift bitwise_right_shift where lerp addcmul addcdiv masked_fill clamp clip clamp_min clamp_max
    complex polar prelu
    """
)
def elementwise(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Functions of several tensors, row by row."""
    if kwargs.get("out") is not None:
        refuse(name, "writes into an `out` argument")
    keys = list(kwargs)
    values = [*args, *kwargs.values()]
    places = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
    if name == "where" and len(values) == 1:
        needs_whole(name, "with one argument lists positions, which differ by rank", layout_of(values[0]))
    new, layout, back = aligned(name, [values[i] for i in places])
    if is_in_place(func) and new[0] is not args[0]:
        needs_whole(name, "writes split tokens into a whole tensor, in place", layout)
    for i, value in zip(places, new, strict=True):
        values[i] = value
    out = func(*values[: len(args)], **dict(zip(keys, values[len(args) :], strict=True)))
    return mark(out, moved(layout, out.dim() + back))


@rule(
    """
    neg negative positive abs absolute sign sgn exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square reciprocal
    sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh erf erfc erfinv sigmoid logit lgamma digamma
    floor ceil round trunc frac nan_to_num isnan isinf isfinite sinc deg2rad rad2deg signbit angle conj
    relu relu6 gelu silu mish elu selu celu leaky_relu hardtanh hardswish hardsigmoid softplus softsign tanhshrink
    hardshrink softshrink threshold logsigmoid
    to type type_as float double half bfloat16 int long short char byte bool cpu cuda contiguous clone detach alias
    requires_grad zeros_like ones_like empty_like full_like fill zero
    """
)
def unary(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Functions of one tensor, row by row; further tensors only lend their dtype or device."""
    x = args[0] if args else kwargs["input"]
    out = func(*args, **kwargs)
    layout = layout_of(x)
    return out if layout is None else mark(out, layout)


@rule(".data .real .imag")
def same_getter(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Attributes that have the shape of the tensor."""
    return marked(func(*args, **kwargs), layout_of(args[0]))


@rule(
    """
    __set__ __repr__ __format__ __hash__ __dir__ dim ndimension stride storage_offset
    is_contiguous is_floating_point is_complex is_signed is_inference is_pinned element_size data_ptr get_device
    untyped_storage retain_grad register_hook register_post_accumulate_grad_hook is_same_size is_set_to result_type
    new_zeros new_ones new_full new_empty new_tensor
    .grad ._base ._grad _is_view _is_zerotensor is_conj is_neg
    """
)
def description(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What is said of the local tensor, and new tensors that only take its dtype and device."""
    return func(*args, **kwargs)


@rule(".shape size numel nelement __len__")
def sizes(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The sizes of one process, where they are to be told apart."""
    layout = layout_of(args[0])
    found = func(*args, **kwargs)
    if layout is None or means_local(layout) or (in_backward() and checkpoint_looks()):
        return found
    local, whole = local_size(layout), global_size(layout)
    if name in ("numel", "nelement", "__len__"):
        if name == "__len__" and layout.dim != 0:
            return found
        size = split_size(found // local * whole, found, layout.region)
        return int(meaning(size)) if name == "__len__" else size
    if isinstance(found, int):
        dim = argument(args, kwargs, 1, "dim") % args[0].dim()
        return split_size(whole, local, layout.region) if dim == layout.dim else found
    return torch.Size([split_size(whole, local, layout.region) if i == layout.dim else n for i, n in enumerate(found)])


@rule("as_strided")
def as_strided(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    refuse(name, "takes elements by their place in memory, which differs by rank")


@rule("copy")
def copy(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """``target.copy_(source)``: a new local buffer becomes split."""
    target, source = args[0], argument(args, kwargs, 1, "src other")
    layout = layout_of(source)
    if layout_of(target) is None and layout is not None and target.dim() == source.dim():
        if target.shape[layout.dim] != source.shape[layout.dim]:
            needs_whole(name, "writes split tokens into a whole tensor", layout)
        return mark(func(*args, **kwargs), layout)
    return elementwise(name, func, args, kwargs)


# --- randomness -------------------------------------------------------------------------------------------------------


def _global_like(x: Tensor, layout: Layout) -> Tensor:
    shape = list(x.shape)
    shape[layout.dim] = global_size(layout)
    return torch.ones(shape, dtype=x.dtype, device=x.device)


@rule("dropout")
def dropout(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The draw of one process, of which each rank takes its rows."""
    x = args[0] if args else kwargs["input"]
    layout = layout_of(x)
    p = argument(args, kwargs, 1, "p", 0.5)
    training = argument(args, kwargs, 2, "training train", True)
    if layout is None or not training or p == 0:
        return marked(func(*args, **kwargs), layout)
    noise = shard(F.dropout(_global_like(x.detach(), layout), p, True), layout)
    inplace = argument(args, kwargs, 3, "inplace", False)
    return mark(x.mul_(noise) if inplace else x * noise, layout)


@rule("rand_like randn_like randint_like bernoulli")
def random(name: str, func: Func, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The draw of one process, of which each rank takes its rows."""
    x = args[0]
    layout = layout_of(x)
    if layout is None or is_in_place(func):
        needs_whole(name, "draws in place", layout)
    whole = gather(x, layout, used=False) if name == "bernoulli" else _global_like(x.detach(), layout)
    return shard(func(whole, *args[1:], **kwargs), layout)
