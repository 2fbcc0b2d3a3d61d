"""Summands that stay summands through what is linear in them: one all-reduce for several, or for less.

Each rank has a summand (:class:`~fxsp.types.Partial`) of what it summed over its own tokens::

    %sum   = sum(%x)              P
    %mul   = mul(%sum, 0.5)       P     linear, and on the way to a sum of summands
    %add   = add(%mul, %mean)     P     of two summands: one all-reduce instead of two
    return add

A summand that something else needs, too, is summed at once: it would be sent twice.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from fxsp.lengths import hint
from fxsp.passes.graph import Call, tensor_nodes
from fxsp.passes.rules.decide import Decision
from fxsp.passes.rules.families import family
from fxsp.types import Partial, Type, product

__all__ = ["decide_summands"]


def decide_summands(call: Call, types: list[Type]) -> Decision | None:
    """A decision where all tensor operands are summands and the result had better be one; else None."""
    if not types or not all(isinstance(t, Partial) for t in types) or not _is_linear(call.node):
        return None
    operands, (result, *more) = call.operand_shapes(), call.result_shapes()
    if more or any(len(n.users) > 1 for n in call.operands):
        return None
    made, sent = hint(product(result)), sum(hint(product(shape)) for shape in operands)
    if made < sent or (made == sent and _leads_to_sum(call.node)) or (len(operands) > 1 and made <= sent):
        return Decision(tuple(types), (Partial(origin=f"{call.op} of summands"),))
    return None


def _is_linear(node: Node) -> bool:
    """Whether a call is linear in its tensors together, and rounds no more than what it reads."""
    operands = tensor_nodes((node.args, node.kwargs))
    if node.target in family("joins"):
        known = len(operands) > 1  # a number that is added would be added once per rank
    else:
        known = len(operands) == 1 and (
            node.target in family("linear", "scale") or node.target is torch.ops.aten.div.Tensor
        )
    value = node.meta["val"]
    if not known or not isinstance(value, torch.Tensor):
        return False
    dtypes = [n.meta["val"].dtype for n in operands]
    return all(d.is_floating_point and torch.promote_types(d, value.dtype) is value.dtype for d in dtypes)


def _leads_to_sum(node: Node) -> bool:
    """Whether a value is used once, for a sum of several, after steps that are linear."""
    while len(node.users) == 1:
        (node,) = node.users
        if node.op != "call_function" or "val" not in node.meta or not _is_linear(node):
            return False
        if node.target in family("joins"):
            return True
    return False
