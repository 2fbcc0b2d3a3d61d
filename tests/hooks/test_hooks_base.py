"""The registry of hooks: order, override, replacement, removal, reset, contexts, signatures, copies."""

from __future__ import annotations

import copy
import inspect
import pickle
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import fxsp.hooks
from fxsp.errors import FxspWarning
from fxsp.hooks.base import BaseState, HookRegistry, ModelHook, StateManager


class Double(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor, *, bias: float = 0.0) -> torch.Tensor:
        return x * self.weight + bias


class Trace(ModelHook):
    """Writes down when it is called."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def initialize_hook(self, module):
        self.log.append(f"init {self.name}")
        return module

    def pre_forward(self, module, *args, **kwargs):
        self.log.append(f"pre {self.name}")
        return args, kwargs

    def post_forward(self, module, output):
        self.log.append(f"post {self.name}")
        return output

    def reset_state(self, module):
        self.log.append(f"reset {self.name}")
        return module


class Override(Trace):
    def new_forward(self, module, *args, **kwargs):
        self.log.append(f"new {self.name}")
        return args[0] + 100


class AddOne(ModelHook):
    """Module level, so that it can be pickled."""

    def pre_forward(self, module, *args, **kwargs):
        return (args[0] + 1, *args[1:]), kwargs


X = torch.tensor([1.0, 2.0])


def hooked(*hooks: tuple[str, ModelHook]) -> tuple[Double, HookRegistry]:
    module = Double()
    registry = HookRegistry.get_or_create(module)
    for name, hook in hooks:
        registry.register_hook(name, hook)
    return module, registry


# --- the call ---------------------------------------------------------------------------------------------------------


def test_default_hook_changes_nothing() -> None:
    module, _ = hooked(("plain", ModelHook()))
    assert torch.equal(module(X, bias=3.0), X * 2 + 3)


def test_no_hooks_changes_nothing() -> None:
    module, registry = hooked()
    assert torch.equal(module(X), X * 2)
    assert torch.equal(registry.dispatch(X, bias=1.0), X * 2 + 1)


def test_order_is_by_name_and_reversed_afterwards() -> None:
    log: list[str] = []
    module, _ = hooked(("c", Trace("c", log)), ("a", Trace("a", log)), ("b", Trace("b", log)))
    log.clear()
    module(X)
    assert log == ["pre a", "pre b", "pre c", "post c", "post b", "post a"]


def test_override_comes_last_and_replaces_forward() -> None:
    log: list[str] = []
    module, _ = hooked(("b", Trace("b", log)), ("a", Override("a", log)))
    log.clear()
    assert torch.equal(module(X), X + 100)
    assert log == ["pre b", "pre a", "new a", "post a", "post b"]


def test_arguments_and_output_pass_from_hook_to_hook() -> None:
    class Bias(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            return args, {**kwargs, "bias": kwargs.get("bias", 0.0) + 5}

        def post_forward(self, module, output):
            return -output

    module, _ = hooked(("a", AddOne()), ("b", Bias()))
    assert torch.equal(module(X, bias=1.0), -((X + 1) * 2 + 6))


def test_default_new_forward_is_not_implemented() -> None:
    with pytest.raises(NotImplementedError, match="ModelHook does not override"):
        ModelHook().new_forward(Double(), X)


def test_an_override_finds_the_forward_that_it_replaces() -> None:
    class Twice(ModelHook):
        def new_forward(self, module, *args, **kwargs):
            return 2 * module._omni_original_forward(*args, **kwargs)

    module, registry = hooked(("a", AddOne()), ("b", Twice()))
    assert torch.equal(module(X, bias=1.0), 2 * ((X + 1) * 2 + 1))
    assert torch.equal(copy.deepcopy(module)(X), 2 * ((X + 1) * 2))
    registry.reset()
    assert not hasattr(module, "_omni_original_forward")


def test_torch_compile_follows_an_override_too() -> None:
    class Twice(ModelHook):
        def new_forward(self, module, *args, **kwargs):
            return 2 * module._omni_original_forward(*args, **kwargs)

    module, _ = hooked(("a", AddOne()), ("b", Twice()))
    assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(X), 2 * ((X + 1) * 2))


def test_an_original_that_was_exchanged_is_called() -> None:
    module, registry = hooked(("a", AddOne()))
    module._omni_original_forward = lambda x: x + 50
    assert torch.equal(module(X), X + 51)
    registry.reset()
    assert torch.equal(module(X), X * 2)


def test_a_registry_that_is_not_attached_calls_the_module() -> None:
    module = Double()
    assert torch.equal(HookRegistry(module).dispatch(X), X * 2)
    module, registry = hooked(("a", AddOne()))
    registry.reset()
    assert torch.equal(registry.dispatch(X, bias=1.0), X * 2 + 1)


def test_a_hook_may_remove_hooks_while_it_runs() -> None:
    class Once(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            HookRegistry.get_or_create(module).reset()
            return (args[0] * 3,), kwargs

    module, _ = hooked(("a", Once()), ("b", AddOne()))
    assert torch.equal(module(X), (X * 3 + 1) * 2)  # the call in progress has the hooks that it began with
    assert torch.equal(module(X), X * 2)


def test_names_of_the_package() -> None:
    for name in fxsp.hooks.__all__:
        home = "base" if hasattr(fxsp.hooks.base, name) else "sequence_parallel"
        assert getattr(fxsp.hooks, name) is getattr(getattr(fxsp.hooks, home), name)


def test_nested_modules_have_registries_of_their_own() -> None:
    log: list[str] = []
    inner, outer = Double(), nn.Sequential(Double())
    outer.append(inner)
    HookRegistry.get_or_create(outer).register_hook("outer", Trace("outer", log))
    HookRegistry.get_or_create(inner).register_hook("inner", Trace("inner", log))
    log.clear()
    assert torch.equal(outer(X), X * 4)
    assert log == ["pre outer", "pre inner", "post inner", "post outer"]


def test_context_around_the_whole_call_ends_with_an_exception_too() -> None:
    log: list[str] = []

    class Around(Trace):
        @contextmanager
        def around_forward(self, module, given_up):
            log.append("enter")
            try:
                yield
            finally:
                log.append("leave")

    module, _ = hooked(("b", Trace("b", log)), ("z", Around("z", log)))
    log.clear()
    module(X)
    assert log == ["enter", "pre b", "pre z", "post z", "post b", "leave"]
    log.clear()
    with pytest.raises(TypeError):
        module(X, unknown=1)
    assert log == ["enter", "pre b", "pre z", "leave"]


# --- registering and removing -----------------------------------------------------------------------------------------


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


# --- the module stays a module ----------------------------------------------------------------------------------------


def test_signature_is_kept() -> None:
    module, registry = hooked(("a", ModelHook()))
    assert inspect.signature(module.forward) == inspect.signature(Double().forward)
    assert list(inspect.signature(module.forward).parameters) == ["x", "bias"]
    registry.reset()
    assert inspect.signature(module.forward) == inspect.signature(Double().forward)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_are_independent(how: Any) -> None:
    module, registry = hooked(("a", AddOne()))
    twin = how(module)
    assert twin._hook_registry is not registry
    assert twin._hook_registry.module is twin
    with torch.no_grad():
        module.weight.fill_(10)
    assert torch.equal(twin(X), (X + 1) * 2)
    assert torch.equal(module(X), (X + 1) * 10)
    twin._hook_registry.reset()
    assert torch.equal(twin(X), X * 2)
    assert torch.equal(module(X), (X + 1) * 10)


def test_moved_and_cast_and_saved() -> None:
    module, _ = hooked(("a", AddOne()))
    assert list(module.state_dict()) == ["weight"]
    module.to(torch.float64)
    assert module(X.double()).dtype == torch.float64
    assert module.to("meta")(X.to("meta")).device.type == "meta"
    assert list(dict(module.named_modules())) == [""]


def test_torch_compile_sees_one_graph() -> None:
    graphs = []

    def count(gm, inputs):
        graphs.append(gm)
        return gm

    module, _ = hooked(("a", AddOne()))
    compiled = torch.compile(module, backend=count, fullgraph=True)
    assert torch.equal(compiled(X, bias=1.0), (X + 1) * 2 + 1)
    assert len(graphs) == 1


# --- state ------------------------------------------------------------------------------------------------------------


class Counter(BaseState):
    made = 0

    def __init__(self, start: int, step: int = 1) -> None:
        self.count, self.step = start, step
        self.resets = 0

    def reset(self) -> None:
        self.resets += 1


def test_states_by_context() -> None:
    manager = StateManager(Counter, (5,), {"step": 2})
    first = manager.get_state()  # without a context
    assert (first.count, first.step) == (5, 2)
    assert manager.get_state() is first
    manager.set_context("uncond")
    second = manager.get_state()
    assert second is not first
    manager.set_context("cond")
    assert manager.get_state() not in (first, second)
    manager.set_context("uncond")
    assert manager.get_state() is second
    manager.set_context(None)
    assert manager.get_state() is first


def test_state_manager_reset() -> None:
    manager = StateManager(Counter, (0,))
    manager.set_context("a")
    old = manager.get_state()
    manager.set_context("b")
    other = manager.get_state()
    manager.reset()
    assert (old.resets, other.resets) == (1, 1)
    assert manager.get_state() is not other


def test_state_manager_of_a_plain_state() -> None:
    manager = StateManager(BaseState)
    assert manager.get_state().reset() is None
    manager.set_context("x")
    assert isinstance(manager.get_state(), BaseState)


def test_state_through_a_hook() -> None:
    class Counting(ModelHook):
        def __init__(self) -> None:
            self.states = StateManager(Counter, (0,))

        def pre_forward(self, module, *args, **kwargs):
            self.states.get_state().count += 1
            return args, kwargs

        def reset_state(self, module):
            self.states.reset()
            return module

    hook = Counting()
    module, registry = hooked(("count", hook))
    module(X)
    module(X)
    assert hook.states.get_state().count == 2
    registry.reset_hook("count")
    assert hook.states.get_state().count == 0
