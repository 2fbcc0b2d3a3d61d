"""Hooks around a module's ``forward``: a registry per module, with the API of ``vllm_omni.diffusion.hooks``.

One call of a module with hooks ``a``, ``b`` and ``c``, of which ``b`` overrides ``new_forward``::

    a.pre_forward, c.pre_forward, b.pre_forward        by name; the one that overrides comes last
    b.new_forward                                      instead of the module's own forward
    b.post_forward, c.post_forward, a.post_forward     the same order, reversed

All state lives in the module (attribute ``_hook_registry``) and in its hooks: models and threads share nothing, and a
module with hooks can be deep-copied, pickled and moved like any other.  A hook that overrides ``new_forward`` finds the
forward that it replaces at ``module._omni_original_forward``, as in vLLM-Omni.
"""

from __future__ import annotations

import functools
import inspect
import types
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from fxsp.backend import left_to_hooks
from fxsp.errors import FxspWarning
from fxsp.torch_internals import only_inlined, set_compiler

__all__ = ["BaseState", "HookRegistry", "ModelHook", "StateManager", "module_has_active_hooks"]


def module_has_active_hooks(module: nn.Module) -> bool:
    """Whether calls of the module itself go through hooks; those of its children do not count."""
    registry = module.__dict__.get("_hook_registry")
    return registry is not None and bool(registry.names)


class BaseState:
    """What a hook remembers between calls; subclasses hold the data."""

    def reset(self) -> None:
        """Forget everything."""


