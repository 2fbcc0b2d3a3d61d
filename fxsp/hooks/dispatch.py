"""Split values in eager mode: which tokens a local tensor holds, and the way from whole to local and back.

Between a split and a gather, modules run on local tensors.  A local tensor carries a
:class:`~fxsp.hooks.layout.Layout`: the dimension that holds tokens, and the sequence they come from.  In eager mode it
is a :class:`SplitTensor`, so every torch function that gets one is seen, wherever it is called: by a block in
its forward, by the recomputation of a checkpoint in the backward pass, on any thread, with nothing switched on or off
anywhere.  Where hooks act while Dynamo traces (``fxsp.hooks.tracing`` says where), a :class:`SplitMode` around the
hooked module does the same.  (A mode alone would not do: when a checkpoint recomputes a function that is no module,
none is active.)  ``fxsp.hooks.table`` says what each function does.

In eager mode the shape that the model sees of a split tensor is the global one (``fxsp.hooks.sizes``), and what has no
rule for split values, or would mix tokens, runs on the whole value, is recorded, and said once.  While Dynamo traces,
and for hooks that are registered by themselves, numbers are local, and such functions are refused.

A value without a layout is whole, and equal on all ranks.  Whole values that meet split ones pass through
:func:`use`, whose adjoint sums their gradient over the ranks: parameters and conditioning get the
gradients of one process, whether by ``backward()`` or ``torch.autograd.grad``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fxsp.hooks.layout import Layout, global_size, is_constant, layout_of, mapped, means_local, meant_shape, split_in
from fxsp.hooks.region import Region
from fxsp.hooks.spelling import is_in_place, name_of
from fxsp.hooks.where import note_gather, refuse
from fxsp.kernels.ops import as_view
from fxsp.kernels.ops import fxsp_ops as _ops
from fxsp.passes.rules.families import names_of
from fxsp.torch_internals import custom_function, plain_functions

__all__ = ["RULES", "Call", "Rule", "SplitMode", "SplitTensor", "gather", "handle", "mark", "needs_whole", "shard"]
__all__ += ["use"]


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
            _check_history(x)
        x, dim = _opened(x, layout)
        op = _ops.gather_used.default if used else _ops.gather.default
        y: Tensor = op(x, dim, list(layout.lengths), list(layout.whole), region.rank, region.size, region.group)
        return _closed(y, layout)


def use(x: Any, region: Region) -> Any:
    """A whole value as an operand of split ones: its gradient is summed over the ranks."""
    if not isinstance(x, Tensor) or not torch.is_grad_enabled() or not x.requires_grad:
        return x
    if torch.compiler.is_compiling():
        return _ops.use.default(x, region.group)
    return as_view("use", x, region.group)


def _check_history(x: Tensor) -> None:
    """Refuse what a custom ``autograd.Function`` made of split values: its backward would get this rank's rows, of
    which nothing tells it that they are not all tokens."""
    made_by = custom_function(x.grad_fn)
    if made_by:
        refuse(made_by, "is an autograd.Function whose backward cannot tell this rank's tokens from all of them")


def _opened(x: Tensor, layout: Layout) -> tuple[Tensor, int]:
    """The tokens as a dimension of their own, and which one that is."""
    if layout.outer == 1 and layout.inner == 1:
        return x, layout.dim
    return x.unflatten(layout.dim, (layout.outer, -1, layout.inner)), layout.dim + 1


def _closed(x: Tensor, layout: Layout) -> Tensor:
    if layout.outer == 1 and layout.inner == 1:
        return x
    return x.flatten(layout.dim, layout.dim + 2)


# --- one call of a torch function -------------------------------------------------------------------------------------


class Call:
    """A torch function, by the name that a rule has, and its arguments, some of which are split."""

    def __init__(self, name: str, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.name, self.func, self.args, self.kwargs = name, func, args, kwargs

    @property
    def x(self) -> Any:
        """The first operand."""
        return self.get(0, "input tensor tensors")

    def get(self, index: int, names: str, default: Any = None) -> Any:
        """An argument by position, or by any of its names."""
        if index < len(self.args):
            return self.args[index]
        return next((self.kwargs[name] for name in names.split() if name in self.kwargs), default)

    def dim(self, index: int, default: Any = None) -> Any:
        """The argument ``dim``, counted from the front."""
        return self.get(index, "dim axis", default) % self.x.dim()

    @property
    def values(self) -> list[Any]:
        """All arguments."""
        return [*self.args, *self.kwargs.values()]

    def layout(self) -> Layout:
        """The layout of the first operand, where the others may not be split."""
        layout, split = layout_of(self.x), split_in(self.values)
        if layout is None or len(split) > 1:
            needs_whole(self.name, "has a split argument where a whole one is needed", layout_of(split[0]))
        return layout

    def run(self) -> Any:
        """Call the function on local values."""
        return self.func(*self.args, **self.kwargs)

    def with_values(self, change: Callable[[Any], Any]) -> Any:
        """Call it with all tensors among the arguments changed."""
        args = [mapped(value, change) for value in self.args]
        return self.func(*args, **{key: mapped(value, change) for key, value in self.kwargs.items()})

    def as_meant(self) -> Any:
        """A result of the sizes that the model knows; without values where these are not the local ones."""
        if means_local(split_in(self.values)[0]._fxsp_layout):
            return self.run()

        def like(x: Tensor) -> Tensor:
            layout = layout_of(x)
            return x if layout is None else torch.empty(meant_shape(x, layout), device="meta", dtype=x.dtype)

        return self.with_values(like)

    def on_whole(self, why: str, keep: Layout | None = None) -> Any:
        """Call it on gathered values; results with a row for each token are split like ``keep`` again.

        What it writes to its first argument is written to this rank's rows of it.
        """
        if self.name not in RULES and any(x._fxsp_layout.region.alone for x in split_in(self.values)):
            refuse(self.name, why)
        if self.kwargs.get("out") is not None:
            refuse(self.name, "writes into an `out` argument")
        gathered: list[Tensor] = []

        def whole(x: Tensor) -> Tensor:
            layout = layout_of(x)
            if layout is not None:
                note_gather(self.name, layout, x, why)
                x = gather(x, layout, used=False)
                gathered.append(x)
            return x

        target = layout_of(self.args[0]) if self.args else None
        out = self.with_values(whole)
        if target is not None and is_in_place(self.func):
            with plain_functions():
                self.args[0].copy_(shard(gathered[0], target))
            return self.args[0] if out is gathered[0] else out
        if self.name in _VIEWS and not torch.compiler.is_compiling():
            mapped(out, _say_copied)
        return out if keep is None else mapped(out, lambda x: _with_rows(x, keep))


def _with_rows(x: Tensor, layout: Layout) -> Tensor:
    return shard(x, layout) if x.dim() > layout.dim and x.shape[layout.dim] == global_size(layout) else x


#: ``rule(call)`` calls the function on local values and marks its results.
Rule = Callable[[Call], Any]

#: Name of a torch function, method or operator -> its rule.
RULES: dict[str, Rule] = {}


class NeedsWhole(Exception):  # noqa: N818  (it is caught: what cannot be done on shards is done on the whole value)
    """A rule cannot follow the function on split tokens."""


def needs_whole(name: str, why: str, layout: Layout | None = None) -> NoReturn:
    """Have the function run on the whole values; an error where numbers may be local ones."""
    if torch.compiler.is_compiling() or (layout is not None and layout.region.alone):
        refuse(name, why)
    raise NeedsWhole(why)


#: What may return a view, through which the model would write into a value of its own.
_VIEWS = names_of("view", "slice", "split", "select", "unsafe_split", "unfold")
_VIEWS |= {"getitem", "hsplit", "vsplit", "dsplit", "diagonal"}


def _say_copied(x: Any) -> Any:
    x._fxsp_copy = True
    if x._base is not None:
        x._base._fxsp_copy = True
    return x


def _check_not_a_copy(name: str, x: Any) -> None:
    """A write into what is a view on one process, and a gathered copy here, would be lost."""
    if isinstance(x, Tensor) and (hasattr(x, "_fxsp_copy") or hasattr(x._base, "_fxsp_copy")):
        refuse(name, "writes into a view of split tokens, of which hooks have a copy; write to the tensor itself")


# --- every torch function on split tensors ----------------------------------------------------------------------------

#: What makes a tensor of one value: it has a row for each token, whichever tokens a rank has.
_CONSTANT = frozenset({torch.ones, torch.zeros, torch.full, torch.empty})
_KEEPS_CONSTANT = frozenset("to type bool float half bfloat16 int long cuda cpu contiguous clone detach".split())


def handle(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call a torch function that may have split arguments."""
    name = name_of(func)
    compiling = torch.compiler.is_compiling()
    if name == "unflatten" and compiling:
        func = _unflatten
    if not compiling and args and is_in_place(func):
        _check_not_a_copy(name, args[0])
    found = split_in([*args, *kwargs.values()])
    if not found:
        out = func(*args, **kwargs)
        if compiling and (func in _CONSTANT or (name in _KEEPS_CONSTANT and args and is_constant(args[0]))):
            out._fxsp_constant = True
        return out
    call = Call(name, func, args, kwargs)
    if not compiling:
        for x in found:
            _check_history(x)
    if name.startswith("fxsp::"):  # the backward pass of an operator of ours, on what it saved
        return call.run()
    rule = RULES.get(name)
    if rule is None and name.startswith("."):  # dtype, requires_grad, ...
        out = call.run()
        return refuse(name, "is not known of split tokens") if isinstance(out, Tensor) else out
    if compiling:
        return refuse(name, "is not known to work on split tokens") if rule is None else rule(call)
    try:
        if rule is not None:
            return rule(call)
        why = "has no rule for split tokens"
    except NeedsWhole as need:
        why = str(need)
    return call.on_whole(why)


