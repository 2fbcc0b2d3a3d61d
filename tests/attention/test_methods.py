"""Methods of attention and special operators: each is an object of its own, and in the list that is asked."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from fxsp.passes import special
from fxsp.passes.attention import decide, methods
from fxsp.passes.attention.method import Method
from fxsp.passes.attention.methods import METHODS
from fxsp.passes.propagate.propagate import SPECIALS
from fxsp.passes.special.special import Special


def _defined(package: Any, base: type) -> set[type]:
    """The classes of a kind that the files of a folder define."""
    names = sorted(path.stem for path in Path(package.__file__).parent.glob("*.py") if path.stem != "__init__")
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    return {
        x
        for module in modules
        for x in vars(module).values()
        if isinstance(x, type) and issubclass(x, base) and x is not base and x.__module__ == module.__name__
    }


def test_every_method_is_in_the_list() -> None:
    assert {type(method) for method in METHODS.values()} == _defined(methods, Method)
    assert all(name == method.name for name, method in METHODS.items())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_told(name: str) -> None:
    """The table of methods has a row for each, and each says itself when it is legal."""
    assert f"\n{name:10} " in str(decide.__doc__)
    assert str(type(METHODS[name]).__doc__).startswith("Legal where")


def test_every_special_operator_is_in_the_list() -> None:
    assert _defined(special, Special) <= {type(one) for one in SPECIALS}
    assert len({type(one) for one in SPECIALS}) == len(SPECIALS)
    assert all(one.ops for one in SPECIALS)
