"""Gradients that an outer reducer makes whole, whoever computes them: the convention of ``grad_reduce``.

A graph that is split leaves summands of its parameters' gradients on the ranks.  Whatever runs whole (a graph that is
not split, code between graphs, a frame that Dynamo gave up, a term that is added to the loss) leaves gradients that are
whole on every rank, and the compiler does not see all of it.  So that one reducer fits both, summands are multiplied by
the number ``P`` of ranks (:mod:`fxsp.passes.partition.defer`): the *mean* over the ranks is the gradient in either
case.

``"defer_mean"``
    leaves it at that: for DDP and FSDP2, which take the mean.
``"defer"``
    is for a reducer that sums.  What arrives at a parameter is divided by ``P``, by a hook on the parameter, since no
    one else sees everything that arrives.  It stays there: plain calls of the model leave ``1/P`` of their gradients,
    too, and the sum over the ranks is right.  A graph of another convention takes it away from its parameters.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fxsp import torch_internals

__all__ = ["Convention", "look_again", "parameters_of"]


class _Share:
    """What makes whole gradients summands, as a hook on a parameter."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, grad: Tensor) -> Tensor:
        return grad / self.size


@cache
def _share(size: int) -> Any:
    share = _Share(size)
    torch.utils.hooks.unserializable_hook(share)  # a copy that is loaded elsewhere is a parameter like any other
    return share


#: Counts changes of hooks: a graph that was compiled before the last one looks after its model's parameters again.
_changes = [0]


class Convention:
    """How gradients are left on the parameters that one compiled graph, and the model around it, have.

    ``size`` is the number of ranks whose sum is the gradient; 1: each has the whole, or the mean is taken.
    ``models`` gives the models that a module is a part of, as far as they are known by then.
    """

    def __init__(
        self,
        size: int,
        modules: Iterable[nn.Module] = (),
        models: Callable[[nn.Module], Iterable[nn.Module]] = lambda _: (),
    ) -> None:
        self.size = size
        self._models = models
        self._hook = _share(size) if size > 1 else None
        self._modules = [weakref.ref(module) for module in modules]
        self._seen = -1

    def hold(self) -> None:
        """Have it hold for all parameters of the modules, unless nothing has changed."""
        if self._seen == _changes[0]:
            return
        own = [module for ref in self._modules if (module := ref()) is not None]
        self.apply(parameters_of([*own, *(model for module in own for model in self._models(module))]))
        self._seen = _changes[0]

    def apply(self, parameters: Iterable[Any]) -> None:
        """Have it hold for parameters, from now on; for what requires no gradient there is nothing to do."""
        if self._hook is None and not _changes[0]:
            return  # who never defers pays nothing
        if self._hook is not None:
            torch_internals.when_gathered(_follow)
        for parameter in parameters:
            if parameter.requires_grad and parameter.is_leaf:
                self._set(parameter)

    def _set(self, parameter: Tensor) -> None:
        hooks = torch_internals.gradient_hooks(parameter)
        found = {key: hook for key, hook in hooks.items() if isinstance(hook, _Share)}
        if list(found.values()) == ([] if self._hook is None else [self._hook]):
            return
        _changes[0] += 1
        for key in found:
            del hooks[key]
        if self._hook is not None:
            parameter.register_hook(self._hook)
            # Before the user's own, which get what they would get without it: this rank's summand.
            hooks = torch_internals.gradient_hooks(parameter)
            *others, ours = hooks.items()
            hooks.clear()  # not moved: autograd does not see the order of an OrderedDict
            hooks.update([ours, *others])

    def holding(self, run: Callable[..., Any], inputs: Sequence[Any]) -> Callable[..., Any]:
        """``run``, but the parameters among its inputs follow it: a graph may be called with those of another block."""
        positions = [i for i, x in enumerate(inputs) if isinstance(x, nn.Parameter) and x.requires_grad]
        self.hold()
        self.apply(inputs[i] for i in positions)
        self._seen = _changes[0]

        def held(*args: Any) -> Any:
            if torch.is_grad_enabled():
                self.hold()
                self.apply(args[i] for i in positions)
            return run(*args)

        return held


def look_again() -> None:
    """Have all conventions look for the parameters of their models again: modules were found that belong to them."""
    if _changes[0]:
        _changes[0] += 1


def _follow(sharded: Tensor, gathered: Tensor) -> None:
    """What FSDP2 gathers for the first time follows what it keeps: the hook must be where gradients arrive."""
    for hook in torch_internals.gradient_hooks(sharded).values():
        if isinstance(hook, _Share):
            Convention(hook.size).apply([gathered])


def parameters_of(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """All parameters of modules, each once; those that FSDP gathers, and those that it keeps, are two."""
    seen: set[int] = set()
    for module in modules:
        for part in module.modules():
            if id(part) in seen:
                continue
            seen.add(id(part))
            yield from part.parameters(recurse=False)
            yield from torch_internals.gathered_parameters(part)
