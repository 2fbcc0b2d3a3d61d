"""Where a graph node comes from, in the user's words: a source line and a module path."""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
import types
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fxsp import torch_internals

__all__ = [
    "clean_module_path",
    "describe",
    "forward_source",
    "input_name",
    "input_names",
    "is_of_module",
    "line_of",
    "module_path",
    "node_source",
    "place",
    "user_frame",
    "warn",
]

_TORCH = Path(torch.__file__).resolve().parent
#: It is traced in place of code of torch.
_STAND_IN = Path(__file__).resolve().parent / "capture" / "encoder_paths.py"
_FRAME = re.compile(r'^\s*File "(?P<file>[^"]+)", line (?P<line>\d+)', re.MULTILINE)
#: The root object of a Dynamo source: a local, a global, an item of either (the first of a decorator's ``*args``), or
#: the innermost argument of nested ``getattr`` calls.
_ROOT = re.compile(r"^[LG]\[(?:'[^']*'|\"[^\"]*\")\](?:\[\d+\])?")
_GETATTR = re.compile(r"^getattr\((?P<base>.*), (?P<quote>['\"])(?P<name>.*)(?P=quote)\)$")
_PART = re.compile(r"\.?(?P<name>\w+)|\[(?P<quote>['\"]?)(?P<key>.*?)(?P=quote)\]")
_OF_MODULE = re.compile(r"_modules\b|_parameters\b|_buffers\b")
#: How a source reaches a submodule, and wrappers that add a level the user did not write.
_NOISE = frozenset(
    "__dict__ _modules _parameters _buffers _orig_mod _checkpoint_wrapped_module _fsdp_wrapped_module "
    "cell_contents".split()
)


def node_source(node: torch.fx.Node, *, full: bool = False) -> str:
    """``"file.py:123"``: the innermost line outside torch in ``node.meta["stack_trace"]``; ``""`` if there is none.

    ``full=True`` keeps the directory of the file.
    """
    trace = node.meta.get("stack_trace")
    if not isinstance(trace, str):
        return ""
    frames = [(m["file"], m["line"]) for m in _FRAME.finditer(trace)]
    outside = [frame for frame in frames if not _in_torch(frame[0])]
    if not outside:
        return ""
    file, line = outside[-1]
    return f"{file if full else Path(file).name}:{line}"


def user_frame() -> types.FrameType | None:
    """The innermost frame that is under way in code of the user: of neither torch nor fxsp; None: there is none."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        ours = frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "fxsp", "contextlib")
        if not ours and not frame.f_code.co_filename.startswith("<"):
            return frame
        frame = frame.f_back
    return None


def warn(warning: Warning, *, first: bool = True) -> None:
    """Warn at the user's line: that of :func:`user_frame`.

    What all ranks find out alike is shown by the first of them: on another one (``first=False``) a filter that the
    application set still applies (``-W error`` is an error on all ranks), but by default it is not shown.
    """
    frame = user_frame() or sys._getframe(1)
    names = frame.f_globals
    registry = names.setdefault("__warningregistry__", {})
    with contextlib.nullcontext() if first else warnings.catch_warnings():
        if not first:
            warnings.filterwarnings("ignore", category=type(warning), append=True)
        warnings.warn_explicit(warning, None, frame.f_code.co_filename, frame.f_lineno, names.get("__name__"), registry)


def line_of(frame: types.FrameType | None) -> str:
    """``"model.py:12"``: the line at which a frame is; ``""`` for None."""
    return "" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def forward_source(module: object) -> str:
    """``"model.py:12"``: where the ``forward`` of a module's class is defined; ``""`` for those of torch."""
    forward: Any = getattr(type(module), "forward", None)
    code = getattr(inspect.unwrap(forward), "__code__", None)
    if code is None or _in_torch(code.co_filename):
        return ""
    return f"{Path(code.co_filename).name}:{code.co_firstlineno}"


@lru_cache(maxsize=4096)
def _in_torch(file: str) -> bool:
    path = Path(file).resolve()
    return path.is_relative_to(_TORCH) or path == _STAND_IN


def module_path(node: torch.fx.Node) -> str:
    """The path of the module that the node was traced in, ``"blocks.0.attn"``; ``""`` in the root or when unknown."""
    # AOTAutograd keeps the stack of the forward node, for a backward one, under another name.
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return ""
    innermost = list(stack.values())[-1]
    return clean_module_path(innermost[0] if isinstance(innermost, tuple) else str(innermost))


def place(node: torch.fx.Node) -> str:
    """``"blocks.0.attn (model.py:12)"``, for messages."""
    return f"{module_path(node) or 'the root module'} ({node_source(node) or 'no source line'})"


def is_of_module(source: str) -> bool:
    """Whether a Dynamo source is that of a parameter or buffer."""
    return _OF_MODULE.search(source) is not None


def input_name(source: str) -> str:
    """A Dynamo source of a graph input in the user's words: ``x`` of ``L['x']``, ``blocks.0.qkv.weight``."""
    path = clean_module_path(source)
    if path and (source.startswith(("L['self']", "L['kwargs']")) or _OF_MODULE.search(source)):
        return path
    local = re.match(r"^[LG]\['(\w+)'\](.*)$", source)
    return f"{local[1]}{local[2]}" if local else source


def clean_module_path(source: str) -> str:
    """A Dynamo source as a module path as ``get_submodule`` reads it.

    ``L['self'].__dict__['_modules']['blocks'].0.attn`` and ``L['self']._modules['blocks']._modules['0'].attn`` are both
    ``blocks.0.attn``.  The variable that holds the root (``L['self']``, ``G['model']``) and wrappers are dropped.
    """
    trailing: list[str] = []
    while (match := _GETATTR.match(source)) is not None:
        source = match["base"]
        trailing.insert(0, match["name"])
    source = _ROOT.sub("", source, count=1)
    parts: list[str] = []
    skip_key = False
    for match in _PART.finditer(source):
        name = match["name"] if match["name"] is not None else match["key"]
        if skip_key and match["name"] is None:
            skip_key = False
            continue
        skip_key = name == "__closure__"
        if not skip_key and name not in _NOISE:
            parts.append(name)
    parts += [name for name in trailing if name not in _NOISE]
    return ".".join(parts)


def input_names(gm: torch.fx.GraphModule) -> list[str]:
    """The inputs of Dynamo's graph in the user's words, as far as these are known."""
    nodes = gm.graph.find_nodes(op="placeholder")
    return [input_name(torch_internals.input_source(node)) or str(node.target) for node in nodes]


def describe(node: torch.fx.Node | None) -> str:
    """``add_ in blocks.0.attn (model.py:12)``: an operator, its module and its source line."""
    if node is None:
        return "the graph"
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    if torch_internals.is_operator(node.target):
        target = str(node.target)
    where, line = module_path(node), node_source(node)
    return f"{target}{f' in {where}' if where else ''}{f' ({line})' if line else ''}"