class StateManager:
    """A state per context (for example one for each branch of classifier-free guidance), made when first asked for.

    ``state_cls(*init_args, **init_kwargs)`` makes a state.  Without :meth:`set_context` there is one context.
    """

    _DEFAULT = "default"

    def __init__(
        self,
        state_cls: Callable[..., BaseState],
        init_args: tuple[Any, ...] = (),
        init_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self._state_cls = state_cls
        self._init_args = tuple(init_args)
        self._init_kwargs = dict(init_kwargs or {})
        self._states: dict[str, BaseState] = {}
        self._context = self._DEFAULT

    def set_context(self, name: str | None) -> None:
        """Choose the context whose state :meth:`get_state` returns; None or ``""``: the one that needs no name."""
        self._context = name or self._DEFAULT

    def get_state(self) -> BaseState:
        """The state of the current context."""
        if self._context not in self._states:
            self._states[self._context] = self._state_cls(*self._init_args, **self._init_kwargs)
        return self._states[self._context]

    def reset(self) -> None:
        """Reset the states of all contexts, and drop them."""
        for state in self._states.values():
            state.reset()
        self._states.clear()


class ModelHook:
    """What is done around a module's forward; every method has a default that changes nothing."""

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """Called once, when the hook is registered; an exception here means that it is not."""
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments that forward, and the hooks after this one, are called with."""
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """The output that the hooks before this one, and the caller, get."""
        return output

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Called instead of the module's forward (``module._omni_original_forward``), if a subclass overrides it.

        One hook of a module may.
        """
        raise NotImplementedError(f"{type(self).__name__} does not override new_forward")

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Forget what was remembered of earlier calls."""
        return module

    def around_forward(self, module: nn.Module, given_up: bool) -> AbstractContextManager[Any]:
        """A context for the whole call, all hooks included; entered only if a subclass overrides it.

        Such a module is compiled as one graph, or not at all.  ``given_up``: a compiler had the call, and left it to
        run eagerly (a graph break, the recompile limit).
        """
        raise NotImplementedError(f"{type(self).__name__} does not override around_forward")


def _overrides(hook: ModelHook, method: str) -> bool:
    return getattr(type(hook), method) is not getattr(ModelHook, method)


class _Forward(functools.partial):  # type: ignore[type-arg]
    """What ``module.forward`` is while the module has a registry; its signature is that of the original."""

    @property
    def __signature__(self) -> inspect.Signature:
        module = self.args[0]
        original = module._omni_original_forward
        own = isinstance(original, _Original)
        return inspect.signature(type(module).forward.__get__(module) if own else original)

    @classmethod
    def of(cls, module: nn.Module) -> _Forward:
        """For Dynamo every module has code of its own: its limit of recompilations is one per code object."""
        code = _forward.__code__.replace()
        return cls(types.FunctionType(code, _forward.__globals__, type(module).__name__), module)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Forward.of, self.args


def _method(module: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
    """What a method is that :meth:`HookRegistry.wrap_method` has wrapped."""
    registry: Any = module.__dict__.get("_hook_registry")
    for hook in () if registry is None else registry._sorted_hooks:
        args, kwargs = hook.pre_forward(module, *args, **kwargs)
    own = module.__dict__.get(f"_omni_original_{name}")
    return (getattr(type(module), name).__get__(module) if own is None else own)(*args, **kwargs)


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module._hook_registry.dispatch(*args, **kwargs)  # type: ignore[union-attr, operator]


class _Original:
    """The forward of a module's class, bound (a bound method cannot be pickled under every name)."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        # Looked up here: Dynamo takes some classes of diffusers for operators, and finds no attributes in them.
        self.function: Callable[..., Any] = type(module).forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.module, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Original, (self.module,)


class HookRegistry:
    """The hooks of one module, by name.

    ``HookRegistry.get_or_create(module)`` gives the module's own; from then on calls of the module go through it.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._hooks: dict[str, ModelHook] = {}
        self._sorted_hooks: list[ModelHook] = []
        self._around: list[ModelHook] = []
        self._override: ModelHook | None = None
        #: Whether ``forward`` was an attribute of the instance.
        self._was_attribute = False
        #: Other methods that hooks see.
        self._wrapped_methods: list[str] = []

    @classmethod
    def get_or_create(cls, module: nn.Module) -> HookRegistry:
        """The module's registry; a new one if it has none."""
        registry = module.__dict__.get("_hook_registry")
        if registry is None:
            registry = cls(module)
            registry._attach()
        return registry

    #: vLLM-Omni's name for it.
    check_if_exists_or_initialize = get_or_create

    # --- hooks

    def register_hook(self, name: str, hook: ModelHook) -> None:
        """Add ``hook``; one that is already there under this name is replaced, with a warning.

        Raises ``RuntimeError`` if another hook overrides ``new_forward`` too, or if the module has another registry;
        the registry is then as it was, as it is when the hook cannot be initialized.
        """
        old = self._hooks.get(name)
        if _overrides(hook, "new_forward") and self._override is not None and self._override is not old:
            other = next(key for key, value in self._hooks.items() if value is self._override)
            raise RuntimeError(
                f"hook {name!r} ({type(hook).__name__}) overrides new_forward, and so does {other!r} "
                f"({type(self._override).__name__}) of this {type(self.module).__name__}; a module can have one such "
                "hook. Remove the other one first."
            )
        attached = self.module.__dict__.get("_hook_registry")
        if attached is not None and attached is not self:
            raise RuntimeError(f"this {type(self.module).__name__} has a registry: use HookRegistry.get_or_create")
        hook.initialize_hook(self.module)
        if old is not None:
            warnings.warn(FxspWarning(f"hook {name!r} is already registered; it is replaced"), stacklevel=2)
        self._hooks[name] = hook
        self.update_sorted_hooks()
        if attached is None:
            self._attach()

    def remove_hook(self, name: str) -> None:
        """Remove a hook; nothing happens if there is none of this name."""
        if self._hooks.pop(name, None) is not None:
            self.update_sorted_hooks()

    def get_hook(self, name: str) -> ModelHook | None:
        """The hook of this name, or None."""
        return self._hooks.get(name)

    @property
    def names(self) -> list[str]:
        """The names of all hooks, sorted."""
        return sorted(self._hooks)

    def reset_hook(self, name: str) -> None:
        """Reset the state of a hook; nothing happens if there is none of this name."""
        hook = self._hooks.get(name)
        if hook is not None:
            hook.reset_state(self.module)

    def reset(self) -> None:
        """Reset the state of every hook, remove them all, and give the module its original methods back."""
        for hook in self._sorted_hooks:
            hook.reset_state(self.module)
        self._hooks.clear()
        self.update_sorted_hooks()
        self.unwrap_all_methods()
        self._detach()

    def update_sorted_hooks(self) -> None:
        """Bring the hooks into calling order; called whenever one comes or goes."""
        hooks = [self._hooks[name] for name in sorted(self._hooks)]
        self._override = next((hook for hook in hooks if _overrides(hook, "new_forward")), None)
        self._around = [hook for hook in hooks if _overrides(hook, "around_forward")]
        self._sorted_hooks = [hook for hook in hooks if hook is not self._override]
        if self._override is not None:
            self._sorted_hooks.append(self._override)

    # --- the call (what Dynamo cannot trace as one graph from `forward` on is run eagerly, not tried level by level)

    @only_inlined
    def dispatch(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module's forward through its hooks."""
        if not self._around:
            return self._call(args, kwargs)
        if torch.compiler.is_compiling():
            return self._within(0, False, args, kwargs)
        # Before anything else: the frames of the hooks would be compiled one by one, and take themselves for traced.
        before = set_compiler(None)
        try:
            if before and torch.is_grad_enabled():
                left_to_hooks(before, self.module)
            return self._within(0, before is not None, args, kwargs)
        finally:
            set_compiler(before)

    @only_inlined
    def _within(self, level: int, given_up: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if level == len(self._around):
            return self._call(args, kwargs)
        with self._around[level].around_forward(self.module, given_up):
            return self._within(level + 1, given_up, args, kwargs)

    @only_inlined
    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hooks, module = self._sorted_hooks, self.module
        for hook in hooks:
            args, kwargs = hook.pre_forward(module, *args, **kwargs)
        if self._override is not None:
            output = self._override.new_forward(module, *args, **kwargs)
        else:  # a registry that is not attached (any more) has nothing to go around
            original: Any = getattr(module, "_omni_original_forward", None)
            if original is None:
                output = module.forward(*args, **kwargs)
            elif isinstance(original, _Original):  # what it would call
                output = original.function(module, *args, **kwargs)
            else:
                output = original(*args, **kwargs)
        for hook in reversed(hooks):
            output = hook.post_forward(module, output)
        return output

    # --- other methods

    def wrap_method(self, method_name: str) -> None:
        """From now on calls of this method, too, go through the ``pre_forward`` of all hooks (offloading, say)."""
        if method_name in self._wrapped_methods:
            return
        method, own = getattr(self.module, method_name), self.module.__dict__.get(method_name)
        if own is not None:
            setattr(self.module, f"_omni_original_{method_name}", own)
        wrapped = functools.partial(_method, self.module, method_name)
        wrapped.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]
        setattr(self.module, method_name, wrapped)
        self._wrapped_methods.append(method_name)

    def unwrap_method(self, method_name: str) -> None:
        """The method as it was; nothing happens if it is not wrapped."""
        if method_name not in self._wrapped_methods:
            return
        self._wrapped_methods.remove(method_name)
        own = self.module.__dict__.pop(f"_omni_original_{method_name}", None)
        if own is None:
            delattr(self.module, method_name)
        else:
            setattr(self.module, method_name, own)

    def unwrap_all_methods(self) -> None:
        """All methods as they were."""
        for name in list(self._wrapped_methods):
            self.unwrap_method(name)

    # --- the module's forward

    def _attach(self) -> None:
        module, own = self.module, self.module.__dict__.get("forward")
        self._was_attribute = own is not None
        module._omni_original_forward = _Original(module) if own is None else own  # type: ignore[assignment]
        module._hook_registry = self  # type: ignore[assignment]
        module.forward = _Forward.of(module)

    def _detach(self) -> None:
        module = self.module
        if not isinstance(module.__dict__.get("forward"), _Forward):
            return  # somebody wrapped it after us: what they hold goes on to the original, as there are no hooks left
        if self._was_attribute:
            module.forward = module._omni_original_forward  # type: ignore[assignment]
        else:
            del module.forward
        del module._hook_registry
        del module._omni_original_forward
