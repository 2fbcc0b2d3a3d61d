"""Hooks are registered, replaced, refused, reset and removed; then the module is what it was."""

from __future__ import annotations

import pytest
import torch

from fxsp.errors import FxspWarning
from fxsp.hooks.base import HookRegistry, ModelHook
from registering import AddOne, Double, Override, Trace, X, hooked


def test_one_registry_for_each_module() -> None:
    module = Double()
    registry = HookRegistry.get_or_create(module)
    assert registry.module is module
    assert HookRegistry.get_or_create(module) is registry
    assert HookRegistry.check_if_exists_or_initialize(module) is registry
    assert HookRegistry.get_or_create(Double()) is not registry
    with pytest.raises(RuntimeError, match="get_or_create"):
        HookRegistry(module).register_hook("a", ModelHook())


def test_a_registry_of_ones_own_attaches_itself() -> None:
    module = Double()
    registry = HookRegistry(module)
    assert "forward" not in vars(module)
    registry.register_hook("a", AddOne())
    assert torch.equal(module(X), (X + 1) * 2)
    assert HookRegistry.get_or_create(module) is registry


def test_get_and_remove() -> None:
    hook = AddOne()
    module, registry = hooked(("a", hook))
    assert registry.get_hook("a") is hook
    assert registry.get_hook("b") is None
    registry.remove_hook("b")
    assert torch.equal(module(X), (X + 1) * 2)
    registry.remove_hook("a")
    assert registry.get_hook("a") is None
    assert torch.equal(module(X), X * 2)


def test_second_override_is_refused_and_changes_nothing() -> None:
    log: list[str] = []
    first, second = Override("first", log), Override("second", log)
    module, registry = hooked(("m", first), ("n", ModelHook()))
    log.clear()
    with pytest.raises(RuntimeError, match=r"'x' .*Override.* and so does 'm'"):
        registry.register_hook("x", second)
    assert log == []
    assert registry.names == ["m", "n"]
    assert registry.get_hook("x") is None
    assert torch.equal(module(X), X + 100)
    assert log == ["pre first", "new first", "post first"]


def test_an_override_may_come_after_another_was_removed() -> None:
    log: list[str] = []
    module, registry = hooked(("a", Override("a", log)))
    registry.remove_hook("a")
    registry.register_hook("b", Override("b", log))
    log.clear()
    module(X)
    assert "new b" in log


def test_duplicate_name_replaces_with_a_warning() -> None:
    log: list[str] = []
    module, registry = hooked(("a", Override("old", log)))
    with pytest.warns(FxspWarning, match="'a' is already registered; it is replaced"):
        registry.register_hook("a", Override("new", log))
    log.clear()
    module(X)
    assert log == ["pre new", "new new", "post new"]
    with pytest.warns(FxspWarning, match="replaced"):
        registry.register_hook("a", AddOne())
    assert torch.equal(module(X), (X + 1) * 2)


def test_hook_that_cannot_be_initialized_is_not_registered() -> None:
    class Broken(ModelHook):
        def initialize_hook(self, module):
            raise ValueError("no")

    module, registry = hooked(("a", AddOne()))
    with pytest.raises(ValueError, match="no"):
        registry.register_hook("a", Broken())
    assert isinstance(registry.get_hook("a"), AddOne)
    with pytest.raises(ValueError, match="no"):
        registry.register_hook("b", Broken())
    assert registry.names == ["a"]
    assert torch.equal(module(X), (X + 1) * 2)


def test_reset_hook_resets_one() -> None:
    log: list[str] = []
    _, registry = hooked(("a", Trace("a", log)), ("b", Trace("b", log)))
    log.clear()
    registry.reset_hook("b")
    registry.reset_hook("missing")
    assert log == ["reset b"]


def test_reset_removes_all_and_restores_forward() -> None:
    log: list[str] = []
    module, registry = hooked(("a", Trace("a", log)), ("b", Override("b", log)))
    log.clear()
    registry.reset()
    assert sorted(log) == ["reset a", "reset b"]
    assert registry.names == []
    assert vars(module).keys() == vars(Double()).keys()
    assert module.forward.__func__ is Double.forward
    assert torch.equal(module(X), X * 2)
    registry.register_hook("c", AddOne())  # and it can be used again
    assert torch.equal(module(X), (X + 1) * 2)


def test_forward_that_was_an_attribute_comes_back() -> None:
    module = Double()
    mine = lambda x: x + 7  # noqa: E731
    module.forward = mine
    registry = HookRegistry.get_or_create(module)
    registry.register_hook("a", AddOne())
    assert torch.equal(module(X), X + 8)
    registry.reset()
    assert module.forward is mine


def test_a_forward_wrapped_after_us_is_left_alone() -> None:
    module, registry = hooked(("a", AddOne()))
    ours = module.forward
    module.forward = lambda x: ours(x) * 10
    assert torch.equal(module(X), (X + 1) * 20)
    registry.reset()
    assert torch.equal(module(X), X * 20)
