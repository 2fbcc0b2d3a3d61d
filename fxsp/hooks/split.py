"""The hooks that split and gather, and the one around the model that knows whether it runs eagerly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fxsp.capture.resolve import unwrap
from fxsp.hooks.base import ModelHook
from fxsp.hooks.dispatch import SplitMode, gather, shard
from fxsp.hooks.layout import Layout, layout_of, local_size
from fxsp.hooks.region import Region
from fxsp.hooks.tracing import sp_is_tracing
from fxsp.hooks.values import ModuleForwardMetadata, made_whole, put_back, token_count, values_of
from fxsp.plan import PlanEntry, SequenceParallelConfig, refuse
from fxsp.torch_internals import in_backward

__all__ = [
    "SequenceParallelGatherHook",
    "SequenceParallelRootHook",
    "SequenceParallelSplitHook",
]


class _RegionHook(ModelHook):
    """What the hooks of one plan share: ``region``; a hook that is registered by itself has one of its own."""

    def __init__(self, metadata: Any, config: SequenceParallelConfig | None, region: Region | None = None) -> None:
        self.metadata = metadata
        self.module_forward_metadata: Any = None
        self.region = Region(config, alone=True) if region is None else region
        #: Whether the last call in a forward pass split; a recomputation in the backward pass does the same.
        self._acted = False

    @property
    def config(self) -> SequenceParallelConfig | None:
        """The degrees of attention."""
        return self.region.config

    def around_forward(self, module: nn.Module, given_up: bool) -> AbstractContextManager[Any]:
        """Within the model the mode is there already; a checkpoint calls the module by itself once more."""
        if torch.compiler.is_compiling() or self.region.running or not self._acts(module):
            return nullcontext()
        return SplitMode()

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        self.module_forward_metadata = ModuleForwardMetadata(_cls=type(unwrap(module)))
        self.module_forward_metadata._look_up()  # now: Dynamo does not follow `inspect`
        return module

    def _acts(self, module: nn.Module) -> bool:
        """Whether the hook is to do its work in this call."""
        region = self.region
        if not torch.compiler.is_compiling():
            region.resolve()
        if region.size == 1:
            return False
        if torch.compiler.is_compiling():
            if sp_is_tracing():
                return False
            if region.alone:
                raise RuntimeError("torch.compile needs hooks that are attached by apply_sequence_parallel")
            return True
        if region.alone or region.running:
            self._acted = True
        elif not in_backward():
            # A part of a model that backend "sp" compiles, or of one that is not called as a whole: whole values.
            self._acted = False
            aside = "hooks of the plan stand aside, the model's own call is not under hooks"
            region.note(f"{type(module).__name__}: {aside}")
        return self._acted

    def _counts(self, names: Iterable[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, int]:
        """The text tokens that the module's own arguments tell, else those of the model."""
        found: dict[str, int] = {}
        for name in names:
            place = self.module_forward_metadata.cached_parameter_indices.get(name, len(args))
            count = token_count(kwargs.get(name, args[place] if place < len(args) else None))
            count = self.region.call.lengths.get(name) if count is None else count
            if count is not None:
                found[name] = count
        return found


