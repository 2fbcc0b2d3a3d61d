"""What Dynamo does with a backend: its layers and options, graphs left whole, traced anew, or compiled no more."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fxsp.torch_internals.versions import missing


def on_recompile_limit(reached: Callable[[Any, types.CodeType, str], None]) -> None:
    """Have ``reached(compiler, code, reason)`` called when Dynamo leaves a function to Python, compiled too often.

    The guards that failed are the reason.  What it raises is raised to the user.
    """
    try:
        from torch._dynamo import convert_frame

        original = convert_frame.exceeds_recompile_limit
    except (ImportError, AttributeError) as error:
        raise missing("torch._dynamo.convert_frame.exceeds_recompile_limit", error) from error

    @functools.wraps(original)
    def exceeds_recompile_limit(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        variables = sys._getframe(1).f_locals
        if found[0] and "compiler_fn" in variables and "code" in variables:
            reached(variables["compiler_fn"], variables["code"], recompile_reason())
        return found

    convert_frame.exceeds_recompile_limit = exceeds_recompile_limit


def keep_graphs_whole(is_ours: Callable[[object], bool]) -> None:
    """Have Dynamo's DDPOptimizer leave graphs whole for backends that are ours: in pieces their bindings are lost."""
    try:
        from torch._dynamo.backends.distributed import DDPOptimizer

        original = DDPOptimizer.compile_fn
    except (ImportError, AttributeError) as error:
        raise missing("torch._dynamo.backends.distributed.DDPOptimizer.compile_fn", error) from error

    @functools.wraps(original)
    def compile_fn(self: Any, gm: torch.fx.GraphModule, example_inputs: Any, **settings: Any) -> Any:
        if any(is_ours(layer) for layer in backend_layers(self.backend_compile_fn)):
            return self.backend_compile_fn(gm, example_inputs, **settings)
        return original(self, gm, example_inputs, **settings)

    DDPOptimizer.compile_fn = compile_fn  # type: ignore[method-assign]


def restart_for_numbers(mode: Any) -> None:
    """Have Dynamo trace this graph anew, now, if AOTAutograd would ask for it once all passes have run.

    Under ``dynamic=True`` a ``float`` (the epsilon of a norm) is an input of the graph, until it is found that its
    value was needed: AOTAutograd looks for such inputs last, and Dynamo begins again without them.
    """
    try:
        import sympy
        from torch._dynamo.exc import TensorifyScalarRestartAnalysis
        from torch._dynamo.symbolic_convert import TensorifyState
        from torch.fx.passes._tensorify_python_scalars import _is_tensorify_enabled
        from torch.utils._sympy.symbol import SymT, symbol_is_type
    except ImportError:
        return  # the graph is partitioned twice, and nothing else
    env = getattr(mode, "shape_env", None)
    known = getattr(env, "replacements", {})
    fixed = [str(s) for s, n in known.items() if symbol_is_type(s, SymT.FLOAT) and isinstance(n, sympy.Number)]
    new = [name for name in fixed if not TensorifyState.should_specialize(name)]
    if new and _is_tensorify_enabled():
        for name in new:
            TensorifyState.specialize(name)
        raise TensorifyScalarRestartAnalysis


def is_restart(error: BaseException) -> bool:
    """Whether Dynamo translates the frame once more after this, and compiles another graph instead."""
    from torch._dynamo.exc import RestartAnalysis

    return isinstance(error, RestartAnalysis)


def without_ddp(compiler: Any) -> Any:
    """The backend itself: under DistributedDataParallel ``compiler`` is a method of an optimizer, which holds it."""
    return getattr(getattr(compiler, "__self__", None), "backend_compile_fn", compiler)


def backend_layers(compiler: Any) -> Iterator[Any]:
    """A compiler function and everything that it wraps: Dynamo's debug wrapper, ``torch.compile``'s, partials."""
    seen: set[int] = set()
    pending = [compiler]
    while pending:
        layer = pending.pop()
        if layer is None or id(layer) in seen:
            continue
        seen.add(id(layer))
        yield layer
        names = ("_torchdynamo_orig_backend", "compiler_fn", "__wrapped__", "func")
        pending += [getattr(layer, name, None) for name in names]


def options_for(backend: Any, compiler: Any) -> dict[str, Any] | None:
    """The options of ``torch.compile`` for a backend, from what it does with frames; None for another backend."""
    for layer in backend_layers(compiler):
        if getattr(layer, "compiler_fn", None) is backend:
            return dict(getattr(layer, "kwargs", {}).get("options") or {})
    return None


def recompile_reason() -> str:
    """The guards that failed, if the compilation in progress is one of a frame that had been compiled; else ""."""
    from torch._dynamo import convert_frame

    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == convert_frame.__file__ and "recompile_reason" in frame.f_locals:
            return str(frame.f_locals["recompile_reason"] or "").partition("User stack trace")[0]
        frame = frame.f_back
    return ""
