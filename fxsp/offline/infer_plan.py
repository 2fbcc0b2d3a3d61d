"""``fxsp.infer_plan``: the plan that the compiler would find, in the form in which people write plans."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fxsp.capture.resolve import submodules, unwrap
from fxsp.offline.partition import partition_offline
from fxsp.plan import PlanEntry, SequenceParallelInput, Spec

__all__ = ["InferredPlan", "infer_plan"]


class InferredPlan(dict[str, Any]):
    """A plan as a dictionary.  ``print`` of it is text that can be pasted into a model as its ``_sp_plan``."""

    def __init__(self, plan: Mapping[str, Any], unnamed: Sequence[str] = (), notes: Sequence[str] = ()) -> None:
        super().__init__(plan)
        #: What no plan can name, each with its place; it is split where the plan is inferred at run time.
        self.unnamed = tuple(unnamed)
        #: What each graph costs with it, and what the alternatives would cost.
        self.notes = tuple(notes)

    def __str__(self) -> str:
        lines = ["_sp_plan = {"]
        for pattern, value in self.items():
            if isinstance(value, dict):
                lines += [f"    {_quoted(pattern)}: {{"]
                lines += [f"        {_quoted(target)}: {spec!r}," for target, spec in value.items()]
                lines += ["    },"]
            else:
                lines.append(f"    {_quoted(pattern)}: {value!r},")
        lines.append("}")
        lines += [f"# no plan can name it: {line}" for line in self.unnamed]
        return "\n".join(lines)


def _quoted(key: object) -> str:
    return f'"{key}"' if isinstance(key, str) else repr(key)


def infer_plan(
    model: Callable[..., Any],
    *args: Any,
    world_size: int,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> InferredPlan:
    """The plan that ``torch.compile(model, backend="sp")`` would find for ``model(*args, **kwargs)``.

    No process group, no device and no weights: parameters and inputs may be on the meta device.  The model's own plan
    is not read.  ``options`` are those of the backend.  What has no name in the model is in ``unnamed``.  The plan is
    empty where nothing pays to be split (``notes`` say why).  Resets Dynamo.  Raises what the backend raises.
    """
    torch.compiler.reset()
    given = {**(options or {}), "plan": "infer"}
    results = partition_offline(model, args, kwargs, world_size=world_size, options=given)
    entries = list(dict.fromkeys(entry for result in results for entry in result.report.inferred or ()))
    unnamed = [record.entry for result in results for record in result.report.plan if record.entry.endswith(_UNNAMED)]
    notes = [note for result in results for note in (*result.report.notes, result.report.unsharded) if note]
    root = unwrap(model) if isinstance(model, nn.Module) else None
    return InferredPlan(_as_dictionary(entries, root), unnamed, notes)


_UNNAMED = "(no plan can name it)"


def _as_dictionary(entries: Sequence[PlanEntry], root: nn.Module | None) -> dict[str, Any]:
    """Entries as people write them: the children of a list that have equal entries are one line, ``blocks.*``."""
    lists = (
        {path for path, module in submodules(root) if isinstance(module, nn.ModuleList)} if root is not None else set()
    )
    counts = {path: len(root.get_submodule(path)) for path in lists} if root is not None else {}  # type: ignore[arg-type]
    by_path: dict[str, list[PlanEntry]] = {}
    for entry in entries:
        by_path.setdefault(entry.pattern, []).append(entry)
    for path in sorted(lists, key=len):
        children = [f"{path}.{i}" for i in range(counts[path])]
        for rest in dict.fromkeys(
            p[len(path) + 1 :].partition(".")[2] for p in list(by_path) if p.startswith(f"{path}.")
        ):
            paths = [f"{child}.{rest}" if rest else child for child in children]
            found = [{(e.target, e.spec, e.part) for e in by_path.get(p, ())} for p in paths]
            if len(paths) > 1 and found[0] and all(f == found[0] for f in found) and "*" not in paths[0]:
                first = by_path[paths[0]]
                star = f"{path}.*.{rest}" if rest else f"{path}.*"
                by_path = {
                    star if p == paths[0] else p: v for p, v in by_path.items() if p == paths[0] or p not in paths
                }
                by_path[star] = first
    return {pattern: _values(rows) for pattern, rows in by_path.items()}


def _values(rows: Sequence[PlanEntry]) -> Any:
    if len(rows) == 1 and rows[0].target is None and not isinstance(rows[0].spec, SequenceParallelInput):
        return rows[0].spec
    values: dict[str | int, Any] = {}
    for row in rows:
        target = 0 if row.target is None else row.target
        if row.part is None:
            values[target] = row.spec
        else:
            index, count = row.part
            parts: list[Spec | None] = values.setdefault(target, [None] * count)
            parts[index] = row.spec
    return values