class SequenceParallelSplitHook(_RegionHook):
    """Splits arguments before forward, and outputs with ``split_output=True`` after it.

    ``metadata`` maps names of arguments, or indices of outputs, to specs (or to lists of them, for arguments that are
    lists or tuples).  What was left out, is None or has not ``expected_dims`` dimensions stays as it is.
    """

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not self._acts(module):
            return args, kwargs
        for group in groups_of(self.metadata.values()):  # another call of the module may have another length
            self.region.call.of_group.pop(group, None)
        values = list(args)
        lengths = self._counts(needs_lengths(self.metadata.values()), args, kwargs)
        for name, spec in self.metadata.items():
            if isinstance(name, int):
                continue
            value, is_kwarg, index = self.module_forward_metadata._get_parameter_from_args_kwargs(name, args, kwargs)
            if value is None:
                continue
            new = self._split_argument(name, value, spec, lengths)
            if is_kwarg:
                kwargs[name] = new
            else:
                assert index is not None
                values[index] = new
        self.region.call.of_hook[id(self)] = lengths
        return tuple(values), kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        specs = {index: spec for index, spec in self.metadata.items() if isinstance(index, int)}
        if not specs or not self._acts(module):
            return output
        lengths = self.region.call.of_hook.pop(id(self), {})
        values = values_of(output)
        for index, spec in specs.items():
            label = f"output {index} of {type(module).__name__}: {spec!r}"
            if index >= len(values):
                raise refuse(label, f"the module returns {len(values)} value(s)")
            if isinstance(values[index], Tensor):
                values[index] = self._split(label, values[index], spec, lengths)
        return put_back(output, values)

    def _split_argument(self, name: str, value: Any, spec: Any, lengths: Mapping[str, int]) -> Any:
        label = f"[{name}]: {spec!r}"
        if isinstance(value, Tensor):
            if isinstance(spec, (list, tuple)):
                raise refuse(label, f'"{name}" is a tensor, not a tuple; give one spec instead of a list')
            return self._split(label, value, spec, lengths)
        if not isinstance(value, (list, tuple)):
            raise refuse(label, f'"{name}" is of type {type(value).__name__}, which cannot be split')
        if not isinstance(spec, (list, tuple)):
            raise refuse(
                label, f'"{name}" is a {type(value).__name__} of {len(value)} values; give a list of {len(value)} specs'
            )
        if len(value) != len(spec):
            raise refuse(label, f'"{name}" has {len(value)} values, and the plan lists {len(spec)} specs for it')
        items = [
            self._split(label, x, s, lengths) if isinstance(x, Tensor) and s is not None else x
            for x, s in zip(value, spec, strict=True)
        ]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)

    def _split(self, label: str, x: Tensor, spec: Any, lengths: Mapping[str, int]) -> Tensor:
        if spec.expected_dims is not None and x.dim() != spec.expected_dims:
            return x
        if not -x.dim() <= spec.split_dim < x.dim():
            raise refuse(
                label, f"dimension {spec.split_dim} is out of range: the tensor {list(x.shape)} is {x.dim()}-D"
            )
        dim = spec.split_dim % x.dim()
        present = layout_of(x)
        if present is not None:
            if present.dim != dim:
                raise refuse(label, f"the value is split already, along dimension {present.dim}")
        size = sum(present.lengths) if present is not None else x.shape[dim]
        self._check_group(label, spec, size)
        if present is not None:
            return x
        text = 0
        if hasattr(spec, "text_len_source"):
            source = spec.text_len_source
            if isinstance(source, str) and source not in lengths:
                self.region.note(f"{label}: not applied, {source!r} is not passed")
                return x
            text = lengths[source] if isinstance(source, str) else source
        if size <= text:  # nothing is left to split
            return x
        region = self.region
        lengths_, whole = ((text, size - text), (True, False)) if text else ((size,), (False,))
        layout = Layout(dim, lengths_, whole, region)
        region.call.saw(sum(lengths_), local_size(layout))
        return shard(x, layout)

    def _check_group(self, label: str, spec: Any, size: int) -> None:
        """What is split together has one length."""
        group = getattr(spec, "shard_group", None)
        if group is None:
            return
        known = self.region.call.of_group.setdefault(group, size)
        if known != size:
            raise refuse(
                label,
                f"the values of shard_group={group!r} must have the same global sequence length, and these have "
                f"{known} and {size} tokens",
            )


