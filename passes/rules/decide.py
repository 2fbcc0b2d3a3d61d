"""From a rule and the operands' types to a decision: what each operand must be, and what the results are.

Pure functions of types; no graph is changed here.  The candidates are the shards that the operands bring along; the one
that costs the fewest gathered bytes wins, ties go to the first that keeps the result sharded.
"""

from __future__ import annotations

from dataclasses import dataclass

from fxsp.lengths import hint
from fxsp.passes.graph import Call, Decision, facts, shape_of
from fxsp.passes.rules.rule import Dims, OpRule, draws
from fxsp.passes.rules.table import rule_of
from fxsp.types import Length, Partial, Replicate, Sequence, Shard, Type, Used, product, quotient, same_length

__all__ = ["Decision", "Placement", "decide", "decide_by_rule", "locate", "placed_in", "replicate_all", "weights"]


@dataclass(frozen=True)
class Placement:
    """A shard of one factor: the tokens are ``outer * sequence`` inside it."""

    factor: str
    sequence: Sequence
    outer: Length

    def same_as(self, other: Placement) -> bool:
        return (
            self.factor == other.factor
            and self.sequence.same_as(other.sequence)
            and same_length(self.outer, other.outer)
        )


def locate(shard: Shard, dims: Dims | None, sizes: dict[str, Length]) -> Placement | None:
    """Which factor of the operand carries the tokens; None if they do not fall into one factor."""
    if dims is None or shard.dim >= len(dims):
        return None
    factors = dims[shard.dim]
    if len(factors) == 1:
        return Placement(factors[0], shard.sequence, shard.outer)
    for i, factor in enumerate(factors):
        before = product(sizes[f] for f in factors[:i])
        after = product(sizes[f] for f in factors[i + 1 :])
        outer, sequence = quotient(shard.outer, before), shard.sequence.divided(after)
        if outer is None or sequence is None:
            continue
        if same_length(product((outer, sequence.length)), sizes[factor]):
            return Placement(factor, sequence, outer)
    return None


def placed_in(placement: Placement, dims: Dims, sizes: dict[str, Length], origin: str = "") -> Shard | None:
    """The type of a tensor whose dimensions hold the sharded factor; None if they do not."""
    for d, factors in enumerate(dims):
        if placement.factor in factors:
            i = factors.index(placement.factor)
            before = [sizes[f] for f in factors[:i]]
            after = [sizes[f] for f in factors[i + 1 :]]
            return Shard(d, placement.sequence, product((*before, placement.outer)), product(after), origin=origin)
    return None


def replicate_all(call: Call, types: list[Type], reason: str) -> Decision:
    """Every operand whole, every result whole: always right."""
    needed = any(isinstance(t, (Shard, Partial)) for t in types)
    return Decision(
        tuple(Replicate() for _ in types),
        tuple(Replicate(origin=reason) for _ in call.result_shapes()),
        reason if needed else "",
    )


def decide(call: Call, rule: OpRule | None, types: list[Type], bytes_of: list[int], free: list[bool]) -> Decision:
    """Choose the cheapest way to run ``call`` on operands of these types.

    ``bytes_of`` are the global bytes of the operands (hints), ``free`` says which sharded operands can be had whole
    without communication.
    """
    name = str(call.op)
    if not any(isinstance(t, Shard) for t in types):
        return replicate_all(call, types, "all operands are whole")
    if rule is None:
        return replicate_all(call, types, f"{name} has no sharding rule for this use: it needs its operands whole")

    types_read = [t for t, dims in zip(types, rule.operands, strict=True) if dims is not None]
    if not any(isinstance(t, Shard) for t in types_read):
        kept = tuple(t if dims is None else Replicate() for t, dims in zip(types, rule.operands, strict=True))
        return Decision(kept, tuple(Replicate() for _ in rule.results))
    placements = [
        locate(t, dims, rule.sizes) if isinstance(t, Shard) else None
        for t, dims in zip(types, rule.operands, strict=True)
    ]
    best: tuple[tuple[int, int], Decision] | None = None
    tried: list[Placement] = []
    for position, placement in enumerate(placements):
        if placement is None or any(placement.same_as(t) for t in tried):
            continue
        tried.append(placement)
        decision = _with(placement, call, rule, types, placements)
        if decision is None:
            continue
        cost = sum(
            0 if free[i] else bytes_of[i]
            for i, t in enumerate(types)
            if isinstance(t, Shard) and not t.same_as(decision.operands[i])
        )
        rank = (cost, position if isinstance(decision.results[0], Shard) else position + len(types))
        if best is None or rank < best[0]:
            best = (rank, decision)
    everything = sum(n for n, t, f in zip(bytes_of, types, free, strict=True) if isinstance(t, Shard) and not f)
    if best is None or best[0][0] > everything:
        return replicate_all(call, types, _why(name, rule, types))
    return best[1]


def decide_by_rule(call: Call, types: list[Type]) -> Decision:
    """The cheapest way by the operator's own rule; a call that draws random numbers has none."""
    rule = None if draws(call) else rule_of(call.node)
    return decide(call, rule, types, *weights(call))


def weights(call: Call) -> tuple[list[int], list[bool]]:
    """Global bytes of the operands, as hints, and whether each can be had whole without communication."""
    operands = call.operands
    bytes_of = [hint(product((*shape_of(n), n.meta["val"].element_size()))) for n in operands]
    return bytes_of, [facts(n).free for n in operands]


def _with(
    placement: Placement, call: Call, rule: OpRule, types: list[Type], placements: list[Placement | None]
) -> Decision | None:
    factor = placement.factor
    if factor in rule.whole or factor in rule.combined:
        return None
    origin = f"{call.op}: {rule}, shard of {factor}"
    results: list[Type] = []
    reduces = factor in rule.reduction
    for dims in rule.results:
        placed = placed_in(placement, dims, rule.sizes, origin)
        if placed is not None:
            results.append(placed)
        elif reduces:
            results.append(Partial(origin=origin))
        else:
            return None
    operands: list[Type] = []
    reason = ""
    for i, (operand, type_) in enumerate(zip(rule.operands, types, strict=True)):
        if operand is None:
            operands.append(type_)
            continue
        placed = placed_in(placement, operand, rule.sizes, origin)
        operands.append(placed if placed is not None else Used(origin=origin))
        if isinstance(type_, Shard) and not type_.same_as(operands[-1]):
            reason = (
                f"operand {i} is {type_}, but {call.op} runs on {placed or 'a whole operand'} beside the other operands"
            )
    holders = [i for i, t in enumerate(operands) if isinstance(t, Shard)]
    # Zero pads in one factor of each product are enough, but a NaN in the other would survive 0 * NaN.
    masked = tuple(holders) if reduces else ()
    return Decision(tuple(operands), tuple(results), reason, masked)


def _why(name: str, rule: OpRule, types: list[Type]) -> str:
    for i, (type_, dims) in enumerate(zip(types, rule.operands, strict=True)):
        if not isinstance(type_, Shard) or dims is None:
            continue
        placement = locate(type_, dims, rule.sizes)
        if placement is None:
            return f"{name} regroups dimension {type_.dim} of operand {i}, which holds the tokens {type_.sequence}"
        if placement.factor in rule.whole or placement.factor in rule.combined:
            return f"{name} needs dimension {type_.dim} of operand {i} whole (the tokens {type_.sequence})"
    return f"{name} cannot keep the tokens split"
