"""Rules of operators that work on the last dimensions and leave those before alone: pooling, resampling, matrices.

Images and their like are not split along height or width by these rules; batch and channels pass.
"""

from __future__ import annotations

import torch

from fxsp.passes.graph import Call
from fxsp.passes.rules.dims import broadcast
from fxsp.passes.rules.families import traits_of
from fxsp.passes.rules.rule import Dims, OpRule, RuleFunction, rows

__all__ = ["RULES"]

#: Trait -> how many of the last dimensions an operator works on.
_COUNTS = {f"last_{count}": count for count in (1, 2, 3)}


def last_dims(call: Call) -> OpRule | None:
    """``avg_pool2d``: ``([d0, d1, x2, x3]) -> ([d0, d1, y2, y3]) whole={x2, x3, y2, y3}``."""
    (shape,) = call.operand_shapes()
    (count,) = (_COUNTS[trait] for trait in traits_of(call.op) if trait in _COUNTS)
    if call.op is torch.ops.aten.diag_embed.default and (call["dim1"], call["dim2"]) != (-2, -1):
        return None
    lead = rows(len(shape) - count)
    x: Dims = (*lead, *((f"x{i}",) for i in range(len(lead), len(shape))))
    results = tuple((*lead, *((f"y{i}",) for i in range(len(lead), len(r)))) for r in call.result_shapes())
    whole = {f for dims in (x, *results) for d in dims[len(lead) :] for f in d}
    return OpRule((x,), results, whole=frozenset(whole))


def meshgrid(call: Call) -> OpRule | None:
    """``meshgrid([x, y])``: ``([a0], [a1]) -> ([a0, a1], [a0, a1])``; ``indexing="xy"`` swaps the first two."""
    shapes = call.operand_shapes()
    if any(len(s) > 1 for s in shapes):
        return None
    order = list(range(len(shapes)))
    if call.get("indexing", "ij") == "xy" and len(order) > 1:
        order[:2] = [1, 0]
    grid: Dims = tuple((f"a{i}",) for i in order)
    operands: tuple[Dims, ...] = tuple(((f"a{i}",),) if s else () for i, s in enumerate(shapes))
    return OpRule(operands, tuple(grid for _ in shapes))


def unfold(call: Call) -> OpRule | None:
    """``unfold(1, 2, 1)``: ``([d0, x, d2]) -> ([d0, y, d2, n]) whole={n, x, y}``."""
    (shape,) = call.operand_shapes()
    dim = call.dim("dimension", len(shape))
    x, y = (rows(len(shape), but={dim: name}) for name in "xy")
    return OpRule((x,), ((*y, ("n",)),), whole=frozenset("nxy"))


def cosine_similarity(call: Call) -> OpRule | None:
    """It contracts one dimension: ``([d0, d1], [d0, d1]) -> ([d0]) whole={d1}``."""
    a, b = call.operand_shapes()
    if len(a) != len(b) or not a:
        return None
    dim = call.dim("dim", len(a))
    joint = tuple(n if m == 1 else m for m, n in zip(a, b, strict=True))
    (left, right), out, _ = broadcast([a, b], joint)
    whole = {f for d in (left[dim], right[dim]) for f in d}
    return OpRule((left, right), (tuple(d for i, d in enumerate(out) if i != dim),), whole=frozenset(whole))


#: Family of operators -> its rule.
RULES: dict[str, RuleFunction] = {
    "cosine_similarity": cosine_similarity,
    "last_dims": last_dims,
    "meshgrid": meshgrid,
    "unfold": unfold,
}
