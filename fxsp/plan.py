"""The sequence-parallel plan: which values of a model are split over the ranks, as its author states it.

A plan is a dictionary in the form that vLLM-Omni (``_sp_plan``) and diffusers (``_cp_plan``) use::

    {
        "": {"hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3)},   # arguments of the root
        "rope": {0: SequenceParallelInput(split_dim=1, split_output=True)},           # output 0 of a module
        "blocks.*": {"rotary_emb": [SequenceParallelInput(1), SequenceParallelInput(1)]},  # a tuple argument
        "proj_out": SequenceParallelOutput(gather_dim=1),                             # the output of a module
        "": {"cat#0": SequenceParallelInput(1)},                                      # the result of its first cat
    }

:func:`parse_plan` flattens it into :class:`PlanEntry` rows; ``fxsp.capture.resolve`` finds the modules and checks
every name. Entries are annotations: they say where a sharding is wanted, and never change what the model computes.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxsp.errors import PlanError
from fxsp.source import forward_source

__all__ = [
    "PlanEntry",
    "SequenceParallelConfig",
    "SequenceParallelInput",
    "SequenceParallelOutput",
    "SequenceParallelPartialInput",
    "Spec",
    "did_you_mean",
    "find_plan",
    "listing",
    "owns_plan",
    "parse_plan",
    "refuse",
]


#: ``"cat#1"``: of the functions and methods that the module itself calls in its forward the second ``cat``.
_RESULT = re.compile(r"^\w+#\d+$")


class _Compact:
    """``repr`` that shows the fields which differ from their default, and those without one."""

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        shown = [f"{f.name}={getattr(self, f.name)!r}" for f in fields if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(frozen=True, repr=False)
class SequenceParallelInput(_Compact):
    """Split an argument of a module (``split_output=True``: an output) along ``split_dim``.

    The entry does not apply to a tensor that has not ``expected_dims`` dimensions, nor to one without tokens.
    ``auto_pad`` and ``clone_shard`` (a shard has memory of its own) are read from existing plans, and always so here:
    every sequence is padded as needed, and no shard is a view of the whole value.  Values of one call that share a
    ``shard_group`` must have the same length.  ``unit`` tokens in a row stay on one rank (pairs that a pyramid joins);
    it does not apply to a length that does not consist of these.
    """

    split_dim: int
    expected_dims: int | None = None
    split_output: bool = False
    auto_pad: bool = False
    shard_group: str | None = None
    unit: int = 1
    clone_shard: bool = False


@dataclass(frozen=True, repr=False)
class SequenceParallelOutput(_Compact):
    """Make an output of a module whole again: the pieces along ``gather_dim`` are put together on every rank."""

    gather_dim: int
    expected_dims: int | None = None
    shard_group: str | None = None


@dataclass(frozen=True, repr=False)
class SequenceParallelPartialInput(_Compact):
    """Split ``[text, image]`` along ``split_dim``: the text part stays whole on every rank, the image part is split.

    ``text_len_source`` is the number of text tokens, or the name of an argument of the module's ``forward`` (else of
    the root's) that tells it: an integer, or a tensor whose token dimension (0 up to two dimensions, 1 above) counts.
    """

    split_dim: int
    text_len_source: str | int
    expected_dims: int | None = None
    split_output: bool = False


@dataclass(frozen=True)
class SequenceParallelConfig:
    """Degrees of the attention methods; their product is the number of ranks.

    ``allgather_degree`` (gather keys and values) excludes the other two.  ``convert_to_fp32`` asks a ring to merge in
    fp32, which it always does here.  Unlike its model in vLLM-Omni, a configuration of one rank is allowed.
    """

    ulysses_degree: int = 1
    ring_degree: int = 1
    allgather_degree: int = 1
    convert_to_fp32: bool = True

    def __post_init__(self) -> None:
        for name in ("ulysses_degree", "ring_degree", "allgather_degree"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"SequenceParallelConfig.{name} is {value!r}; it must be an integer of at least 1")
        if self.allgather_degree > 1 and self.ulysses_degree * self.ring_degree > 1:
            raise ValueError("SequenceParallelConfig: allgather_degree excludes ulysses_degree and ring_degree")

    @property
    def sequence_parallel_size(self) -> int:
        """Number of ranks that a sequence is split over."""
        return self.allgather_degree if self.allgather_degree > 1 else self.ulysses_degree * self.ring_degree


Spec = SequenceParallelInput | SequenceParallelPartialInput | SequenceParallelOutput


@dataclass(frozen=True)
class PlanEntry:
    """One row of a plan: a value of the modules that ``pattern`` names, and what is wanted of it.

    ``target`` is an argument name, an output index, None for the only output, or ``"cat#1"`` for the result of a
    function.  ``part = (i, n)`` means element
    ``i`` of an argument that is a tuple of ``n`` values.
    """

    pattern: str
    target: str | int | None
    spec: Spec
    part: tuple[int, int] | None = None

    @property
    def kind(self) -> str:
        """``"shard"`` or ``"gather"``."""
        return "gather" if isinstance(self.spec, SequenceParallelOutput) else "shard"

    @property
    def dim(self) -> int:
        """The dimension as written; it may count from the back."""
        return self.spec.gather_dim if isinstance(self.spec, SequenceParallelOutput) else self.spec.split_dim

    @property
    def is_output(self) -> bool:
        return not isinstance(self.target, str) or self.is_result

    @property
    def is_result(self) -> bool:
        """Whether the target is the result of a function that the module calls: ``"cat#1"``."""
        return isinstance(self.target, str) and _RESULT.match(self.target) is not None

    def text(self, path: str | None = None) -> str:
        """The entry as one line, for the module at ``path`` (default: the pattern)."""
        where = self.pattern if path is None else path
        target = "" if self.target is None else f"[{self.target}]"
        part = "" if self.part is None else f"[{self.part[0]}]"
        return f"{where or '<root>'}{target}{part}: {self.spec!r}"

    def __str__(self) -> str:
        return self.text()


# --- messages ---------------------------------------------------------------------------------------------------------


def listing(names: Iterable[object], limit: int = 24) -> str:
    """Names separated by commas, shortened after ``limit``."""
    shown = [str(name) for name in names]
    more = f", ... ({len(shown) - limit} more)" if len(shown) > limit else ""
    return ", ".join(shown[:limit]) + more or "none"


def did_you_mean(name: object, known: Iterable[object]) -> str:
    """``' Did you mean "x"?'`` for the nearest known name, or nothing."""
    near = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f' Did you mean "{near[0]}"?' if near else ""


def refuse(entry: object, problem: str, module: object = None) -> PlanError:
    """The error for one entry (or the text of one): which, what is wrong with it, and where its module is defined."""
    module = module if module is not None else getattr(entry, "module", None)
    place = forward_source(module) if module is not None else ""
    where = f"\n  {type(module).__name__}.forward is in {place}" if place else ""
    return PlanError(f"plan entry `{entry}`: {problem}{where}")


# --- the dictionary form ----------------------------------------------------------------------------------------------


def owns_plan(module: nn.Module) -> bool:
    """Whether a model (its class or instance) carries a plan of its own."""
    return find_plan(module) is not None


def find_plan(module: nn.Module, option: Any = None) -> Any:
    """The plan for ``module``: ``option`` if given, else its ``_sp_plan``, else its ``_cp_plan``, else None."""
    if option is not None:
        return option
    for name in ("_sp_plan", "_cp_plan"):
        plan = getattr(module, name, None)
        if plan is not None:
            return plan
    return None


def parse_plan(plan: Any) -> tuple[PlanEntry, ...]:
    """Flatten a plan dictionary; the rows of an already flat plan are returned as they are.

    Objects are recognised by their fields (``split_dim``, ``text_len_source``, ``gather_dim``), so the specs of
    diffusers and vLLM-Omni are accepted.  Raises :class:`PlanError` for anything that has no meaning in a plan.
    """
    if isinstance(plan, (list, tuple)) and all(isinstance(row, PlanEntry) for row in plan):
        return tuple(plan)
    if not isinstance(plan, Mapping):
        raise PlanError(
            f"a plan is a dictionary from module paths to specs, not {type(plan).__name__}: it must be a dict, "
            'e.g. {"blocks.0": {"hidden_states": SequenceParallelInput(split_dim=1)}}'
        )
    return tuple(entry for pattern, value in plan.items() for entry in _parse_module(pattern, value))


def _parse_module(pattern: Any, value: Any) -> Iterator[PlanEntry]:
    if not isinstance(pattern, str):
        raise PlanError(
            f"plan key {pattern!r}: a module path is a string ('' for the model itself), all keys must be strings"
        )
    if isinstance(value, Mapping):
        for target, spec in value.items():
            yield from _parse_target(pattern, target, spec)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):  # one spec per output; None leaves an output alone
            if item is not None:
                yield _output_entry(pattern, index, item)
    else:
        yield _output_entry(pattern, None, value)


def _parse_target(pattern: str, target: Any, value: Any) -> Iterator[PlanEntry]:
    label = f"{pattern or '<root>'}[{target}]: {value!r}"
    if isinstance(target, bool) or not isinstance(target, (str, int)):
        raise refuse(label, f"the key {target!r} is neither an argument name nor an output index")
    if isinstance(target, int) or _RESULT.match(target):
        if isinstance(value, (list, tuple)):
            raise refuse(label, "an output index takes one spec; a list of specs belongs to a tuple argument")
        yield _output_entry(pattern, target, value)
        return
    specs = list(value) if isinstance(value, (list, tuple)) else [value]
    for index, item in enumerate(specs):
        if item is None and isinstance(value, (list, tuple)):
            continue
        part = (index, len(specs)) if isinstance(value, (list, tuple)) else None
        entry = PlanEntry(pattern, target, _parse_spec(label, item), part)
        if isinstance(entry.spec, SequenceParallelOutput):
            raise refuse(
                entry, "an argument cannot be gathered; SequenceParallelOutput belongs to the module itself or an index"
            )
        if entry.spec.split_output:
            raise refuse(entry, f"split_output=True speaks of an output: use an output index instead of {target!r}")
        yield entry


def _output_entry(pattern: str, target: int | str | None, value: Any) -> PlanEntry:
    where = "" if target is None else f"[{target}]"
    entry = PlanEntry(pattern, target, _parse_spec(f"{pattern or '<root>'}{where}: {value!r}", value))
    if isinstance(target, int) and target < 0:
        raise refuse(entry, "an output index is not negative")
    if not isinstance(entry.spec, SequenceParallelOutput) and not entry.spec.split_output and not entry.is_result:
        if target is None:
            raise refuse(entry, "an input spec needs the name of an argument, e.g. {'hidden_states': ...}")
        raise refuse(entry, f"the key {target} is an output index: it needs split_output=True")
    return entry


def _parse_spec(label: str, value: Any) -> Spec:
    expected = getattr(value, "expected_dims", None)
    spec: Spec
    if isinstance(value, (str, int, float, type, Mapping)) or value is None:
        spec = None  # type: ignore[assignment]
    elif hasattr(value, "gather_dim"):
        spec = SequenceParallelOutput(value.gather_dim, expected, getattr(value, "shard_group", None))
    elif hasattr(value, "text_len_source"):
        spec = SequenceParallelPartialInput(
            value.split_dim, value.text_len_source, expected, bool(getattr(value, "split_output", False))
        )
    elif hasattr(value, "split_dim"):
        split_output, auto_pad = (bool(getattr(value, name, False)) for name in ("split_output", "auto_pad"))
        group = getattr(value, "shard_group", None)
        unit = getattr(value, "unit", 1)
        clone = bool(getattr(value, "clone_shard", False))
        spec = SequenceParallelInput(value.split_dim, expected, split_output, auto_pad, group, unit, clone)
    else:
        spec = None  # type: ignore[assignment]
    if spec is None:
        raise refuse(
            label,
            f"{type(value).__name__} is not a spec; use SequenceParallelInput, SequenceParallelPartialInput or "
            "SequenceParallelOutput (or the ContextParallelInput/Output of diffusers)",
        )
    _check_numbers(label, spec)
    return spec


def _check_numbers(label: str, spec: Spec) -> None:
    name = "gather_dim" if isinstance(spec, SequenceParallelOutput) else "split_dim"
    dim = getattr(spec, name)
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise refuse(label, f"{name} is {dim!r}; a dimension is an integer")
    unit = spec.unit if isinstance(spec, SequenceParallelInput) else 1
    if isinstance(unit, bool) or not isinstance(unit, int) or unit < 1:
        raise refuse(label, f"unit is {unit!r}; it is a number of tokens of at least 1")
    expected = spec.expected_dims
    if expected is not None:
        if isinstance(expected, bool) or not isinstance(expected, int) or expected < 1:
            raise refuse(label, f"expected_dims is {expected!r}; it is a positive number of dimensions, or None")
        if not -expected <= dim < expected:
            raise refuse(
                label, f"{name}={dim} is out of range for expected_dims={expected}: {-expected}..{expected - 1}"
            )
    if isinstance(spec, SequenceParallelPartialInput):
        source = spec.text_len_source
        if isinstance(source, bool) or not isinstance(source, (str, int)) or (isinstance(source, int) and source < 0):
            raise refuse(label, f"text_len_source is {source!r}; it is a number of tokens or the name of an argument")
