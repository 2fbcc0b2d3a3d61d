"""The shape of the code base: imports point one way, private torch API has one door, files stay short.

Which files exist is read from the tree.  A file that no layer names may stand anywhere, as long as nothing that it
imports, directly or not, leads from a lower layer to a higher one.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: Folder -> the package that it is installed as.
PACKAGES = {"fxsp": "fxsp", "passes": "fxsp.passes", "kernels": "fxsp.kernels"}
#: From the bottom up: rooms, each a folder or a file.  A folder stands for all modules in it, but for those of a room
#: that is named itself.  Imports lead to a lower layer, or stay in a room; rooms of one layer do not know each other.
LAYERS = [
    ("fxsp.errors", "fxsp.known_devices", "fxsp.lengths", "fxsp.parts", "fxsp.torch_internals"),
    ("fxsp.source", "fxsp.summands", "fxsp.types"),
    ("fxsp.device", "fxsp.kernels", "fxsp.plan", "fxsp.process_groups", "fxsp.report"),
    ("fxsp.machine", "fxsp.passes.graph"),
    ("fxsp.capture", "fxsp.config", "fxsp.measured", "fxsp.cost.flops", "fxsp.passes.builder", "fxsp.passes.emit"),
    ("fxsp.calibration", "fxsp.passes.base", "fxsp.passes.rules"),
    ("fxsp.ranks", "fxsp.simulation.reference", "fxsp.passes.special"),
    ("fxsp.simulation", "fxsp.passes.attention"),
    ("fxsp.passes.masks", "fxsp.passes.propagate", "fxsp.passes.work"),
    ("fxsp.passes.infer", "fxsp.passes.verify"),
    ("fxsp.passes.accounting", "fxsp.passes.normalize"),
    ("fxsp.passes.annotate", "fxsp.passes.functionalize"),
    ("fxsp.passes.capture",),
    ("fxsp.passes.partition",),
    ("fxsp.passes.pipeline",),
    ("fxsp.cost",),
    ("fxsp.inspection",),
    ("fxsp.inner",),
    ("fxsp.said", "fxsp.telling"),
    ("fxsp.partitioning",),
    ("fxsp.split_values",),
    ("fxsp.model_report",),
    ("fxsp.backend", "fxsp.offline", "fxsp.parallel"),
    ("fxsp.hooks",),
    ("fxsp.__main__",),
]
#: Nothing but names of what lies below.
FRONT = ("fxsp", "fxsp.passes", "fxsp.kernels")
LIMIT = 400
#: Files of tests, which stay short too.
TESTS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*.py"))
#: The one file that may touch private torch API: a section per area, as long as it has to be.
DOOR = "fxsp.torch_internals"
#: Private by name, but part of what a graph consists of: pytrees of arguments, symbolic sizes, names of operators.
OPEN = ("torch.utils._pytree", "torch.utils._sympy", "torch.ops.", "torch._ops")


@cache
def modules() -> dict[str, Path]:
    """Installed module name -> its file."""
    found = {}
    for folder, package in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            if parts[-1] == "__init__":
                parts.pop()
            found[".".join(parts)] = path
    return found


def imported_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every dotted name that is imported anywhere in a file, function bodies included, and its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import on line {node.lineno}"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def dependencies(name: str) -> dict[str, int]:
    """The modules of ours that a module imports, and the line."""
    found: dict[str, int] = {}
    for dotted, line in imported_names(parsed(modules()[name])):
        target = dotted
        while target and target not in modules():  # `from fxsp.types import Shard` names fxsp.types
            target = target.rpartition(".")[0]
        if target and target != name:
            found.setdefault(target, line)
    return found


def room(name: str) -> tuple[int, str] | None:
    """The layer and the room of a module: that of the longest name that it, or a folder around it, has."""
    rooms = [(level, member) for level, members in enumerate(LAYERS) for member in members]
    found = [r for r in rooms if name == r[1] or name.startswith(f"{r[1]}.")]
    return max(found, key=lambda r: len(r[1]), default=None)


def test_the_tree_is_read() -> None:
    assert {"fxsp.errors", "fxsp.passes.base", "fxsp.kernels"} <= set(modules())
    assert "fxsp.types" in dependencies("fxsp.passes.base")
    for members in LAYERS:
        for member in members:
            assert any(room(name) == (LAYERS.index(members), member) for name in modules()), f"{member} is empty"


@pytest.mark.parametrize("name", [name for name in modules() if name not in FRONT])
def test_imports_point_down(name: str) -> None:
    mine = room(name)
    assert mine is not None, f"{name} is in no room: give it one in LAYERS"
    for target, line in dependencies(name).items():
        other = room(target)
        if other is None or other == mine:
            assert other is not None or target in FRONT, f"{target} is in no room"
            continue
        assert other[0] < mine[0], f"line {line}: {name} of layer {mine[0]} imports {target} of layer {other[0]}"


def test_no_cycles() -> None:
    done: set[str] = set()
    path: list[str] = []

    def visit(name: str) -> None:
        if name in path:
            raise AssertionError(f"import cycle: {' -> '.join([*path[path.index(name) :], name])}")
        if name not in done:
            path.append(name)
            for target in dependencies(name):
                visit(target)
            path.pop()
            done.add(name)

    for name in modules():
        visit(name)


def private_torch(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Dotted torch names with a private part, imported or spelled out."""
    dotted = list(imported_names(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            parts, value = [node.attr], node.value
            while isinstance(value, ast.Attribute):
                parts.append(value.attr)
                value = value.value
            if isinstance(value, ast.Name):
                dotted.append((".".join([value.id, *reversed(parts)]), node.lineno))
    for name, line in dotted:
        private = any(part.startswith("_") and not part.endswith("__") for part in name.split("."))
        if name.startswith("torch.") and private and not name.startswith(OPEN):
            yield name, line


@pytest.mark.parametrize("name", modules())
def test_private_torch_api_has_one_door(name: str) -> None:
    if name == DOOR or name.startswith(f"{DOOR}."):
        return
    offenders = [
        f"{modules()[name].relative_to(ROOT)}:{line}: {dotted}"
        for dotted, line in private_torch(parsed(modules()[name]))
    ]
    assert not offenders, f"wrap these in {DOOR}: {offenders}"


def test_private_torch_api_is_recognised() -> None:
    source = "import torch\nfrom torch._guards import X\ndef f():\n    import torch._dynamo as d\n    torch._C.y\n"
    assert [name for name, _ in private_torch(ast.parse(source))] == [
        "torch._guards.X",
        "torch._dynamo",
        "torch._C.y",
        "torch._C",
    ]
    assert not list(private_torch(ast.parse("import torch\ntorch.ops._c10d_functional.all_reduce\ntorch.__version__")))


@pytest.mark.parametrize(
    "path",
    sorted(p for d in ("fxsp", "passes", "kernels", "tests", "examples") for p in (ROOT / d).rglob("*.py")),
    ids=str,
)
def test_no_bare_passes_or_kernels(path: Path) -> None:
    for name, line in imported_names(parsed(path)):
        assert name.partition(".")[0] not in ("passes", "kernels"), f"line {line}: import fxsp.{name}"


@pytest.mark.parametrize("name", [*(name for name in modules() if name != DOOR), *TESTS])
def test_files_stay_short(name: str) -> None:
    lines = len(modules().get(name, ROOT / name).read_text().splitlines())
    assert lines <= LIMIT, f"{lines} lines: past {LIMIT} a file is two ideas"
