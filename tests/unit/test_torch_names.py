"""Every name of torch that fxsp takes from its insides is there; a torch that lacks one is told so."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fxsp
import small
import torch_versions
from fxsp import torch_internals
from fxsp.torch_internals import probe, versions

ROOT = Path(__file__).resolve().parents[2]
FILES = [path for path in sorted((ROOT / "fxsp" / "torch_internals").glob("*.py")) if path.name != "probe.py"]
#: Private by name, and not torch's: ours, Python's, or the beginning of a name that is made up.
OTHERS = re.compile(r"_fxsp_|_getframe$|_body$|_$|_[A-Z]$|_lower_version_count_by_$")


def private(tree: ast.AST) -> set[str]:
    """Every identifier ``_x`` that is read from an object that is not ``self``, or written as a string."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            found.add(node.value)
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("torch"):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("_") and not name.endswith("__") and not OTHERS.match(name)}


def test_torch_has_every_name() -> None:
    lacking = [name for name in probe.lacking() if not name.optional]
    assert not lacking, "\n".join(map(str, lacking))
    assert len(probe.names()) > 300


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_probe_forgets_no_private_name(path: Path) -> None:
    source = path.read_text()
    known = {part for name in probe.dotted_names(source, path.name) for part in name.path.split(".")}
    known |= {
        part
        for owner, attributes in probe.ATTRIBUTES.items()
        for part in (*owner.split("."), *re.split(r"[\s|\[\]]+", attributes))
    }
    assert private(ast.parse(source)) <= known


def test_names_are_read_through_imports_and_short_names() -> None:
    source = """
import torch
from torch._guards import TracingContext as Context
C = torch._C
def f(x):
    import torch.distributed as dist
    try:
        from torch._dynamo import variables as v
        v.Old
    except (ImportError, AttributeError):
        return x._version
    try:
        torch._D
    except AttributeError as error:
        raise missing("torch._D", error) from error
    return Context.try_get(), C._functorch.get, dist.DistError, getattr(torch._C._autograd, "_get", None)
def g(torch):
    return torch._not_the_module
"""
    found = {(name.path, name.optional) for name in probe.dotted_names(source, "x.py")}
    assert found == {
        ("torch._guards.TracingContext", False),
        ("torch._C", False),
        ("torch.distributed", False),
        ("torch._dynamo.variables", True),
        ("torch._dynamo.variables.Old", True),
        ("torch._D", False),
        ("torch._guards.TracingContext.try_get", False),
        ("torch._C._functorch.get", False),
        ("torch.distributed.DistError", False),
        ("torch._C._autograd", False),
        ("torch._C._autograd._get", True),
    }


def test_the_probe_finds_what_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.output_graph import OutputGraph, SubgraphTracer

    monkeypatch.delattr(torch._C._functorch, "is_functorch_wrapped_tensor")
    monkeypatch.setitem(probe.ATTRIBUTES, "torch._dynamo.output_graph.OutputGraph", "root_tx a_name_of_tomorrow|x_y")
    gone = [name.path for name in probe.lacking() if not name.optional]
    assert set(gone) == {
        "torch._C._functorch.is_functorch_wrapped_tensor",
        "torch._dynamo.output_graph.OutputGraph.a_name_of_tomorrow|x_y",
    }
    assert not hasattr(OutputGraph, "root_tx")
    assert not hasattr(SubgraphTracer, "lifted_freevars")  # what instances get is found as well


def test_it_prints_and_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe.main() == 0
    assert capsys.readouterr().out.startswith(f"torch {torch.__version__}: {len(probe.names())} names, ")
    monkeypatch.setitem(probe.ATTRIBUTES, "torch.Tensor", "_version _of_tomorrow")
    assert probe.main() == 1
    assert "torch.Tensor._of_tomorrow" in capsys.readouterr().out


def _text(gone: str) -> str:
    return (
        rf"torch {re.escape(torch.__version__)} has no {re.escape(gone)}: .*fxsp supports torch 2\.\d+ to 2\.\d+: "
        r"install one of these, or a release of fxsp that is for this one"
    )


def test_a_compilation_names_what_torch_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.fx.traceback, "preserve_node_meta")
    torch.compiler.reset()
    with pytest.raises(RuntimeError, match=_text("torch.fx.traceback.preserve_node_meta")):
        fxsp.explain(small.Model(), small.inputs(), world_size=2, plan=small.SPLIT)
    torch.compiler.reset()


def _refuses() -> None:
    raise fxsp.PlanError("a plan")


def _lacks() -> None:
    torch_internals.schema(torch.ones(1))


def _is_wrong() -> None:
    raise AttributeError("of another", name="another", obj=torch)


@pytest.mark.parametrize(
    ("failing", "kind", "text"),
    [
        (_refuses, fxsp.PlanError, r"^a plan"),
        (_lacks, RuntimeError, _text("torch.Tensor._schema")),
        (_is_wrong, torch._dynamo.exc.BackendCompilerFailed, "of another"),
    ],
)
def test_errors_of_a_backend_reach_the_user(failing: Callable[[], None], kind: type[Exception], text: str) -> None:
    def backend(gm: torch.fx.GraphModule, inputs: object) -> None:
        with torch_internals.through_dynamo(fxsp.PlanError):
            failing()

    torch.compiler.reset()
    with pytest.raises(kind, match=text):
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))


def test_other_errors_are_not_blamed_on_torch() -> None:
    class Broken:
        __module__ = "torch.nn"

    for wrong in (lambda: Broken().gone, lambda: None.gone, lambda: torch.gone):  # not in the folder
        with pytest.raises(AttributeError) as error:
            wrong()
        assert versions.absence(error.value) is None
    with pytest.raises(AttributeError) as error:
        torch_internals.schema(None)  # in it, but no object of torch
    assert versions.absence(error.value) is None
    with pytest.raises(AttributeError) as error:
        torch_internals.schema(torch.ones(1))
    assert str(versions.absence(error.value)).startswith(f"torch {torch.__version__} has no torch.Tensor._schema: ")


def test_the_range_is_one() -> None:
    first, last = versions.SUPPORTED
    after = f"2.{int(last.partition('.')[2]) + 1}"
    assert f'"torch>={first},<{after}"' in (ROOT / "pyproject.toml").read_text()
    assert f"torch {first} to {last}" in (ROOT / "README.md").read_text()


def test_it_runs_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "fxsp.torch_internals.probe"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_releases_that_are_supported() -> None:
    listed = "torch (2.16.0)\nAvailable versions: 2.16.0, 2.15.0, 2.14.1, 2.13.0+cpu, 2.13.0, 2.11.0, 2.10.0, 1.13.1"
    assert torch_versions.releases(listed) == ["2.11.0", "2.13.0", "2.14.1", "2.15.0"]


def test_what_reversed_gives_of_a_graph_is_made_an_iterator() -> None:
    """Up to 2.12 ``reversed(graph.nodes)`` is a list of nodes, which ``next`` does not take."""
    offenders = [
        f"{path.relative_to(ROOT)}:{number}"
        for folder in ("fxsp", "passes", "kernels")
        for path in (ROOT / folder).rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if "next(reversed(" in line
    ]
    assert not offenders
