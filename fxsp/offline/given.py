"""What a command line gives: a plan, a factory, a file to write."""

from __future__ import annotations

import ast
import importlib
import os
import runpy
import sys
from pathlib import Path
from typing import Any

from fxsp import plan as plans
from fxsp.errors import FxspError

__all__ = ["UsageError", "check_writable", "named", "parse_plan_text"]

_ENTRIES = ("SequenceParallelInput", "SequenceParallelOutput", "SequenceParallelPartialInput")


class UsageError(FxspError):
    """The command line names something that does not exist."""


def named(name: str, what: str) -> Any:
    """The object that ``package.module:name`` or ``file.py:name`` is; ``what`` it should be is told in errors."""
    place, colon, attribute = name.rpartition(":")
    if not colon or not attribute or not place:
        raise UsageError(f'"{name}" is no {what}: write package.module:{what} or file.py:{what}')
    found: Any
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise UsageError(f'there is no file "{place}" (in {Path.cwd()})')
        values = runpy.run_path(place)
        first, *rest = attribute.split(".")
        if first not in values:
            raise UsageError(f'{place} has no "{attribute}"')
        found = values[first]
    else:
        if str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        try:
            found = importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise UsageError(f'there is no module "{error.name}" (looked for {place}, also in {Path.cwd()})') from error
        rest = attribute.split(".")
    for part in rest:
        if not hasattr(found, part):
            raise UsageError(f'{"" if place.endswith(".py") else "module "}{place} has no "{attribute}"')
        found = getattr(found, part)
    return found


def parse_plan_text(text: str) -> Any:
    """A plan: ``"infer"``, ``"none"``, a dictionary as it is printed, or where one is (``file.py:name``).

    A dictionary may name the classes of entries, and consist of literals otherwise: nothing is run.
    """
    if text in ("infer", "none"):
        return text
    if text.lstrip().startswith("{"):
        try:
            return _value(ast.parse(text.strip(), mode="eval").body)
        except SyntaxError as error:
            raise UsageError(f"--plan is no dictionary: {error.msg}, in {error.text or text}") from error
    found = named(text, "plan")
    if not isinstance(found, dict):
        raise UsageError(f"{text} is {type(found).__name__}, no dictionary; a plan is one")
    return found


def _value(node: ast.AST) -> Any:
    if isinstance(node, ast.Dict) and all(key is not None for key in node.keys):
        return {_value(key): _value(value) for key, value in zip(node.keys, node.values, strict=True) if key}
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func).rpartition(".")[2]
        if name in _ENTRIES:
            keywords = {keyword.arg: _value(keyword.value) for keyword in node.keywords if keyword.arg}
            try:
                return getattr(plans, name)(*map(_value, node.args), **keywords)
            except TypeError as error:
                raise UsageError(f"--plan: {ast.unparse(node)}: {error}") from error
    try:
        return ast.literal_eval(node)
    except ValueError:
        known = ", ".join(_ENTRIES)
        raise UsageError(f"--plan: {ast.unparse(node)} is no literal; what may be called is {known}") from None


def check_writable(path: str) -> None:
    """Raises :class:`UsageError` if a file cannot be written, before work is done for it; leaves no file behind."""
    target = Path(path)
    there = target.exists()
    try:
        with target.open("ab"):
            pass
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {os.strerror(error.errno or 0)}") from error
    if not there:
        target.unlink()
