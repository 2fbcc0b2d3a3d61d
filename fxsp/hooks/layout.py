"""Split values in eager mode: which tokens a local tensor holds, and the way from whole to local and back.

Between a split and a gather, modules run on local tensors.  A local tensor carries a :class:`Layout`: the dimension
that holds tokens, and the sequence they come from.  In eager mode such a tensor is a :class:`SplitTensor`, so every
torch function that gets one is seen, wherever it is called: by a block in its forward, by the recomputation of a
checkpoint in the backward pass, on any thread, with nothing switched on or off anywhere.  While Dynamo traces, a
:class:`SplitMode` around the hooked module does the same.  (A mode alone would not do: when a checkpoint recomputes a
function that is no module, none is active.)  ``fxsp.hooks.rules`` says what each function does.

A value without a layout is whole, and equal on all ranks.  Whole values that meet split ones pass through
:func:`use`, whose adjoint sums their gradient over the ranks: parameters and conditioning get the gradients of one
process, whether by ``backward()`` or ``torch.autograd.grad``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import fxsp.kernels.ops  # noqa: F401  (registers the operators)
from fxsp.errors import ImplicitGatherWarning, UnsupportedError
from fxsp.hooks.region import Region
from fxsp.kernels.lowering import local_length
from fxsp.report import GatherRecord
from fxsp.torch_internals import plain_functions

__all__ = [
    "RULES",
    "Layout",
    "SplitMode",
    "SplitTensor",
    "gather",
    "global_size",
    "is_constant",
    "is_in_place",
    "is_reflected",
    "layout_of",
    "leave",
    "local_size",
    "mark",
    "moved",
    "note_gather",
    "refuse",
    "rule",
    "same_tokens",
    "shard",
    "use",
]

_ops = torch.ops.fxsp


class Layout(NamedTuple):
    """Dimension ``dim`` of a local tensor is ``outer * tokens * inner``; the tokens are this rank's of a sequence.

    ``lengths`` and ``whole`` describe the sequence: the global length of each segment, and whether it is entire on
    every rank (see ``fxsp.types.Sequence``).
    """

    dim: int
    lengths: tuple[int, ...]
    whole: tuple[bool, ...]
    region: Region
    outer: int = 1
    inner: int = 1


def layout_of(value: Any) -> Layout | None:
    """The layout of a split tensor; None for a whole one, and for anything else."""
    return getattr(value, "_fxsp_layout", None) if isinstance(value, Tensor) else None


def local_size(layout: Layout) -> int:
    """Size of dimension ``dim`` on each rank, pads included."""
    tokens = 0
    for n, whole in zip(layout.lengths, layout.whole, strict=True):
        tokens = tokens + local_length(n, whole, layout.region.size)
    return tokens * layout.outer * layout.inner


def global_size(layout: Layout) -> int:
    """Size of dimension ``dim`` of the whole value."""
    return sum(layout.lengths) * layout.outer * layout.inner


def moved(layout: Layout, dim: int) -> Layout:
    """The same tokens along another dimension."""
    return Layout(dim, layout.lengths, layout.whole, layout.region, layout.outer, layout.inner)


def same_tokens(a: Layout, b: Layout) -> bool:
    """Whether two dimensions hold the same rows in the same order."""
    return (a.lengths, a.whole, a.outer, a.inner) == (b.lengths, b.whole, b.outer, b.inner)


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


def leave(x: Tensor, layout: Layout) -> Tensor:
    """Rows that every rank has, taken out of a split value: whole; the gradient is shared out among the ranks."""
    region = layout.region
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    lengths, whole = list(layout.lengths), [True] * len(layout.lengths)
    y: Tensor = _ops.gather.default(x, layout.dim, lengths, whole, region.rank, region.size, region.group)
    return y


class _Use(torch.autograd.Function):
    """Identity; the gradient is summed over the ranks.  (The operator ``fxsp.use`` has to copy.)"""

    @staticmethod
    def forward(x: Tensor, group: str) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _ops.reduce_grad.default(grad, ctx.group), None


def use(x: Any, region: Region) -> Any:
    """A whole value as an operand of split ones."""
    if not isinstance(x, Tensor) or not torch.is_grad_enabled() or not x.requires_grad:
        return x
    if torch.compiler.is_compiling():
        return _ops.use.default(x, region.group)
    return _Use.apply(x, region.group)


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


@torch.compiler.assume_constant_result  # Dynamo does not know the name of a builtin
def _name(func: Any) -> str:
    """``"add"`` for ``torch.add``, ``x.add_``, ``x + y``, ``torch.ops.aten.add.Tensor``; ``".shape"``."""
    name: str = func.__name__
    if name == "__get__":
        return f".{func.__self__.__name__}"
    if name.startswith("__") and name.endswith("__"):
        return _DUNDER.get(name, name)
    if "." in name:  # an operator; those of other libraries are not known by their name alone
        namespace = getattr(func, "namespace", "aten")
        name = name.partition(".")[0] if namespace == "aten" else f"{namespace}::{name}"
    return name.rstrip("_") or name


@torch.compiler.assume_constant_result
def is_in_place(func: Any) -> bool:
    """Whether a function writes to its first argument."""
    name: str = func.__name__
    if name.startswith("__"):
        return name.startswith("__i") and name != "__invert__"
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
    name = _name(func)
    if name == "unflatten" and torch.compiler.is_compiling():
        func = _unflatten
    if not any_split(args) and not (kwargs and any_split(kwargs.values())):
        out = func(*args, **kwargs)
        if func in _CONSTANT or (name in _KEEPS_CONSTANT and args and is_constant(args[0])):
            out._fxsp_constant = True
        return out
    run = RULES.get(name)
    if run is None and name.startswith("."):  # shape, dtype, requires_grad, ...
        out = func(*args, **kwargs)
        return refuse(name, "is not known of split tokens") if isinstance(out, Tensor) else out
    if run is None:
        refuse(name, "is not known to work on split tokens")
    return run(name, func, args, kwargs)


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


# --- what cannot be done ----------------------------------------------------------------------------------------------


def refuse(name: str, problem: str) -> NoReturn:
    """Raise the error for a function that would give wrong numbers on split tokens."""
    raise UnsupportedError(
        f"hooks: `{name}` {problem}.  A module between split and gather runs on this rank's tokens alone. Gather "
        'before it (SequenceParallelOutput), or use torch.compile(model, backend="sp"), which sees the whole program.'
    )


def note_gather(name: str, layout: Layout, x: Tensor, why: str) -> None:
    """Record, and say once, that a function works on the whole value."""
    if torch.compiler.is_compiling():
        return
    region = layout.region
    size = x.numel() // max(local_size(layout), 1) * global_size(layout) * x.element_size()
    region.report.implicit_gathers.append(GatherRecord(name, "", "", why, size))
    if name not in region.warned:
        region.warned.add(name)
        warnings.warn(
            ImplicitGatherWarning(f"hooks: `{name}` {why}: it runs on the whole value, {size} bytes"), stacklevel=2
        )
