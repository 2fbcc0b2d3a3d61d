"""Split values in eager mode: which tokens a local tensor holds, and the way from whole to local and back.

Between a split and a gather, modules run on local tensors.  A local tensor carries a
:class:`~fxsp.hooks.layout.Layout`: the dimension that holds tokens, and the sequence they come from.  In eager mode it
is a :class:`SplitTensor`, so every torch function that gets one is seen, wherever it is called: by a block in
its forward, by the recomputation of a checkpoint in the backward pass, on any thread, with nothing switched on or off
anywhere.  Where hooks act while Dynamo traces (``fxsp.hooks.tracing`` says where), a :class:`SplitMode` around the
hooked module does the same.  (A mode alone would not do: when a checkpoint recomputes a function that is no module,
none is active.)  ``fxsp.hooks.rules`` says what each function does.

In eager mode the shape that the model sees of a split tensor is the global one (``fxsp.hooks.sizes``), and what has no
rule for split values, or would mix tokens, runs on the whole value, is recorded, and said once.  While Dynamo traces,
and for hooks that are registered by themselves, numbers are local, and such functions are refused.

A value without a layout is whole, and equal on all ranks.  Whole values that meet split ones pass through
:func:`~fxsp.hooks.gradients.use`, whose adjoint sums their gradient over the ranks: parameters and conditioning get the
gradients of one process, whether by ``backward()`` or ``torch.autograd.grad``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fxsp.errors import ImplicitGatherWarning
from fxsp.hooks.gradients import check_histories, check_history
from fxsp.hooks.layout import Layout, global_size, layout_of, local_size
from fxsp.hooks.spelling import is_in_place, name_of
from fxsp.hooks.where import caller, refuse
from fxsp.kernels.ops import fxsp_ops as _ops
from fxsp.report import GatherRecord
from fxsp.torch_internals import plain_functions

__all__ = [
    "RULES",
    "NeedsWhole",
    "SplitMode",
    "SplitTensor",
    "gather",
    "is_constant",
    "mark",
    "needs_whole",
    "note_gather",
    "on_whole",
    "rule",
    "shard",
]


def mark(x: Tensor, layout: Layout) -> Tensor:
    """``x``, known from now on to be split."""
    x._fxsp_layout = layout  # type: ignore[attr-defined]
    if not torch.compiler.is_compiling():
        x.__class__ = SplitTensor
    return x


# --- whole -> split -> whole ------------------------------------------------------------------------------------------


def shard(x: Tensor, layout: Layout) -> Tensor:
    """This rank's rows of a whole value; no communication.  The gradient is gathered."""
    region, whole = layout.region, list(layout.whole)
    with plain_functions():
        x, dim = _opened(x, layout)
        y = _ops.shard.default(x, dim, list(layout.lengths), whole, False, region.rank, region.size, region.group)
        return mark(_closed(y, layout), layout)


def gather(x: Tensor, layout: Layout, *, used: bool) -> Tensor:
    """The whole value.  ``used``: what becomes of it is split again, so its gradient is summed over the ranks."""
    region = layout.region
    with plain_functions():
        if not torch.compiler.is_compiling():
            check_history(x)
        x, dim = _opened(x, layout)
        op = _ops.gather_used.default if used else _ops.gather.default
        y: Tensor = op(x, dim, list(layout.lengths), list(layout.whole), region.rank, region.size, region.group)
        return _closed(y, layout)


def _opened(x: Tensor, layout: Layout) -> tuple[Tensor, int]:
    """The tokens as a dimension of their own, and which one that is."""
    if layout.outer == 1 and layout.inner == 1:
        return x, layout.dim
    return x.unflatten(layout.dim, (layout.outer, -1, layout.inner)), layout.dim + 1


def _closed(x: Tensor, layout: Layout) -> Tensor:
    if layout.outer == 1 and layout.inner == 1:
        return x
    return x.flatten(layout.dim, layout.dim + 2)


# --- every torch function on split tensors ----------------------------------------------------------------------------

#: ``rule(name, func, args, kwargs)`` calls ``func`` on local values and marks its results.
Rule = Callable[[str, Callable[..., Any], Sequence[Any], Mapping[str, Any]], Any]

