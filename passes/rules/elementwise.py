"""Rules of elementwise operators: dimensions are aligned from the right, a size of 1 broadcasts."""

from __future__ import annotations

import torch

from fxsp.passes.graph import Call
from fxsp.passes.rules.rule import Dims, OpRule, overloads, rule
from fxsp.types import Length, same_length

__all__ = ["CHEAP", "ELEMENTWISE", "aligned", "broadcast", "draws"]

_BINARY = (
    "add sub mul div true_divide floor_divide remainder fmod pow atan2 maximum minimum fmax fmin eq ne lt le gt "
    "ge __and__ __or__ __xor__ bitwise_and bitwise_or bitwise_xor logical_and logical_or logical_xor rsub "
    "copysign hypot xlogy lerp where addcmul addcdiv masked_fill bitwise_left_shift bitwise_right_shift logaddexp "
    "logaddexp2 heaviside ldexp gcd lcm nextafter"
)
_UNARY = (
    "neg abs sign exp exp2 expm1 log log2 log10 log1p sqrt rsqrt sin cos tan asin acos atan sinh cosh tanh asinh "
    "acosh atanh sigmoid silu gelu relu relu6 leaky_relu elu selu celu mish hardtanh hardswish hardsigmoid "
    "softplus softsign log_sigmoid logsigmoid threshold erf erfc erfinv reciprocal square floor ceil round trunc "
    "frac clamp clip clamp_min clamp_max isnan isinf isfinite logical_not bitwise_not nan_to_num sinc digamma "
    "lgamma polar complex real imag conj _conj resolve_conj resolve_neg angle signbit positive sgn deg2rad "
    "rad2deg _to_copy to contiguous clone alias detach lift_fresh_copy lift_fresh zeros_like ones_like empty_like "
    "full_like isclose float_power alias_copy detach_copy hardshrink softshrink tanhshrink logit isposinf isneginf i0"
)
#: Reads of data that view ops share; kept apart because their cost is nothing.
_OVERLOADS = (
    "default Tensor Scalar Tensor_Scalar Scalar_Tensor Tensor_Tensor Tensor_mode Scalar_mode self other ScalarOther "
    "ScalarSelf "
    "dtype dtype_layout device prim_dtype this Scalar_Tensor decimals TensorScalar Tensor_float"
).split()


#: The second operand lends its dtype.
_TYPE_AS = overloads("type_as", "to.other")


def _elementwise_ops() -> list[object]:
    """Overloads by these names that have a tensor operand and one tensor result, and write to no argument."""
    found = []
    for name in dict.fromkeys(f"{_BINARY} {_UNARY}".split()):
        packet = getattr(torch.ops.aten, name, None)
        if packet is None:
            continue
        for overload in packet.overloads():
            op = getattr(packet, overload)
            schema = op._schema
            tensors = [a for a in schema.arguments if "Tensor" in str(a.type)]
            writes = any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
            results = [str(r.type) for r in schema.returns]
            # `to.other` reads its second operand's dtype only; `where(x)` gives positions.
            if overload in _OVERLOADS and tensors and results == ["Tensor"] and not writes and op not in _TYPE_AS:
                if all(str(a.type) in ("Tensor", "Optional[Tensor]") for a in tensors):
                    found.append(op)
    return found


ELEMENTWISE = [*_elementwise_ops(), *overloads("max.other", "min.other")]
#: Operators so cheap that recomputing them on whole operands beats any communication.
CHEAP = {*ELEMENTWISE, *_TYPE_AS}


def aligned(size: Length, result: Length) -> bool:
    """Whether an operand's dimension runs along the result's, not over a single element again and again.

    Two lengths of which it is not known that they are equal must be: a length of one would be known.
    """
    return same_length(size, result) or not same_length(size, 1)


def broadcast(
    shapes: list[tuple[Length, ...]], result: tuple[Length, ...], prefix: str = "d"
) -> tuple[list[Dims], Dims, dict[str, Length]]:
    """Factors of broadcast operands: one per result dimension; an operand's 1 against a larger size has none."""
    rank = len(result)
    sizes = {f"{prefix}{i}": n for i, n in enumerate(result)}
    out: Dims = tuple((f"{prefix}{i}",) for i in range(rank))
    operands: list[Dims] = []
    for shape in shapes:
        offset = rank - len(shape)
        operands.append(tuple(out[offset + i] if aligned(n, result[offset + i]) else () for i, n in enumerate(shape)))
    return operands, out, sizes


@rule(ELEMENTWISE)
def elementwise(call: Call) -> OpRule | None:
    """``add(x, y)``: ``([d0, d1], [d1]) -> ([d0, d1])``."""
    results = call.result_shapes()
    operands, out, sizes = broadcast(call.operand_shapes(), results[0])
    return OpRule(tuple(operands), (out,), sizes)


@rule(overloads("broadcast_tensors"))
def broadcast_tensors(call: Call) -> OpRule | None:
    """``broadcast_tensors([x, y])``: ``([d0, d1], [d1]) -> ([d0, d1], [d0, d1])``; ``mse_loss`` begins with one."""
    results = call.result_shapes()
    operands, out, sizes = broadcast(call.operand_shapes(), results[0])
    return OpRule(tuple(operands), tuple(out for _ in results), sizes)


@rule(_TYPE_AS)
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


@rule(overloads("dropout", "native_dropout", "feature_dropout"))
def dropout(call: Call) -> OpRule | None:
    """Inactive dropout is elementwise; an active one draws for the whole value."""
    if draws(call):
        return None
    dims: Dims = tuple((f"d{i}",) for i in range(len(call.operand_shapes()[0])))
    sizes = {f"d{i}": n for i, n in enumerate(call.operand_shapes()[0])}
    return OpRule((dims,), tuple(dims for _ in call.result_shapes()), sizes)
