"""No file but ``passes/rules/families.py`` classifies operators of ATen, and its table is tidy.

A classification is a set, list or tuple of two or more operators, or a dictionary with two or more of them as keys: by
themselves (``aten.add.Tensor``), by strings that are all names of operators, or by one string of such names.  A
dictionary whose values are functions says what each operator computes, and is none.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from fxsp.passes.rules.families import TABLE, family, names_of, overloads, traits_of
from fxsp.passes.rules.table import FILES, RULES

ROOT = Path(__file__).resolve().parents[2]
TABLE_FILE = ROOT / "passes" / "rules" / "families.py"
#: Folders whose strings name something else: functions of Python as Dynamo and eager mode see them, our own operators.
OTHER_NAMES = ("fxsp/hooks", "fxsp/ranks", "fxsp/simulation/reference", "kernels")
#: What they are called has other meanings, too: of an all-reduce, of a family of rules.
WORDS = {"max", "min", "sum", "mean", "all", "any", "cpu", "cuda"}
aten = torch.ops.aten


@cache
def _is_name(text: str) -> bool:
    packet = (
        getattr(aten, text.partition(".")[0], None)
        if text.isascii() and text.replace(".", "_").isidentifier()
        else None
    )
    return isinstance(packet, torch._ops.OpOverloadPacket) and text not in WORDS


def _is_operator(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and ast.unparse(node).startswith(("aten.", "torch.ops.aten."))


def _elements(node: ast.AST) -> list[ast.expr]:
    """What a collection is made of; nothing of anything else."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "overloads":
        return node.args
    if isinstance(node, (ast.Set, ast.Tuple, ast.List)):
        return node.elts
    if isinstance(node, ast.Dict):
        functions = all(isinstance(v, (ast.Lambda, ast.Name, ast.Attribute, ast.Call)) for v in node.values)
        return [] if functions else [key for key in node.keys if key is not None]
    return []


def classifications(tree: ast.AST, *, strings: bool = True) -> Iterator[int]:
    """The lines of a file where operators are classified."""
    for node in ast.walk(tree):
        found = _elements(node)
        if sum(map(_is_operator, found)) > 1:
            yield node.lineno  # type: ignore[attr-defined]
        texts = [e.value for e in found if isinstance(e, ast.Constant) and isinstance(e.value, str)]
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts, found = node.value.split(), []
        if strings and len(texts) > 1 and len(texts) >= len(found) and all(map(_is_name, texts)):
            yield node.lineno  # type: ignore[attr-defined]


def files() -> list[Path]:
    return sorted(
        p for folder in ("fxsp", "passes", "kernels") for p in (ROOT / folder).rglob("*.py") if p != TABLE_FILE
    )


def test_operators_are_classified_in_one_table() -> None:
    found = []
    for path in files():
        name = str(path.relative_to(ROOT))
        lines = classifications(ast.parse(path.read_text()), strings=not name.startswith(OTHER_NAMES))
        found += [f"{name}:{line}" for line in lines]
    assert not found, f"give these operators a trait in {TABLE_FILE.name}: {found}"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("A = {aten.add.Tensor, aten.sub.Tensor}", 1),
        ("A = (torch.ops.aten.add.Tensor, x, aten.sub.Tensor)", 1),
        ("A = {aten.add.Tensor: 1, aten.sub.Tensor: 2}", 1),
        ("A = overloads('add.Tensor', 'sub.Tensor')", 1),
        ("x in ('transpose', 'swapaxes')", 1),
        ("A = 'linear matmul mm'", 1),
        ("A = aten.add.Tensor\nx is aten.sub.Tensor", 0),
        ("A = {'add': operator.add, 'sub': lambda a, b: a - b}", 0),
        ("A = ('min', 'max')", 0),
        ("A = 'linear attention'", 0),
        ("A = ('view', 'whatever it is')", 0),
    ],
)
def test_classifications_are_recognised(text: str, count: int) -> None:
    assert len(list(classifications(ast.parse(text)))) == count


def test_the_table_is_tidy() -> None:
    rows = [row.traits for row in TABLE if not row.rule]
    assert len(rows) == len(set(rows)), "two rows of the same traits"
    for row in TABLE:
        traits, names = row.traits or row.rule, row.operators.split()
        assert len(names) == len(set(names)), f"twice in {traits}"
        assert overloads(*names), f"no operator of this torch has {traits}"
        for name in names:
            assert _is_name(name.removesuffix(".*")) or name.partition(".")[0] in WORDS, f"{name} is no operator"


def test_each_rule_has_a_family() -> None:
    for file in FILES:
        for name in file.RULES:
            assert all(RULES[op] is file.RULES[name] for op in family(name))


def test_traits_are_read_by_name() -> None:
    assert {"elementwise", "cheap", "affine"} <= traits_of(aten.add.Tensor)
    assert traits_of(torch.ops.fxsp.gather.default) == frozenset()
    assert aten.view.default in family("view") <= family("cheap")
    assert {"to", "view"} <= names_of("linear") <= names_of("affine")
    with pytest.raises(KeyError, match="no operator has the trait elementwis"):
        family("reshape", "elementwis")


def _used_traits() -> dict[str, str]:
    """The traits that files ask for, and where."""
    found = {}
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("family", "names_of"):
                for argument in node.args:
                    if isinstance(argument, ast.Constant):
                        found[argument.value] = f"{path.relative_to(ROOT)}:{node.lineno}"
    return found


def test_every_trait_is_known_and_used() -> None:
    known = {trait for row in TABLE for trait in row.traits.split()}
    used = _used_traits()
    implied = {"cheap", "view", "same_values", "affine"}
    assert not {where for trait, where in used.items() if trait not in known | implied}
    rules = {name for file in FILES for name in file.RULES} | {"elementwise", "matmul", "dropout"}
    spatial = {"last_1", "last_2", "last_3"}
    assert known - used.keys() - rules - spatial == set()
