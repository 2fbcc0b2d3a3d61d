"""The rule table: operator overload -> rule function.

It is assembled here, from the rules in the table of families and from the files of rules that have to compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.fx import Node

from fxsp.passes.graph import Call
from fxsp.passes.rules import index, reduce, spatial, views
from fxsp.passes.rules.families import TABLE, Row, family, overloads
from fxsp.passes.rules.notation import written
from fxsp.passes.rules.rule import OpRule, RuleFunction, draws

__all__ = ["RULES", "rule", "rule_of"]

#: Each has a table ``RULES``: family of operators -> rule function.
FILES = (views, reduce, index, spatial)

#: The table: operator overload -> rule function.
RULES: dict[Any, RuleFunction] = {}


def rule(ops: Iterable[Any]) -> Callable[[RuleFunction], RuleFunction]:
    """Register a rule function for operators; one rule per operator."""

    def register(function: RuleFunction) -> RuleFunction:
        for op in ops:
            if op in RULES:
                raise ValueError(f"{op} has a rule already")
            RULES[op] = function
        return function

    return register


def _from_notation(row: Row) -> None:
    ops = overloads(*row.operators.split())
    random = any(torch.Tag.nondeterministic_seeded in op.tags for op in ops)

    def excluded(call: Call) -> bool:
        return (random and draws(call)) or any(call[name] for name in row.unless.split())

    function = written(row.rule, excluded if random or row.unless else None)
    name = (row.traits or row.operators).split()[0]
    function.__name__ = name if row.traits and family(name) == {*ops} else row.operators.split()[0]
    rule(ops)(function)


for _row in TABLE:
    if _row.rule:
        _from_notation(_row)
for _file in FILES:
    for _name, _function in _file.RULES.items():
        rule(family(_name))(_function)


def rule_of(node: Node) -> OpRule | None:
    """The rule of this call, or None."""
    function = RULES.get(node.target)
    return None if function is None else function(Call(node))
