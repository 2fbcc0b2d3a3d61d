"""Writes docs/options.md: the options of the backend, from their definitions and the comments above them.

python docs/generate.py
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from pathlib import Path

from fxsp.config import Options

PAGE = Path(__file__).with_name("options.md")
HEAD = """\
# Options

`torch.compile(model, backend="sp", options={...})`, and the same names for `fxsp.explain` and `fxsp.verify`. An unknown
name, or a value that is not possible, is an `OptionError` that lists what is. `mode` may be given to `torch.compile`
itself. `None` leaves the choice to the compiler. This page is made by `python docs/generate.py` from `fxsp.Options`.

| option | type | default | meaning |
| --- | --- | --- | --- |
"""


def options_page() -> str:
    """The page, as Markdown."""
    source = textwrap.dedent(inspect.getsource(Options))
    lines = source.splitlines()
    defaults = {field.name: field.default for field in dataclasses.fields(Options)}
    rows, meaning = [], ""
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if above := _comment(lines, node.lineno - 1):
            meaning = above
        shown = [
            f"`{node.target.id}`",
            f"`{ast.unparse(node.annotation)}`".replace(" | ", " or "),
            f"`{defaults[node.target.id]!r}`",
            meaning,
        ]
        rows.append(f"| {' | '.join(shown)} |")
    return HEAD + "\n".join(rows) + "\n"


def _comment(lines: list[str], at: int) -> str:
    """The ``#:`` lines above a line, as Markdown; without any, the field shares the comment of the one before."""
    found: list[str] = []
    while at > 0 and lines[at - 1].strip().startswith("#:"):
        at -= 1
        found.insert(0, lines[at].strip().removeprefix("#:").strip())
    return " ".join(found).replace(":class:", "").replace(":mod:", "").replace("``", "`").replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(options_page())