def _unflatten(x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """Dynamo does not follow the method itself, which calls `super()`."""
    out: Tensor = x.unflatten(dim, sizes)
    return out


def _handle_plain(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    with plain_functions():
        return handle(func, args, kwargs)


#: Compilers keep out: what is compiled for itself, inside of a model that runs eagerly, runs eagerly too.
_handle_disabled = torch.compiler.disable(_handle_plain)


def _handle_eager(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if func in _DIFFERENTIATE:
        return _differentiate(func, args, kwargs)
    return _handle_disabled(func, args, kwargs)


_DIFFERENTIATE = (torch.autograd.backward, torch.autograd.grad, Tensor.backward)


def _differentiate(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """``backward`` and ``grad``: what is recomputed on the way must be seen, so nothing may be switched off."""

    def plain(x: Tensor) -> Tensor:
        return x if layout_of(x) is None else x.view_as(x)

    if split_in([kwargs.get("inputs", args[1] if func is torch.autograd.grad else None)]):
        refuse(func.__name__, "with respect to a split value is local")
    with plain_functions(), torch.enable_grad():  # a checkpoint calls `backward` inside of a backward pass
        args = [mapped(value, plain) for value in args]
        kwargs = {key: mapped(value, plain) for key, value in kwargs.items()}
    return func(*args, **kwargs)


class SplitTensor(Tensor):
    """This rank's part of a value, in eager mode; the whole value is what the model means."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
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
        traced = torch.compiler.is_compiling() and not self.real
        return (_handle_plain if traced else _handle_eager)(func, args, kwargs or {})