#: Name of a torch function, method or operator -> its rule.
RULES: dict[str, Rule] = {}


def rule(names: str) -> Callable[[Rule], Rule]:
    """Register a rule for functions, by their names separated by blanks."""

    def register(run: Rule) -> Rule:
        for name in names.split():
            assert name not in RULES, f"two rules for {name}"
            RULES[name] = run
        return run

    return register


def any_split(values: Any) -> bool:
    """Whether there is a split tensor among arguments, lists and tuples of them included."""
    for value in values:
        if isinstance(value, Tensor):
            if layout_of(value) is not None:
                return True
        elif isinstance(value, (list, tuple)) and any_split(value):
            return True
    return False


#: What makes a tensor of one value: it has a row for each token, whichever tokens a rank has.
_CONSTANT = frozenset({torch.ones, torch.zeros, torch.full, torch.empty})
_KEEPS_CONSTANT = frozenset("to type bool float half bfloat16 int long cuda cpu contiguous clone detach".split())


def is_constant(x: Any) -> bool:
    """Whether a whole tensor has one value everywhere (known only where a :class:`SplitMode` saw how it was made)."""
    return isinstance(x, Tensor) and getattr(x, "_fxsp_constant", False)


def handle(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call a torch function that may have split arguments."""
    name = name_of(func)
    compiling = torch.compiler.is_compiling()
    if name == "unflatten" and compiling:
        func = _unflatten
    if not compiling and args and is_in_place(func):
        _check_not_a_copy(name, args[0])
    if not any_split(args) and not (kwargs and any_split(kwargs.values())):
        out = func(*args, **kwargs)
        if compiling and (func in _CONSTANT or (name in _KEEPS_CONSTANT and args and is_constant(args[0]))):
            out._fxsp_constant = True
        return out
    if not compiling:
        check_histories([*args, *kwargs.values()])
    if name.startswith("fxsp::"):  # the backward pass of an operator of ours, on what it saved
        return func(*args, **kwargs)
    run = RULES.get(name)
    if run is None and name.startswith("."):  # dtype, requires_grad, ...
        out = func(*args, **kwargs)
        return refuse(name, "is not known of split tokens") if isinstance(out, Tensor) else out
    if compiling:
        return refuse(name, "is not known to work on split tokens") if run is None else run(name, func, args, kwargs)
    try:
        if run is not None:
            return run(name, func, args, kwargs)
        why = "has no rule for split tokens"
    except NeedsWhole as need:
        why = need.why
    return on_whole(name, func, args, kwargs, None, why)


# --- on the whole value -----------------------------------------------------------------------------------------------


class NeedsWhole(Exception):  # noqa: N818  (it is caught: what cannot be done on shards is done on the whole value)
    """A rule cannot follow the function on split tokens."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


def needs_whole(name: str, why: str, layout: Layout | None = None) -> NoReturn:
    """Have the function run on the whole values; an error where numbers may be local ones."""
    if torch.compiler.is_compiling() or (layout is not None and layout.region.alone):
        refuse(name, why)
    raise NeedsWhole(why)


#: What may return a view, through which the model would write into a value of its own.
_VIEWS = frozenset(
    """
    getitem narrow select split split_with_sizes chunk tensor_split unbind unsafe_chunk unsafe_split hsplit vsplit
    dsplit view reshape flatten unflatten ravel view_as reshape_as squeeze unsqueeze expand expand_as diagonal
    unfold movedim
    """.split()
)


def on_whole(
    name: str, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], keep: Layout | None, why: str
) -> Any:
    """Call ``func`` on gathered values; results with a row for each token are split like ``keep`` again.

    What ``func`` writes to its first argument is written to this rank's rows of it.
    """
    found = _layouts([*args, *kwargs.values()])
    if any(layout.region.alone for layout in found) and name not in RULES:
        refuse(name, why)
    if kwargs.get("out") is not None:
        refuse(name, "writes into an `out` argument")

    def whole(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            items = [whole(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if isinstance(value, slice):
            return slice(whole(value.start), whole(value.stop), whole(value.step))
        layout = layout_of(value)
        if layout is None:
            return value
        note_gather(name, layout, value, why)
        return gather(value, layout, used=False)

    target = layout_of(args[0]) if args else None
    new = [whole(value) for value in args]
    out = func(*new, **{key: whole(value) for key, value in kwargs.items()})
    if is_in_place(func) and target is not None:
        with plain_functions():
            args[0].copy_(shard(new[0], target))
        return args[0] if out is new[0] else out
    if name in _VIEWS and not torch.compiler.is_compiling():
        for item in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(item, Tensor):
                item._fxsp_copy = True  # type: ignore[attr-defined]
                if item._base is not None:
                    item._base._fxsp_copy = True  # type: ignore[attr-defined]
    if keep is None:
        return out
    if isinstance(out, Tensor):
        return shard(out, keep) if out.dim() > keep.dim and out.shape[keep.dim] == global_size(keep) else out
    return type(out)([shard(item, keep) for item in out])


def _layouts(values: Sequence[Any]) -> list[Layout]:
    found: list[Layout] = []
    for value in values:
        if isinstance(value, (list, tuple)):
            found += _layouts(value)
        elif (layout := layout_of(value)) is not None:
            found.append(layout)
    return found


def _check_not_a_copy(name: str, x: Any) -> None:
    """A write into what is a view on one process, and a gathered copy here, would be lost."""
    if isinstance(x, Tensor) and (hasattr(x, "_fxsp_copy") or hasattr(x._base, "_fxsp_copy")):
        refuse(name, "writes into a view of split tokens, of which hooks have a copy; write to the tensor itself")


def _unflatten(x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """Dynamo does not follow the method itself, which calls `super()`."""
    out: Tensor = x.unflatten(dim, sizes)
    return out


def _handle_plain(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    with plain_functions():
        return handle(func, args, kwargs)


#: Compilers keep out: what is compiled for itself, inside of a model that runs eagerly, runs eagerly too.
_handle_eager = torch.compiler.disable(_handle_plain)


def _differentiate(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """``backward`` and ``grad``: what is recomputed on the way must be seen, so nothing may be switched off."""

    def plain(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)([plain(item) for item in value])
        return value.view_as(value) if layout_of(value) is not None else value

    wanted = kwargs.get("inputs", args[1] if func is torch.autograd.grad else None)
    if any_split(wanted if isinstance(wanted, (list, tuple)) else [wanted]):
        refuse(func.__name__, "with respect to a split value is local")
    with plain_functions(), torch.enable_grad():  # a checkpoint calls `backward` inside of a backward pass
        args, kwargs = [plain(value) for value in args], {key: plain(value) for key, value in kwargs.items()}
    return func(*args, **kwargs)


_DIFFERENTIATE = (torch.autograd.backward, torch.autograd.grad, Tensor.backward)


class SplitTensor(Tensor):
    """This rank's part of a value, in eager mode; the whole value is what the model means."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _DIFFERENTIATE:
            return _differentiate(func, args, kwargs or {})
        return _handle_eager(func, args, kwargs or {})


class SplitMode(TorchFunctionMode):
    """Around a hooked module: the rules for its split values where Dynamo traces; and constants are recognised.

    A mode that was entered for real, and is around code that is then compiled (a block of its own, what is called at
    a graph break), would see the compiled operators run, too: there everything runs eagerly.
    """

    def __init__(self) -> None:
        super().__init__()
        self.real = False

    def __enter__(self) -> Any:
        if not torch.compiler.is_compiling():
            self.real = True
        return super().__enter__()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if torch.compiler.is_compiling() and not self.real:
            return _handle_plain(func, args, kwargs or {})
        if func in _DIFFERENTIATE:
            return _differentiate(func, args, kwargs or {})
        return _handle_eager(func, args, kwargs or {})


# --- what is reported -------------------------------------------------------------------------------------------------


def note_gather(name: str, layout: Layout, x: Tensor, why: str) -> None:
    """Record, and say once, that a function works on the whole value."""
    if torch.compiler.is_compiling():
        return
    region = layout.region
    module, source = caller()
    size = x.numel() // max(local_size(layout), 1) * global_size(layout) * x.element_size()
    record = GatherRecord(name, module, source, why, size)
    region.report.implicit_gathers.append(record)
    if name not in region.warned:
        region.warned.add(name)
        warnings.warn(ImplicitGatherWarning(f"hooks: gathered for {record}"), stacklevel=2)
