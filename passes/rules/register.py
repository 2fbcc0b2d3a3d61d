"""Rules for operators of users: a custom operator that runs on shards as it stands."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils.flop_counter import flop_registry

from fxsp.cost.flops import FORMULAS
from fxsp.errors import OptionError
from fxsp.passes.graph import Call
from fxsp.passes.rules.notation import Pattern, written
from fxsp.passes.rules.table import RULES
from fxsp.torch_internals import overload_of, packet_of, schema

__all__ = ["register_op"]

#: Operators that were registered -> their rule, as it was given.
REGISTERED: dict[Any, str] = {}


def register_op(op: Any, rule: str) -> None:
    """Let the compiler run an operator on shards: a linear of quantized weights, say, that is a kernel of its own.

    ::

        fxsp.register_op(linear_8bit, rule="[*d, i], [o, i], [o] -> [*d, o]")  # weights, and a scale for each output
        fxsp.register_op(linear_4bit, rule="[*d, i], [n, 1], [k] -> [*d, o]")  # packed weights, scales of blocks

    ``op`` is an overload, a packet with one overload, or what ``torch.library.custom_op`` returned; it needs a fake
    implementation, and an autograd formula where gradients are asked for.  It must return new tensors and write to no
    argument.  Each rank calls it as it stands, on its own rows of what is split.

    ``rule`` names the dimensions of its tensor operands, in the order of its schema (without those that are None in a
    call), and of its results.  A dimension that an operand and every result share can be split; any other is whole::

        [*d, i]          any number of dimensions d, then one dimension i
        whole={c}        c must be whole, though it is in the results (a softmax over c)
        reduction={i}    the results are sums over i: ranks may have summands (the operator is linear along i)
        1  -  ...  |     a dimension of size 1; an operand whose data is not read; more of the same; else

    A rule is believed: one that is wrong for the operator makes wrong results, which :func:`fxsp.verify` finds, values
    and gradients, before anything runs on ranks.  Arguments that are no tensors are passed on: one that counts tokens
    is no business of a rule.  Operations are counted by the rule, unless ``torch.utils.flop_counter`` has a formula:
    two for each element of the result and each of the first operand that it sums over (the dimensions in no result).
    Register alike on all ranks, before compiling; registering again replaces the rule.

    Raises :class:`~fxsp.errors.OptionError` for a rule that cannot be read or that the schema contradicts.
    """
    overload = overload_of(op)
    if overload is None:
        raise OptionError(
            f"register_op: {op!r} is no operator with one overload; give what torch.library.custom_op returned, or "
            "torch.ops.<namespace>.<name>.<overload>"
        )
    if overload in RULES and overload not in REGISTERED:
        raise OptionError(f"register_op: {overload} has a rule already")
    try:
        patterns = [Pattern.parse(text) for text in rule.split("|")]
        for pattern in patterns:
            _check_dimensions(pattern)
        _check_schema(overload, patterns)
    except ValueError as error:
        raise OptionError(f"register_op: the rule {rule!r} of {overload} cannot be used: {error}") from None
    REGISTERED[overload] = rule
    function = written(rule)
    function.__name__ = overload.name()
    RULES[overload] = function
    name = schema(overload).name
    if packet_of(overload) not in flop_registry and (name not in FORMULAS or FORMULAS[name] in _counts):
        _counts.add(count := _count(patterns))
        FORMULAS[name] = count


_counts: set[Any] = set()


def _check_dimensions(pattern: Pattern) -> None:
    for dims in (*pattern.rule.operands, *pattern.rule.results):
        names = [factors[0] for factors in dims or () if factors]
        if any(len(factors) > 1 for factors in dims or ()):
            raise ValueError("a dimension has one name, '[b, c]', or none, '1'")
        if len({*names}) < len(names):
            raise ValueError(f"a tensor has a dimension twice: {', '.join(names)}")
        if sum(name.startswith("*") for name in names) > 1:
            raise ValueError("a tensor has one '*' at most")
    if not any(pattern.rule.operands):
        raise ValueError("there is no operand")
    if pattern.rule.combined:
        raise ValueError("combined={...} is for maxima of torch's own operators; name a dimension that is whole")


def _check_schema(overload: Any, patterns: list[Pattern]) -> None:
    arguments, returns = schema(overload).arguments, schema(overload).returns
    if any(a.alias_info is not None and a.alias_info.is_write for a in arguments):
        raise ValueError("the operator writes to an argument")
    if any(r.alias_info is not None for r in returns):
        raise ValueError("a result is a view of an argument")
    if not returns or any(str(r.type) != "Tensor" for r in returns):
        raise ValueError("its results must be tensors")
    tensors = [a for a in arguments if "Tensor" in str(a.type)]
    lists = any("List" in str(a.type) or "[]" in str(a.type) for a in tensors)
    required = sum(str(a.type) == "Tensor" for a in tensors)
    for pattern in patterns:
        count, results = len(pattern.rule.operands), len(pattern.rule.results)
        most = count if pattern.operands_repeat else len(tensors)
        if not lists and (count > len(tensors) or (count < required and not pattern.operands_repeat)):
            names = ", ".join(a.name for a in tensors)
            raise ValueError(f"it names {count} operands, and the operator has {required} to {most}: {names}")
        if results > len(returns) or (results < len(returns) and not pattern.results_repeat):
            raise ValueError(f"it names {results} results, and the operator has {len(returns)}")


def _count(patterns: list[Pattern]) -> Callable[[Call, Callable[[Any], Any]], int]:
    """Operations: two for each element of the result and of the dimensions that the first operand has beside it."""

    def count(call: Call, shape_of: Callable[[Any], Any]) -> int:
        nodes: list[Node] = []
        map_arg(list(call.arguments.values()), nodes.append)  # in the program of one rank, too
        operands, result = [shape for n in nodes if (shape := shape_of(n)) is not None], shape_of(call.node)
        rule = next((r for p in patterns if result is not None and (r := p.fit(operands, [result]))), None)
        if rule is None:
            return 0
        kept = {f for dims in rule.results for dim in dims for f in dim}
        summed = [f for dim in rule.operands[0] or () for f in dim if f not in kept]
        return 2 * prod(result) * prod(int(rule.sizes[f]) for f in summed) if summed else 0

    return count
