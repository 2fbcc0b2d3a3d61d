"""Rules of operators that contract or normalize dimensions: matrix products, reductions, norms, softmax, scans."""

from __future__ import annotations

import math
import string

from fxsp.passes.graph import Call
from fxsp.passes.rules.dims import aligned, broadcast
from fxsp.passes.rules.families import family
from fxsp.passes.rules.rule import Dims, OpRule, RuleFunction, passing, rows
from fxsp.types import Length, same_length

__all__ = ["RULES", "reduced_dims"]


def addmm(call: Call) -> OpRule | None:
    """``([m, n], [m, k], [k, n]) -> ([m, n]) whole={k}``."""
    bias, a, _ = call.operand_shapes()
    (result,) = call.result_shapes()
    (bias_dims,), out, sizes = broadcast([bias], result)
    *lead, m, n = out
    return OpRule(
        (bias_dims, (*lead, m, ("k",)), (*lead, ("k",), n)), (out,), sizes | {"k": a[-1]}, whole=frozenset("k")
    )


def scaled_mm(call: Call) -> OpRule | None:
    """``([m, k], [k, n], [m, 1], [1, n]) -> ([m, n]) whole={k}``: scales for each row, or one for all."""
    m, n = call.shape("self")[0], call.shape("mat2")[1]
    one: Length = 1

    def scale(shape: tuple[Length, ...], of: tuple[Length, Length], factors: tuple[str, str]) -> Dims | None:
        if all(same_length(size, one) for size in shape):
            return ((),) * len(shape)
        if len(shape) != 2 or not all(same_length(a, b) for a, b in zip(shape, of, strict=True)):
            return None  # a scale for each block
        return tuple((f,) if not same_length(size, one) else () for f, size in zip(factors, of, strict=True))

    scales = scale(call.shape("scale_a"), (m, one), ("m", "")), scale(call.shape("scale_b"), (one, n), ("", "n"))
    if None in scales or call.get("scale_result") is not None:
        return None
    bias: tuple[Dims, ...] = ((("n",),),) if call.get("bias") is not None else ()
    return OpRule(
        ((("m",), ("k",)), (("k",), ("n",)), *scales, *bias),
        ((("m",), ("n",)),),
        whole=frozenset("k"),
    )


def _spelled_out(equation: str, ranks: list[int]) -> str | None:
    """An equation with a result, and letters for ``...``; None if its terms do not fit operands of these ranks."""
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if not arrow:
        letters = left.replace(",", "").replace(".", "")
        once = "".join(sorted(c for c in letters if letters.count(c) == 1))
        right = ("..." if "..." in left else "") + once
    if len(terms) != len(ranks):
        return None
    hidden = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)]
    if any(n < 0 or (n and "..." not in term) for n, term in zip(hidden, terms, strict=True)):
        return None
    free = [c for c in string.ascii_letters if c not in equation]
    most = max((n for n, term in zip(hidden, terms, strict=True) if "..." in term), default=0)
    if most > len(free):
        return None
    lead = "".join(free[:most])
    # Dimensions that stand for dots are aligned from the right, as in broadcasting.
    terms = [term.replace("...", lead[most - n :]) for n, term in zip(hidden, terms, strict=True)]
    return f"{','.join(terms)}->{right.replace('...', lead)}"


def einsum(call: Call) -> OpRule | None:
    """The equation is the rule: ``"bsc,bsd->bcd"``: ``([b, s, c], [b, s, d]) -> ([b, c, d]) reduction={s}``."""
    shapes = call.operand_shapes()
    equation = _spelled_out(str(call["equation"]).replace(" ", ""), [len(shape) for shape in shapes])
    if equation is None:
        return None
    left, right = equation.split("->")
    terms = left.split(",")
    sizes: dict[str, Length] = {}
    for term, shape in zip(terms, shapes, strict=True):
        if len(set(term)) != len(term):
            return None
        for letter, n in zip(term, shape, strict=True):
            if sizes.get(letter, 1) == 1:
                sizes[letter] = n
    operands = tuple(
        tuple((c,) if aligned(n, sizes[c]) else () for c, n in zip(t, s, strict=True))
        for t, s in zip(terms, shapes, strict=True)
    )
    used = {f for dims in operands for dim in dims for f in dim}
    result = tuple((c,) for c in right)
    return OpRule(operands, (result,), sizes, reduction=frozenset(c for c in used if c not in right))


def reduced_dims(call: Call, rank: int) -> list[int]:
    """The dimensions that a reduction reduces."""
    dims = call.get("dim", call.get("dims"))
    if dims is None or dims == []:
        return list(range(rank))
    return sorted({d % rank for d in ([dims] if isinstance(dims, int) else dims)}) if rank else []


