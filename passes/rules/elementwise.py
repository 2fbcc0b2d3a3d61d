"""Rules of elementwise operators: dimensions are aligned from the right, a size of 1 broadcasts."""

from __future__ import annotations

import torch

from fxsp.passes.graph import Call
from fxsp.passes.rules.dims import broadcast
from fxsp.passes.rules.rule import Dims, OpRule, RuleFunction

__all__ = ["RULES", "draws"]


def elementwise(call: Call) -> OpRule | None:
    """``add(x, y)``: ``([d0, d1], [d1]) -> ([d0, d1])``."""
    results = call.result_shapes()
    operands, out, sizes = broadcast(call.operand_shapes(), results[0])
    return OpRule(tuple(operands), (out,), sizes)


def broadcast_tensors(call: Call) -> OpRule | None:
    """``broadcast_tensors([x, y])``: ``([d0, d1], [d1]) -> ([d0, d1], [d0, d1])``; ``mse_loss`` begins with one."""
    results = call.result_shapes()
    operands, out, sizes = broadcast(call.operand_shapes(), results[0])
    return OpRule(tuple(operands), tuple(out for _ in results), sizes)


def type_as(call: Call) -> OpRule | None:
    """``([d0, d1], -) -> ([d0, d1])``."""
    shape = call.operand_shapes()[0]
    dims: Dims = tuple((f"d{i}",) for i in range(len(shape)))
    return OpRule((dims, None), (dims,), {f"d{i}": n for i, n in enumerate(shape)})


def draws(call: Call) -> bool:
    """Whether this call draws random numbers: dropout does not at p = 0, nor outside training (None is training)."""
    if torch.Tag.nondeterministic_seeded not in call.op.tags:
        return False
    if "dropout_p" in call.arguments:  # attention
        return bool(call["dropout_p"])
    return not ("p" in call.arguments and "train" in call.arguments) or bool(call["train"] is not False and call["p"])


def dropout(call: Call) -> OpRule | None:
    """Inactive dropout is elementwise; an active one draws for the whole value."""
    if draws(call):
        return None
    dims: Dims = tuple((f"d{i}",) for i in range(len(call.operand_shapes()[0])))
    sizes = {f"d{i}": n for i, n in enumerate(call.operand_shapes()[0])}
    return OpRule((dims,), tuple(dims for _ in call.result_shapes()), sizes)


#: Family of operators -> its rule.
RULES: dict[str, RuleFunction] = {
    "elementwise": elementwise,
    "broadcast_tensors": broadcast_tensors,
    "type_as": type_as,
    "dropout": dropout,
}