class SequenceParallelGatherHook(_RegionHook):
    """Makes outputs whole again: pads are dropped, and the tokens are in their global order on every rank.

    ``metadata`` is the spec of the only output, or a list with one for each output (None leaves it as it is).  The
    gradient of a gathered value is the one that every rank has.
    """

    def __init__(self, metadata: Any, config: SequenceParallelConfig | None, region: Region | None = None) -> None:
        self._only = not isinstance(metadata, (list, tuple))
        super().__init__([metadata] if self._only else list(metadata), config, region)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        if not self._acts(module):
            return output
        values = values_of(output)
        label = f"{type(module).__name__}: {self.metadata!r}"
        present = [i for i, value in enumerate(values) if value is not None]
        if self._only and len(present) != 1:
            raise refuse(label, f"the module returns {len(present)} values; give a list of specs")
        places = present if self._only else range(len(self.metadata))
        for index, spec in zip(places, self.metadata, strict=True):
            if spec is None:
                continue
            if index >= len(values):
                raise refuse(label, f"there is no output {index}; the module returns {len(values)}")
            if isinstance(values[index], Tensor):
                values[index] = self._gather(label, values[index], spec)
        return put_back(output, values)

    def _gather(self, label: str, x: Tensor, spec: Any) -> Tensor:
        if spec.expected_dims is not None and x.dim() != spec.expected_dims:
            return x
        if not -x.dim() <= spec.gather_dim < x.dim():
            raise refuse(label, f"dimension {spec.gather_dim} is out of range: the tensor is {x.dim()}-D")
        group = getattr(spec, "shard_group", None)
        if group is not None and not self.region.alone and group not in self.region.call.of_group:
            raise RuntimeError(f"`{label}`: nothing was split for shard_group={group!r} in this call of the model")
        layout = layout_of(x)
        if layout is None:
            if self.region.call.looks_local(x.shape[spec.gather_dim % x.dim()]):
                raise RuntimeError(
                    f"`{label}`: the output has the local length {x.shape[spec.gather_dim]}, but it came out of code "
                    "that hooks cannot see (a C++ extension, numpy): which tokens it holds is not known"
                )
            return x
        return gather(x, layout, used=False)


class SequenceParallelRootHook(_RegionHook):
    """Around the model: what is split in its output becomes whole, whatever the plan says of it.

    ``metadata`` has the names of the model's arguments that some ``text_len_source`` of the plan may mean.
    """

    #: The plan that was applied, for compilers.
    plan: tuple[PlanEntry, ...] = ()

    def around_forward(self, module: nn.Module, given_up: bool) -> AbstractContextManager[Any]:
        compiling = torch.compiler.is_compiling()
        if not compiling:
            self.region.resolve()
        if not self._acts(module):
            return nullcontext()
        # If a compiler gave up on the model, it does not try its parts.
        return _split_mode(nullcontext() if compiling else self.region.calling(given_up))

    def _acts(self, module: nn.Module) -> bool:
        # Asked first: what is said of it, is said of one rank, too.
        return not (torch.compiler.is_compiling() and sp_is_tracing()) and self.region.size > 1

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._acts(module):
            if torch.compiler.is_compiling():
                self.region.trace()
            self.region.call.lengths.update(self._counts(self.metadata, args, kwargs))
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        if not self._acts(module):
            return output
        if torch.compiler.is_compiling():
            self.region.trace()
        return made_whole(output)


@contextmanager
def _split_mode(call: AbstractContextManager[Any]) -> Iterator[None]:
    """A :class:`SplitMode` that Dynamo does not break a graph in: what it cannot trace as one runs eagerly.

    (It would enter the mode for real at the break, around operators that the rules were applied to already.)
    """
    with call, SplitMode():
        yield


def groups_of(specs: Iterable[Any]) -> set[str]:
    """The shard groups of specs and lists of them."""
    every = [one for spec in specs for one in (spec if isinstance(spec, (list, tuple)) else [spec])]
    return {group for one in every if (group := getattr(one, "shard_group", None)) is not None}


def needs_lengths(specs: Iterable[Any]) -> list[str]:
    """The arguments that tell a number of text tokens, by specs and lists of them."""
    every = [one for spec in specs for one in (spec if isinstance(spec, (list, tuple)) else [spec])]
    sources = [getattr(one, "text_len_source", None) for one in every]
    return [source for source in dict.fromkeys(sources) if isinstance(source, str)]
