"""State of hooks, apart for each context."""

from __future__ import annotations

from fxsp.hooks.base import BaseState, ModelHook, StateManager
from registering import X, hooked


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
