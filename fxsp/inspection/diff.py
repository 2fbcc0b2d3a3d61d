"""What changed between two stages: lines that came, that went, and values that got another shape."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Sequence

from fxsp.inspection.printer import MARKER, Row
from fxsp.inspection.wire import format_bytes

__all__ = ["diff_stages"]

_COLORS = {"+": "\x1b[32m", "-": "\x1b[31m", "~": "\x1b[33m"}
_WORD = re.compile(r"[A-Za-z_]\w*")


def diff_stages(before: Sequence[Row], after: Sequence[Row], *, color: bool | None = None) -> str:
    """``+`` a line that came, ``-`` one that went, ``~`` the same call with another local shape.

    A local value goes by the name of the global value that it stands for, so that what is the same looks the same.
    ``color=None``: on a terminal, unless ``NO_COLOR`` is set.
    """
    if color is None:
        color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    old, new = _lines(before), _lines(after)
    matcher = difflib.SequenceMatcher(None, [line[0] for line in old], [line[0] for line in new], autojunk=False)
    out: list[str] = []
    for tag, i, j, k, m in matcher.get_opcodes():
        if tag == "equal":
            for (key, was, _), (_, now, type_) in zip(old[i:j], new[k:m], strict=True):
                out.append(f"  {key}  {now}" if was == now else f"~ {key}  {was} -> {type_} {now}")
            continue
        out += [f"- {key}  {value}" for key, value, _ in old[i:j]]
        out += [f"+ {key}  {type_} {value}" for key, value, type_ in new[k:m]]
    lines = [line.rstrip() for line in out]
    return "\n".join(f"{_COLORS[t[0]]}{t}\x1b[0m" if color and t[:1] in _COLORS else t for t in lines)


def _lines(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """``(name = operator(operands), shape, type)``, the names those of the global values."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for row in rows:
        if row.stands_for and row.stands_for not in taken:
            taken.add(row.stands_for)
            names[row.name] = row.stands_for
    found = []
    for row in rows:
        op = _WORD.sub(lambda match: names.get(match[0], match[0]), row.op)
        mark = "" if row.sent is None else f"{MARKER} "
        key = f"{mark}{names.get(row.name, row.name)} = {op}" if row.name else op
        sent = "" if row.sent is None else format_bytes(row.sent)
        found.append((key, f"{row.value}  {sent}".rstrip(), row.type))
    return found
