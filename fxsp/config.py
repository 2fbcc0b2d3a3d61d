"""The backend's options, parsed and checked once, and the ranks that a program is split over.

``torch.compile(model, backend="sp", options={...})`` hands its dictionary to :meth:`Options.parse`; whatever is unknown
or impossible becomes an :class:`~fxsp.errors.OptionError` that lists what is valid.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from fxsp.errors import OptionError, UnshardedWarning
from fxsp.machine import Machine, machine_of, read_machine
from fxsp.plan import PlanEntry, SequenceParallelConfig, did_you_mean, listing, parse_plan
from fxsp.process_groups import missing_group, ranks_of
from fxsp.source import warn
from fxsp.torch_internals import inductor_modes
from fxsp.types import Ranks

__all__ = ["INNERS", "AttentionDegrees", "Options", "resolve_degrees", "resolve_ranks"]

#: What compiles the partitioned graph, by name.
INNERS = ("inductor", "aot_eager", "eager")
_CHOICES = {
    "inner": INNERS,
    "grad_reduce": ("all_reduce", "defer", "defer_mean"),
    "rng": ("global", "per_rank"),
    "outputs": ("whole", "split"),
}
_PLANS = ("infer", "none")
_FLAGS = ("strict", "verify")
_COSTS = {"latency": "seconds", "bandwidth": "bytes per second above 0", "gather_limit": "bytes"}
_DEGREES = ("ulysses_degree", "ring_degree")
_ALL_DEGREES = (*_DEGREES, "allgather_degree")


@dataclass(frozen=True)
class Options:
    """What a user may choose.  ``None`` leaves the choice to the compiler."""

    #: Ranks that exchange heads, and ranks in a ring; their product is the size of the group.
    ulysses_degree: int | None = None
    ring_degree: int | None = None
    #: Ranks that gather keys and values: all of them, and then the other two are 1.
    allgather_degree: int | None = None
    #: A plan, flat; ``"infer"``: what the compiler finds; ``"none"``: nothing is split; None: the model's own
    #: ``_sp_plan`` or ``_cp_plan``, else what the compiler finds.
    plan: tuple[PlanEntry, ...] | Literal["infer", "none"] | None = None
    #: The degrees as vLLM-Omni writes them, instead of the two options above.
    config: SequenceParallelConfig | None = None
    #: The ranks: a process group or a one-dimensional device mesh; default: the default process group.
    group: dist.ProcessGroup | None = None
    mesh: Any = None
    #: The compiler of the partitioned graph (a function: a backend that hooks go before), and Inductor's mode.
    inner: Literal["inductor", "aot_eager", "eager"] | Callable[..., Any] = "inductor"
    mode: str | None = None
    #: Refuse implicit gathers.
    strict: bool = False
    #: Leave the gradients of parameters to an outer reducer over these ranks: their sum (``"defer"``) or their mean
    #: (``"defer_mean"``) is the gradient, whoever computes them (see :mod:`fxsp.summands`).
    grad_reduce: Literal["all_reduce", "defer", "defer_mean"] = "all_reduce"
    #: ``"per_rank"``: dropout draws on each rank for its own elements, not as one device would draw for all.
    rng: Literal["global", "per_rank"] = "global"
    #: ``"split"``: who calls takes split values as such (:class:`fxsp.SplitTensor`), outside of any model, too.
    outputs: Literal["whole", "split"] = "whole"
    #: Compare the values of the inputs of all ranks: at the first call of each graph (None), at every call, or never.
    check_inputs: bool | None = None
    #: Stages after which the graph is printed.
    print: tuple[str, ...] = ()
    #: Compare values and gradients with the unpartitioned graph at the first call.
    verify: bool = False
    #: What a message costs where attention has several ways: seconds (None: 0, bytes decide), and bytes per second that
    #: a rank sends (None: 2e9 on the CPU, 4.5e11 elsewhere).
    latency: float | None = None
    bandwidth: float | None = None
    #: The machine that is decided for (:mod:`fxsp.machine`): a name ("h100x8"), a file, or what :func:`fxsp.calibrate`
    #: returned; None: what was measured for these ranks, if anything was; ``"default"``: not even that.
    machine: Machine | Literal["default"] | None = None
    #: Bytes of gathered keys and values that a rank may hold for one attention, where there is another way (None:
    #: 1 GiB).
    gather_limit: int | None = None

    @property
    def deferred(self) -> bool:
        """Whether gradients of parameters are left to an outer reducer."""
        return self.grad_reduce != "all_reduce"

    def machine_for(self, kind: str, ranks: int) -> Machine:
        """What is decided with, for so many ranks on a device type of torch."""
        given = self.machine if isinstance(self.machine, Machine) else None
        return machine_of(kind, ranks, given, self.latency, self.bandwidth)

    def process_group(self) -> Any:
        """The process group of the ranks; None: the default one."""
        return self.mesh.get_group() if self.mesh is not None else self.group

    @staticmethod
    def names() -> list[str]:
        """All options."""
        return [field.name for field in dataclasses.fields(Options)]

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None = None, mode: str | None = None) -> Options:
        """Check the backend's ``options`` and ``mode`` arguments.

        Raises :class:`OptionError` for an unknown name or a value of the wrong kind, :class:`PlanError` for a plan
        that cannot be read.  Whether degrees match the group is checked by :func:`resolve_degrees`.
        """
        if options is not None and not isinstance(options, Mapping):
            raise OptionError(f"options is a dictionary, not {type(options).__name__}; valid: {listing(cls.names())}")
        given = dict(options or {})
        for name in given:
            if name not in cls.names():
                hint = did_you_mean(name, cls.names())
                raise OptionError(f"unknown option {name!r}.{hint}\n  Valid options: {listing(cls.names())}")
        if mode is not None:
            if given.get("mode") not in (None, mode):
                raise OptionError(f"mode is given twice: {mode!r}, and {given['mode']!r} in options; keep one")
            given["mode"] = mode
        for name, value in given.items():
            given[name] = _checked(name, value)
        if given.get("group") is not None and given.get("mesh") is not None:
            raise OptionError("options 'group' and 'mesh' both name the ranks; give one of them")
        if given.get("outputs") == "split" and given.get("verify"):
            raise OptionError("options 'outputs': 'split' and 'verify' exclude one another: whole values are compared")
        config = given.get("config")
        if config is not None:
            for name in _ALL_DEGREES:
                if given.get(name) not in (None, getattr(config, name)):
                    raise OptionError(
                        f"option {name!r} is {given[name]}, but config says {getattr(config, name)}; give one of them"
                    )
        return cls(**given)


def _checked(name: str, value: Any) -> Any:
    """The value of an option in its parsed form."""
    if name in _CHOICES:
        if value not in _CHOICES[name]:
            raise _bad(name, value, f"one of {listing(map(repr, _CHOICES[name]))}", did_you_mean(value, _CHOICES[name]))
    elif name in _FLAGS:
        if not isinstance(value, bool):
            raise _bad(name, value, "True or False")
    elif name == "check_inputs":
        if not (value is None or isinstance(value, bool)):
            raise _bad(name, value, "True or False, or None to compare at the first call of each graph")
    elif name in _ALL_DEGREES:
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise _bad(name, value, "an integer of at least 1, or None to let the compiler choose")
    elif name in _COSTS:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number and 0 <= value < math.inf and (value > 0 or name != "bandwidth")):
            raise _bad(name, value, f"a number of {_COSTS[name]}, or None for the default of the device")
    elif name == "plan":
        if isinstance(value, str) and value not in _PLANS:
            raise _bad(
                name, value, f"a dictionary, or one of {listing(map(repr, _PLANS))}", did_you_mean(value, _PLANS)
            )
        return value if value is None or isinstance(value, str) else parse_plan(value)
    elif name == "config":
        return _checked_config(value)
    elif name == "group":
        if dist.is_available() and isinstance(value, int) and value == dist.GroupMember.NON_GROUP_MEMBER:
            raise OptionError("option 'group': this process is no member of the group (new_group returned none for it)")
        if value is not None and not (dist.is_available() and isinstance(value, dist.ProcessGroup)):
            raise _bad(name, value, "a torch.distributed.ProcessGroup, or None for the default group")
    elif name == "mesh":
        _check_mesh(value)
    elif name == "machine":
        if value is None or value == "default" or isinstance(value, Machine):
            return value
        if not isinstance(value, (str, Path)):
            raise _bad(name, value, "a name like 'h100x8', the path of a file, or what fxsp.calibrate returned")
        return read_machine(value)
    elif name == "mode":
        modes = inductor_modes()
        if value is not None and value not in modes:
            raise _bad(name, value, f"one of {listing(map(repr, modes))}", did_you_mean(value, modes))
    elif name == "print":
        stages = (value,) if isinstance(value, str) else value
        if not isinstance(stages, (list, tuple)) or not all(isinstance(stage, str) for stage in stages):
            raise _bad(name, value, "the name of a stage, or a list of names")
        return tuple(stages)
    return value


def _bad(name: str, value: Any, valid: str, hint: str = "") -> OptionError:
    return OptionError(f"option {name!r} is {value!r}; it must be {valid}.{hint}")


def _checked_config(value: Any) -> SequenceParallelConfig | None:
    """Ours, or one with the same fields (vLLM-Omni's, diffusers' ContextParallelConfig, or its ParallelConfig)."""
    if getattr(value, "tensor_parallel_config", None) is not None:
        raise OptionError("option 'config': its tensor_parallel_config is not supported; parameters are not split")
    value = getattr(value, "context_parallel_config", value)
    if value is None or isinstance(value, SequenceParallelConfig):
        return value
    if not all(hasattr(value, name) for name in _DEGREES):
        raise _bad("config", value, "a SequenceParallelConfig")
    if getattr(value, "mesh", None) is not None:
        raise OptionError(
            "option 'config': its mesh is not read. Give the ranks by the option 'mesh', a mesh of one dimension, or "
            "by 'group', and a config without a mesh"
        )
    names = [field.name for field in dataclasses.fields(SequenceParallelConfig)]
    degrees: dict[str, Any] = {name: getattr(value, name) for name in names if hasattr(value, name)}
    try:
        return SequenceParallelConfig(**degrees)
    except ValueError as error:
        raise OptionError(f"option 'config': {error}") from error


def _check_mesh(mesh: Any) -> None:
    if mesh is None:
        return
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise _bad("mesh", mesh, "a torch.distributed.device_mesh.DeviceMesh with one dimension")
    if mesh.ndim != 1:
        names = mesh.mesh_dim_names
        example = f"mesh[{names[-1]!r}]" if names else "a mesh with named dimensions, and mesh['name'] of it"
        raise OptionError(
            f"option 'mesh' has {mesh.ndim} dimensions of sizes {tuple(mesh.shape)}; the sequence is split over one.\n"
            f"  Give that dimension alone: {example}"
        )


def resolve_ranks(options: Options) -> Ranks:
    """This process's place among the ranks: of the mesh, the group, or the default process group.

    Without a process group it is ``Ranks(0, 1, "")``, with a warning where a launcher has started several processes.
    Raises :class:`OptionError` if this process is not a member of the group, or if the degrees do not match its size,
    and :class:`ProcessGroupError` if the group was destroyed.
    """
    if options.mesh is None and options.group is None and not (dist.is_available() and dist.is_initialized()):
        ranks = Ranks(0, 1, "")
        if missing := missing_group():
            warn(UnshardedWarning(missing))
    else:
        ranks = ranks_of(options.mesh, options.group)
    resolve_degrees(options, ranks.size)
    return ranks


@dataclass(frozen=True)
class AttentionDegrees:
    """Degrees of the attention methods, all None where the compiler is free to choose."""

    ulysses: int | None = None
    ring: int | None = None
    allgather: int | None = None


def resolve_degrees(options: Options, size: int) -> AttentionDegrees:
    """The degrees for ``size`` ranks; of two, the one not given is inferred.

    Raises :class:`OptionError` if their product is not ``size``, or the machine that is given has fewer devices.
    """
    if isinstance(options.machine, Machine):
        options.machine.check(size)
    config = options.config
    if config is not None:
        if config.sequence_parallel_size != size:
            raise _mismatch(f"config {config} is for {config.sequence_parallel_size} ranks", size)
        return AttentionDegrees(config.ulysses_degree, config.ring_degree, config.allgather_degree)
    ulysses, ring = options.ulysses_degree, options.ring_degree
    if (options.allgather_degree or 1) > 1:
        if (ulysses or 1) * (ring or 1) > 1:
            raise OptionError("option 'allgather_degree' excludes ulysses_degree and ring_degree")
        if options.allgather_degree != size:
            raise _mismatch(f"allgather_degree={options.allgather_degree} does not match", size)
        return AttentionDegrees(1, 1, size)
    if ulysses is None and ring is None:
        return AttentionDegrees()
    given = (ulysses or 1) * (ring or 1)
    whole = size % given == 0 if ulysses is None or ring is None else size == given
    if not whole:
        stated = [f"{name}={getattr(options, name)}" for name in _DEGREES if getattr(options, name) is not None]
        raise _mismatch(f"{' * '.join(stated)} does not match", size)
    return AttentionDegrees(ulysses or size // given, ring or size // given, 1)


def _mismatch(problem: str, size: int) -> OptionError:
    valid = [f"({d}, {size // d})" for d in range(1, size + 1) if size % d == 0]
    alone = (
        "" if size > 1 else "\n  There is one rank: is the process group initialized, and the script run by torchrun?"
    )
    return OptionError(
        f"{problem}: the group has {size} rank{'s' if size > 1 else ''}.\n"
        f"  Valid (ulysses_degree, ring_degree): {listing(valid)}{alone}"
    )
