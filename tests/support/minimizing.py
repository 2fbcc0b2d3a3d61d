"""Make a failing program small: after hypothesis has drawn smaller ones, line by line on the source.

Each step is tried and kept if the program still fails in the same way: return less, leave a line out, let a value be
one of those that it is computed from, drop what is not read, shorten a sequence, use fewer ranks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from fuzzing_cases import Case

__all__ = ["minimize"]

_NAME = re.compile(r"\b[a-z]+\d+\b")


def minimize(case: Case, fails: Callable[[Case], bool]) -> Case:
    """A case of which no single step makes a smaller one that ``fails``."""
    progress = True
    while progress:
        progress = False
        for smaller in _steps(case):
            if fails(smaller):
                case, progress = _without_unread_inputs(smaller, fails), True
                break
    return case


def _steps(case: Case) -> Iterator[Case]:
    head, *lines = case.source.strip("\n").split("\n")

    def with_lines(new: list[str]) -> Case:
        return replace(case, source="\n".join([head, *new]) + "\n")

    *body, last = lines
    results = _NAME.findall(last)
    assigned = [m[1] for line in body if (m := re.match(r"    ([a-z]+\d+) = ", line))]
    for name in [*(results if len(results) > 1 else []), *assigned]:
        if [name] != results:
            shorter = next((i for i, line in enumerate(body) if line.startswith(f"    {name} = ")), len(body) - 1)
            yield with_lines([*body[: shorter + 1], f"    return {name}"])
    for i, line in enumerate(body):
        yield with_lines([*body[:i], *body[i + 1 :], last])
        if match := re.match(r"( *)([a-z]+\d+) = (.*)", line):
            for name in dict.fromkeys(_NAME.findall(match[3])):
                if match[3] != name and match[2] != name:
                    yield with_lines([*body[:i], f"{match[1]}{match[2]} = {name}", *body[i + 1 :], last])
        if match := re.match(r"( *)([a-z]+\d+) = ([a-z]+\d+)$", line):
            renamed = [re.sub(rf"\b{match[2]}\b", match[3], other) for other in [*body[i + 1 :], last]]
            yield with_lines([*body[:i], *renamed])
    for name, n in case.lengths.items():
        yield from (replace(case, lengths={**case.lengths, name: k}) for k in range(1, n))
    if case.degrees:
        yield replace(case, degrees=None)
    yield from (replace(case, size=k, degrees=None) for k in range(2, case.size))
    for what in ("dynamo", "dynamic", "training"):
        if getattr(case, what):
            yield replace(case, **{what: False})
    if not case.double:
        yield replace(case, double=True)


def _without_unread_inputs(case: Case, fails: Callable[[Case], bool]) -> Case:
    body = case.source.strip("\n").partition("\n")[2]
    kept = tuple(spec for spec in case.inputs if re.search(rf"\b{spec.name}\b", body))
    source = f"def program({', '.join(spec.name for spec in kept)}):\n{body}\n"
    read = {name for spec in kept for size in spec.shape for name in re.findall(r"S\d+", str(size))}
    lengths = {name: n for name, n in case.lengths.items() if name in read}
    smaller = replace(case, source=source, inputs=kept, lengths=lengths, instructions=())
    return smaller if len(kept) < len(case.inputs) and fails(smaller) else case
