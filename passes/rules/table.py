"""The rule table: operator overload -> rule function, assembled here from the files of rules and their families."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch.fx import Node

from fxsp.passes.graph import Call
from fxsp.passes.rules import elementwise, index, reduce, scatter, spatial, views
from fxsp.passes.rules.families import family
from fxsp.passes.rules.rule import OpRule, RuleFunction

__all__ = ["RULES", "rule", "rule_of"]

#: Each has a table ``RULES``: family of operators -> rule function.
FILES = (elementwise, views, reduce, index, scatter, spatial)

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


for _file in FILES:
    for _name, _function in _file.RULES.items():
        rule(family(_name))(_function)


def rule_of(node: Node) -> OpRule | None:
    """The rule of this call, or None."""
    function = RULES.get(node.target)
    return None if function is None else function(Call(node))
