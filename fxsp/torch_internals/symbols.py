"""Symbolic sizes: hints, equalities, and expressions as nodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fxsp.torch_internals.fakes import fake_mode_of


def depends_on_data(size: Any) -> bool:
    """Whether a size (as an expression) is known at run time only: the number of places where a mask is true."""
    import sympy
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return isinstance(size, sympy.Expr) and bool(free_unbacked_symbols(size))


def size_hints(mode: Any) -> Mapping[Any, int]:
    """What the symbols of a fake mode are for the inputs at hand; those that depend on data are not in it."""
    env = getattr(mode, "shape_env", None)
    if env is None:
        return {}
    known: Mapping[Any, int] = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val
    return known


def known_equalities(gm: torch.fx.GraphModule) -> list[Any]:
    """Expressions of sizes that are zero: what tracing the graph has found out, and the compiled code has guards on."""
    import sympy

    modes = (fake_mode_of(node.meta.get("val")) for node in gm.graph.find_nodes(op="placeholder"))
    env = next((mode.shape_env for mode in modes if mode is not None and mode.shape_env is not None), None)
    if env is None:
        return []
    from torch.utils._sympy.functions import FloorDiv

    exact = [mod.args for mod in sorted(env.divisible, key=str)]
    return [
        *(env.replace(n - k * FloorDiv(n, k)) for n, k in exact),
        # In the symbols that are left: sizes of inputs no longer name those that tracing has replaced.
        *(env.replace(guard.expr.lhs - guard.expr.rhs) for guard in env.guards if isinstance(guard.expr, sympy.Eq)),
    ]


def sympy_to_fx(expr: Any, symbols: Mapping[Any, torch.fx.Node], graph: torch.fx.Graph) -> torch.fx.Node:
    """Nodes at the end of ``graph`` that compute a sympy expression of sizes from the nodes of its symbols."""
    import sympy
    from torch.fx.proxy import GraphAppendingTracer, Proxy
    from torch.utils._sympy.functions import FloorDiv
    from torch.utils._sympy.interp import sympy_interp
    from torch.utils._sympy.reference import PythonReferenceAnalysis

    # A size is a whole number, so what it divides by divides it; Python's `n ** -1` would be a float.
    numerator, denominator = sympy.fraction(sympy.together(expr))
    if denominator != 1:
        expr = FloorDiv(numerator, denominator)
    tracer = GraphAppendingTracer(graph)
    values = {symbol: Proxy(symbols[symbol], tracer) for symbol in expr.free_symbols}
    return sympy_interp(PythonReferenceAnalysis, values, expr).node  # type: ignore[no-any-return]


def symbolic_size(length: Any, mode: Any) -> Any:
    """An expression of the symbols of a fake mode as a size of a tensor of that mode; a number as it is."""
    if isinstance(length, int):
        return length
    return mode.shape_env.create_symintnode(length, hint=int(length.xreplace(dict(size_hints(mode)))))
