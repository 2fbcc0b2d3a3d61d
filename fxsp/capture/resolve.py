"""Modules and arguments that a plan names: found, checked, and freed of wrappers."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxsp.plan import PlanEntry, SequenceParallelPartialInput, did_you_mean, listing, refuse

__all__ = ["ResolvedEntry", "forward_signature", "modules_at", "resolve_plan", "submodules", "unwrap"]


@dataclass(frozen=True)
class ResolvedEntry:
    """A plan entry and one module that it names; ``path`` is the module's path in the root."""

    entry: PlanEntry
    path: str
    module: nn.Module

    def __str__(self) -> str:
        return self.entry.text(self.path)


#: Children through which a wrapper holds the module that it stands for.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``, checkpoint, FSDP and DDP wrappers; plans speak of that one."""
    while True:
        inner = next((module._modules[name] for name in _WRAPPED if module._modules.get(name) is not None), None)
        if inner is None and isinstance(module, nn.parallel.DistributedDataParallel):
            inner = module.module
        if inner is None:
            return module
        module = inner


def submodules(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All ``(path, module)`` below and including ``root``, without wrappers; a shared module comes once per path."""
    root = unwrap(root)
    yield prefix, root
    for name, child in root._modules.items():
        if child is not None:
            yield from submodules(child, f"{prefix}.{name}" if prefix else name)


def forward_signature(module: nn.Module) -> inspect.Signature:
    """Signature of the undecorated ``forward`` (``__wrapped__`` is followed), without ``self``."""
    try:
        signature = inspect.signature(type(module).forward)
    except (TypeError, ValueError):  # a forward without a Python signature takes anything
        return inspect.signature(lambda *args, **kwargs: None)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _argument_names(module: nn.Module) -> tuple[list[str], bool]:
    """Names of the arguments of ``forward``, and whether it takes any keyword."""
    parameters = forward_signature(module).parameters.values()
    names = [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
    return names, any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def resolve_plan(entries: Sequence[PlanEntry], root: nn.Module) -> tuple[ResolvedEntry, ...]:
    """Find the modules of every entry and check all names, in the order of the plan.

    Raises :class:`PlanError` for an unknown module or argument and for entries that contradict one another; the
    message holds the entry, what exists instead, and the nearest name.
    """
    root = unwrap(root)
    resolved: list[ResolvedEntry] = []
    for entry in entries:
        seen: set[int] = set()
        for path, module in modules_at(root, entry.pattern, entry):
            if id(module) in seen:  # one module at several places of a ModuleList
                continue
            seen.add(id(module))
            row = ResolvedEntry(entry, path, module)
            _check_arguments(row, root)
            resolved.append(row)
    return _without_duplicates(resolved)


def modules_at(root: nn.Module, pattern: str, entry: object) -> list[tuple[str, nn.Module]]:
    """``(path, module)`` of all that a pattern names below ``root``; ``entry`` is what an error speaks of.

    Names are those of children (of a ``ModuleDict`` its keys), and ``*`` is each child of a ``ModuleList``.
    """
    if pattern.count("*") > 1:
        raise refuse(entry, "a path has at most one `*`: it can only be used once")
    found = [("", root)]
    atoms = pattern.split(".") if pattern else []
    for position, atom in enumerate(atoms):
        step: list[tuple[str, nn.Module]] = []
        for path, module in found:
            here = f'"{path}" ({type(module).__name__})' if path else type(module).__name__
            children = {name: unwrap(child) for name, child in module._modules.items() if child is not None}
            if atom == "*":
                if not isinstance(module, nn.ModuleList):
                    raise refuse(
                        entry,
                        f"`*` matches the children of a ModuleList, and {here} is none.\n"
                        f"  Its modules: {listing(children)}.{did_you_mean(atom, children)}",
                        module,
                    )
                step += [(f"{path}.{name}" if path else name, child) for name, child in children.items()]
            elif atom in children:
                step.append((f"{path}.{atom}" if path else atom, children[atom]))
            else:
                near = difflib.get_close_matches(atom, list(children), n=1, cutoff=0.5)
                candidates = [".".join([*atoms[:position], near[0], *atoms[position + 1 :]])] if near else []
                hint = (
                    f' Did you mean "{candidates[0]}"?'
                    if candidates
                    else did_you_mean(pattern, (name for name, _ in submodules(root) if name))
                )
                raise refuse(
                    entry,
                    f'{here} has no module "{atom}": it is not a submodule.\n  Its modules: {listing(children)}.{hint}',
                    module,
                )
        found = step
    return found


def _check_arguments(row: ResolvedEntry, root: nn.Module) -> None:
    names, takes_any = _argument_names(row.module)
    target, spec = row.entry.target, row.entry.spec
    who = f"{type(row.module).__name__}.forward"
    if isinstance(row.module, nn.ModuleList):
        example = row.entry.text(f"{row.path}.*")
        raise refuse(row, f"a ModuleList is never called itself. Did you mean `{example}`?")
    if isinstance(target, str) and not row.entry.is_result and not takes_any and target not in names:
        raise refuse(
            row, f'{who} has no argument "{target}".\n  It has: {listing(names)}.{did_you_mean(target, names)}'
        )
    if isinstance(spec, SequenceParallelPartialInput) and isinstance(spec.text_len_source, str):
        root_names, root_takes_any = _argument_names(root)
        known = [*names, *(name for name in root_names if name not in names)]
        if spec.text_len_source not in known and not takes_any and not root_takes_any:
            raise refuse(
                row,
                f'text_len_source names no argument of {who}, nor of the model: "{spec.text_len_source}".\n'
                f"  They have: {listing(known)}.{did_you_mean(spec.text_len_source, known)}",
            )


def _without_duplicates(resolved: list[ResolvedEntry]) -> tuple[ResolvedEntry, ...]:
    """Refuse two entries for one value; equal entries through two paths of a shared module are one."""
    kept: dict[tuple[Any, ...], list[ResolvedEntry]] = {}
    result = []
    for row in resolved:
        entry = row.entry
        target = 0 if entry.target is None else entry.target
        others = kept.setdefault((id(row.module), target, entry.part and entry.part[0]), [])
        for other in others:
            a, b = entry.spec.expected_dims, other.entry.spec.expected_dims
            if a is not None and b is not None and a != b:
                continue  # they apply to tensors of different rank: never both
            if row.path != other.path and entry.spec == other.entry.spec:
                break
            verb = "repeats" if entry.spec == other.entry.spec else "contradicts"
            raise refuse(row, f"it {verb} the entry `{other.entry}` for the same value; keep one of them")
        else:
            others.append(row)
            result.append(row)
    return tuple(result)
