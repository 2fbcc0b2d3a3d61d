"""The call of a module with hooks: order, override, contexts; and the module stays a module: signatures, copies."""

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
from fxsp.hooks.base import HookRegistry, ModelHook
from registering import AddOne, Double, Override, Trace, X, hooked

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
        modules = (fxsp.hooks.base, fxsp.hooks.sequence_parallel, fxsp.hooks.sp_plan)
        home = next(module for module in modules if hasattr(module, name))
        assert getattr(fxsp.hooks, name) is getattr(home, name)


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
