"""The interpreter behind *normalize*: walks Dynamo's graph node by node while ``make_fx`` listens.

What is not simply run:

* Grad mode.  Instead of a marker that makes the meaning of a node depend on its place, a value that requires grad is
  detached where it enters a ``no_grad`` region.  The region's values then depend on nothing that requires grad, and
  nodes may be moved, shared and added freely.
* Autocast.  Casts become explicit, see :mod:`fxsp.passes.normalize.autocast`.
* Activation checkpoints.  The body is traced in place, its nodes tagged as AOTAutograd's partitioner wants them.
* Memory.  An input that is given other memory (``p.data = x``, as offloading does) is ``x`` from there on; ``set_`` is
  done once, at the end.
* Islands, see :mod:`fxsp.passes.normalize.islands`.
* Constants of the graph module, which become attributes of the new one.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from fxsp import torch_internals
from fxsp.errors import UnsupportedError
from fxsp.kernels.ops import fxsp_ops
from fxsp.passes.graph import facts, mark
from fxsp.passes.normalize.autocast import AutocastState
from fxsp.passes.normalize.checkpoint import tag_checkpoint
from fxsp.passes.normalize.islands import INLINED, enclose_functorch, is_functorch_island
from fxsp.passes.normalize.subclasses import holds_subclass, refuse_custom_functions
from fxsp.source import describe

__all__ = ["Retracer", "describe", "is_annotation"]


def is_annotation(target: Any) -> bool:
    """Whether a node's target is ``fxsp.annotate``: an identity, the plan's marker."""
    return target is fxsp_ops.annotate.default


class _State:
    """What the interpreter of a graph shares with those of the bodies in it."""

    def __init__(self, mode: Any, autocast: AutocastState) -> None:
        self.mode = mode
        self.autocast = autocast
        #: Grad mode at this point of Dynamo's graph; the trace itself runs in the mode it began in.
        self.grad = self.ambient_grad = torch.is_grad_enabled()
        self.constants: dict[int, torch.Tensor] = {}
        #: An annotation stands for its argument: storage of its result -> storage of the argument.
        self.stands_for: dict[int, int] = {}
        self.alive: list[Any] = []
        #: What interprets the graph itself, and no body in it.
        self.outermost: Retracer | None = None
        #: A call that gave an input other memory -> the input; an input -> its value, and that with the memory it gets.
        self.sets: dict[torch.fx.Node, torch.fx.Node] = {}
        self.memory: dict[torch.fx.Node, tuple[torch.Tensor, torch.Tensor]] = {}
        #: Whether a kernel was asked for: then what attention returns may lie in memory otherwise than here.
        self.kernel_chosen = False
        #: Numbers that increase in program order: the partitioner compares them.
        self.checkpoints = itertools.count(1)

    @property
    def no_grad(self) -> bool:
        """Whether this is a region that takes grad mode away."""
        return self.ambient_grad and not self.grad


class _InAutocast(torch.nn.Module):
    """A callable with the autocast context it is called in: islands are not opened, so their casts stay implicit."""

    def __init__(self, target: Any, states: list[tuple[str, torch.dtype]]) -> None:
        super().__init__()
        self.target = target
        self.states = states

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for device, dtype in self.states:
                stack.enter_context(torch.autocast(device, dtype, cache_enabled=False))
            return self.target(*args, **kwargs)


class Retracer(torch.fx.Interpreter):
    """Runs ``gm`` inside :func:`fxsp.torch_internals.retrace`; failures are :class:`UnsupportedError`."""

    def __init__(
        self,
        gm: torch.fx.GraphModule,
        mode: Any,
        autocast: AutocastState,
        *,
        spelled: bool = False,
        _state: _State | None = None,
    ) -> None:
        super().__init__(gm)
        self._spelled = spelled
        self.extra_traceback = False
        self.state = _state or _State(mode, autocast)
        self.state.outermost = self.state.outermost or self
        self._node: torch.fx.Node | None = None

    def run_node(self, n: torch.fx.Node) -> Any:
        self._node = n
        try:
            result = super().run_node(n)
            if self._spelled and isinstance(result, torch.Tensor):
                made = torch_internals.node_of(result)
                if made is not None:
                    mark(made, spelled=(*facts(made).spelled, n))
            return result
        except UnsupportedError:
            raise
        except Exception as error:
            raise UnsupportedError(
                f"{describe(n)} cannot be traced to ATen operators: {type(error).__name__}: {error}"
            ) from error

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in self.state.constants:
            with torch_internals.untraced():
                fake = torch_internals.to_fake(value, self.state.mode)
            self.state.constants[id(value)] = torch_internals.record_constant(str(target), value, fake)
        return self.state.constants[id(value)]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if torch_internals.is_set_grad(target):
            self.state.grad = bool(args[0])
            return None
        if torch_internals.is_enter_inference_mode(target):
            before, self.state.grad = self.state.grad, self.state.grad and not args[0]
            return before
        if torch_internals.is_exit_inference_mode(target):
            self.state.grad = args[0]
            return None
        if torch_internals.is_attention_preference(target) or torch_internals.is_hook_switch(target):
            # Kernels that compute the same; what saved tensors may do.
            self.state.kernel_chosen |= torch_internals.is_attention_preference(target)
            return None
        if torch_internals.is_version_change(target):
            return args[0]
        if torch_internals.is_set_storage(target):
            return self._set_storage(args, kwargs)
        if torch_internals.is_data_attribute(target):
            return self._run(lambda _, args, __: args[0].detach(), target, args, kwargs)
        if torch_internals.is_enter_autocast(target):
            return self.state.autocast.enter(*args)
        if torch_internals.is_exit_autocast(target):
            return self.state.autocast.leave(*args)
        if torch_internals.is_higher_order(target):
            name = target.name()
            if is_functorch_island(args):
                return self._island(target, args, kwargs, "functorch transform", "functorch")
            if name in INLINED:
                return self._inline(name, args, kwargs)
            return self._island(target, args, kwargs, f"higher-order operator {name}", name)
        # An annotation stands for its argument wherever it is written: a region without grad may come first.
        run = super().call_function if is_annotation(target) else functools.partial(self._run, super().call_function)
        result = run(target, args, kwargs)
        if result is None and not _may_return_nothing(target):
            raise UnsupportedError(f"{describe(self._node)} changes a state that the traced operators depend on")
        if is_annotation(target):
            self.state.stands_for[torch_internals.storage_key(result)] = self.storage_of(args[0])
            self.state.alive.append(result)
        return result

    def storage_of(self, value: torch.Tensor) -> int:
        """A key of a value's storage; annotations have that of their argument."""
        key = torch_internals.storage_key(value)
        return self.state.stands_for.get(key, key)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        if torch_internals.is_set_storage(target):
            return self._set_storage(args, kwargs)
        if target == "view" and self.state.kernel_chosen and not any(isinstance(a, torch.dtype) for a in args):
            target = "reshape"  # a view of what the chosen kernel returns, and maybe not of what this one does
        return self._run(super().call_method, target, args, kwargs)

    def _run(self, call: Any, target: Any, args: Any, kwargs: Any) -> Any:
        """Run one operation, in grad mode as the graph has it."""
        with self._grad_mode(args, kwargs) as (args, kwargs):
            result = call(target, args, kwargs)
        if not self.state.no_grad and holds_subclass((args, kwargs)):
            refuse_custom_functions(result, describe(self._node))
        return result

    @contextlib.contextmanager
    def _grad_mode(self, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
        """The arguments, in a region without grad detached from what requires it; writes to that are refused."""
        if not self.state.no_grad:
            yield args, kwargs
            return
        outside = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.requires_grad]
        versions = [torch_internals.version(x) for x in outside]
        yield tree_map_only(torch.Tensor, lambda x: x.detach() if x.requires_grad else x, (args, kwargs))
        if versions != [torch_internals.version(x) for x in outside]:
            raise UnsupportedError(
                f"{describe(self._node)} writes, inside torch.no_grad(), to a tensor that requires grad; "
                "write to a detached copy of it, or do it outside of the compiled function"
            )

    def _set_storage(self, args: Any, kwargs: Any) -> torch.Tensor:
        """An input that gets other memory (``p.data = x``) is ``x`` from here on; it gets it when all else is done."""
        assert self._node is not None
        variable: Any = self._node.args[0]
        variable = self.state.sets.get(variable, variable)
        if not isinstance(variable, torch.fx.Node) or variable.op != "placeholder" or self.state.outermost is not self:
            raise UnsupportedError(f"{describe(self._node)} gives a tensor that is no input of the graph other memory")
        if len(args) != 2 or kwargs or not isinstance(args[1], torch.Tensor) or args[1].requires_grad:
            raise UnsupportedError(f"{describe(self._node)} gives a tensor other memory in a way that is not known")
        old, new = args
        if old.requires_grad and self.state.ambient_grad:
            raise UnsupportedError(f"{describe(self._node)} gives a tensor that requires grad other memory")
        for node, value in self.env.items():
            if value is old:
                self.env[node] = new
        self.state.sets[self._node] = variable
        self.state.memory.setdefault(variable, (old, new))
        self.state.memory[variable] = (self.state.memory[variable][0], new)
        return new  # type: ignore[no-any-return]

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        if self.state.outermost is self:
            for value, memory in self.state.memory.values():
                set_ = torch.ops.aten.set_.source_Tensor
                torch_internals.record_call(set_, (value, memory), {}, None, name="set_")
        return super().output(target, args, kwargs)

    def _inline(self, name: str, args: Any, kwargs: Any) -> Any:
        body, *inputs = args
        number = None
        if name == "invoke_subgraph":
            inputs = inputs[1:]  # the first is an identifier
        if name == "tag_activation_checkpoint":
            number = next(self.state.checkpoints)
            kwargs = torch_internals.checkpoint_arguments(kwargs)
        if kwargs:
            raise UnsupportedError(f"{describe(self._node)} has keyword arguments: {', '.join(kwargs)}")
        graph = torch_internals.traced_graph()
        count = len(graph.nodes)
        body = enclose_functorch(body)
        again = Retracer(body, self.state.mode, self.state.autocast, spelled=self._spelled, _state=self.state)
        result = again.run(*inputs)
        if number is not None:
            tag_checkpoint(body, reversed(list(graph.nodes)[count:]), number)
        return result

    def _island(self, target: Any, args: Any, kwargs: Any, reason: str, name: str) -> Any:
        if states := self.state.autocast.active():
            args, target = (_InAutocast(target, states), *args), torch_internals.wrap_operator()
        with self._grad_mode(args, kwargs) as (args, kwargs):
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            versions = [torch_internals.version(x) for x in inputs]
            with torch_internals.untraced(), torch_internals.functorch_levels():
                result = target(*args, **kwargs)
            if versions != [torch_internals.version(x) for x in inputs]:
                raise UnsupportedError(f"{describe(self._node)} ({reason}) writes to its arguments")
        mark(torch_internals.record_call(target, args, kwargs, result, name=name), island=reason)
        return result


def _may_return_nothing(target: Any) -> bool:
    """Writes to tensors, which are in the trace, checks, and reading a result that an operator did not compute."""
    name = getattr(target, "__name__", "")
    if torch_internals.is_operator(target) or torch_internals.is_functorch(target) or target is operator.getitem:
        return True
    return name in ("setitem", "delitem", "_log_api_usage_once") or name.startswith(("_check", "_assert"))