def _reduction(call: Call, kind: str) -> OpRule | None:
    shape = call.operand_shapes()[0]
    if len(call.operands) != 1:
        return None
    dims = rows(len(shape))
    reduced = reduced_dims(call, len(shape))
    keep = bool(call.get("keepdim", False))
    out = [() if i in reduced else d for i, d in enumerate(dims) if keep or i not in reduced]
    factors = frozenset(f"d{i}" for i in reduced)
    results = tuple(tuple(out) for _ in call.result_shapes())
    return OpRule((dims,), results, {}, **{kind: factors})


def total(call: Call) -> OpRule | None:
    """``sum(1)``: ``([d0, d1, d2]) -> ([d0, d2]) reduction={d1}``."""
    return _reduction(call, "reduction")


def combined(call: Call) -> OpRule | None:
    """``amax(1)``: ``([d0, d1, d2]) -> ([d0, d2]) combined={d1}``."""
    order = call.get("ord", call.get("p", 2))  # of a norm
    known = order is None or order in (0, 1, 2, math.inf, -math.inf)
    return _reduction(call, "combined" if known else "whole")


def reduction(call: Call) -> OpRule | None:
    """``var(1)``: ``([d0, d1, d2]) -> ([d0, d2]) whole={d1}``."""
    return _reduction(call, "whole")


def layer_norm(call: Call) -> OpRule | None:
    """``([d0, d1, d2], [d2], [d2]) -> ([d0, d1, d2]) whole={d2}``."""
    x = call.shape("input")
    count = len(call["normalized_shape"])
    dims = rows(len(x))
    tail = dims[len(x) - count :]
    statistics = (*dims[: len(x) - count], *(() for _ in range(count)))
    results = (dims, *(statistics for _ in call.result_shapes()[1:]))
    return OpRule((dims, *(tail for _ in call.operands[1:])), results, whole=frozenset(f for (f,) in tail))


def group_norm(call: Call) -> OpRule | None:
    """Only the batch passes: ``([d0, d1, d2], [c], [c]) -> ([d0, d1, d2]) whole={c, d1, d2}``."""
    x, *others = call.operand_shapes()
    if call.get("running_mean") is not None and call.get("use_input_stats"):
        return None  # it writes statistics of the whole batch
    dims = rows(len(x))
    whole = {f for (f,) in dims[1:]} | ({"c"} if others else set())
    return OpRule((dims, *((("c",),) for _ in others)), (dims,), whole=frozenset(whole))


def along(call: Call) -> OpRule | None:
    """Dimensions that it does not read across pass: ``softmax(1)``: ``([d0, d1]) -> ([d0, w1]) whole={d1, w1}``."""
    if len(call.operands) != 1:
        return None
    rank = len(call.operand_shapes()[0])
    return passing(call, [rank - 2, rank - 1] if call.op in family("triangle") else reduced_dims(call, rank))


def convolution(call: Call) -> OpRule | None:
    """The batch passes, and dimensions that a kernel of size one walks step by step (``conv3d`` of patches in frames);
    any other kernel reads its neighbours: ``([b, x1, x2, x3], [p0_0, ...]) -> ([b, y1, x2, y3]) whole={p0_0, ...}``.
    """
    x, *others = call.operand_shapes()
    (result,) = call.result_shapes()
    if len(x) != len(result) or len(x) != len(others[0]):
        return None
    operands: list[Dims] = [(("b",), *((f"x{i}",) for i in range(1, len(x))))]
    operands += [tuple((f"p{k}_{i}",) for i in range(len(o))) for k, o in enumerate(others)]
    alone = {i for i in range(2, len(x)) if others[0][i] == 1 and _is_step_by_step(call, i - 2)}
    out: Dims = (("b",), *((f"{'x' if i in alone else 'y'}{i}",) for i in range(1, len(result))))
    whole = {f for dims in (*operands, out) for d in dims for f in d} - {"b", *(f"x{i}" for i in alone)}
    return OpRule(tuple(operands), (out,), whole=frozenset(whole))


def _is_step_by_step(call: Call, i: int) -> bool:
    """Whether the ``i``-th of the dimensions that a convolution walks has a stride of one, and no padding."""
    expected = {"stride": 1, "padding": 0, "output_padding": 0}
    for name, usual in expected.items():
        given = call.get(name, usual)
        if isinstance(given, (list, tuple)):  # by a name ("same"), what is padded depends on the kernel alone
            given = given[i if len(given) > 1 else 0] if given else usual
        if not isinstance(given, str) and given != usual:
            return False
    return True


#: Family of operators -> its rule.
RULES: dict[str, RuleFunction] = {
    "addmm": addmm,
    "scaled_mm": scaled_mm,
    "einsum": einsum,
    "total": total,
    "combined": combined,
    "reduction": reduction,
    "layer_norm": layer_norm,
    "group_norm": group_norm,
    "along": along,
    "convolution": convolution,
}
