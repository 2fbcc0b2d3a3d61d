"""What is installed: the wheel, the entry point, and what an import drags in."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def run(code: str, cwd: Path, *path: Path) -> str:
    """The output of a fresh interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path:
        environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads: it leaves folders behind."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("fxsp", "passes", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    return source


def build(kind: str, source: Path, out: Path) -> Path:
    run(f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})", source)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", source, tmp_path_factory.mktemp("sdist"))


def test_the_wheel_holds_the_mapped_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {"fxsp/py.typed", *(f"fxsp/offline/render/static/page.{kind}" for kind in ("html", "css", "js"))}
    for folder, target in (("fxsp", "fxsp"), ("passes", "fxsp/passes"), ("kernels", "fxsp/kernels")):
        for path in (ROOT / folder).rglob("*.py"):
            expected.add(f"{target}/{path.relative_to(ROOT / folder).as_posix()}")
    assert names == expected


def test_the_wheel_works_where_it_is_unpacked(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "import fxsp.passes.base, fxsp.kernels; print(fxsp.passes.__file__, fxsp.kernels.__file__, sep='\\n')"
    passes, kernels = run(code, tmp_path, tmp_path).splitlines()
    assert Path(passes) == tmp_path / "fxsp" / "passes" / "__init__.py"
    assert Path(kernels) == tmp_path / "fxsp" / "kernels" / "__init__.py"


def test_the_sdist_makes_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    assert {"README.md", "LICENSE", "pyproject.toml"} <= {path.name for path in unpacked.iterdir()}
    (tmp_path / "wheel").mkdir()
    again = build("wheel", unpacked, tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_pip_installs_it(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Into an empty folder, without network; with the torch that is there it works."""
    target = tmp_path / "target"
    command = ["install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    command += ["--target", str(target), str(request.getfixturevalue(kind))]
    run(f"import runpy, sys; sys.argv = ['pip', *{command!r}]; runpy.run_module('pip', run_name='__main__')", tmp_path)
    code = (
        "import importlib.metadata as m, torch, fxsp\n"
        "fast = torch.compile(torch.nn.Linear(2, 2), backend='sp', options={'inner': 'eager'})\n"
        "place = m.distribution('fxsp').locate_file('')\n"
        "print(fxsp.__file__, fxsp.__version__, place, list(fast(torch.ones(1, 2)).shape))"
    )
    file, version, place, shape = run(code, tmp_path, target).split(maxsplit=3)
    assert Path(file) == target / "fxsp" / "__init__.py"
    assert version == importlib.metadata.version("fxsp")
    assert Path(place) == target
    assert shape == "[1, 2]"


def test_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("/METADATA"))
        metadata = archive.read(name).decode()
        assert any(n.endswith("/licenses/LICENSE") for n in archive.namelist())
    assert "Requires-Python: >=3.11" in metadata
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert sorted(re.findall(r"^Requires-Dist: (\w+)", "\n".join(required), re.MULTILINE)) == ["sympy", "torch"]


def test_the_backend_is_found_by_name() -> None:
    (entry,) = importlib.metadata.entry_points(group="torch_dynamo_backends", name="sp")
    assert entry.value == "fxsp.backend:sp"
    assert callable(entry.load())
    assert "sp" in torch.compiler.list_backends()


def test_the_import_is_light(tmp_path: Path) -> None:
    # torch's own Dynamo looks whether there is a Triton; what fxsp adds to it counts.
    code = (
        "import sys, torch._dynamo\n"
        "before = set(sys.modules)\n"
        "import fxsp\n"
        "added = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(added & {'diffusers', 'transformers', 'triton', 'kernels', 'passes'}))"
    )
    assert run(code, tmp_path) == "[]"


LOADED = "print(sorted(m for m in sys.modules if m in ('sympy', 'torch._dynamo') or m.partition('.')[0] == 'fxsp'))\n"


def test_the_compiler_is_loaded_when_it_is_used(tmp_path: Path) -> None:
    code = f"""
import sys, torch, fxsp
{LOADED}
fxsp.SequenceParallelInput(split_dim=1), fxsp.PlanError, dir(fxsp)
print([m for m in ('sympy', 'torch._dynamo', 'fxsp.backend', 'fxsp.passes') if m in sys.modules])
torch.compiler.list_backends()
print('fxsp.backend' in sys.modules)
torch.compile(torch.nn.Linear(2, 2), backend="sp")
print('fxsp.backend' in sys.modules)
"""
    assert run(code, tmp_path).splitlines() == ["['fxsp', 'fxsp.errors']", "[]", "False", "True"]


@pytest.mark.parametrize(
    ("before", "compiled"),
    [
        ("", 'torch.compile(model, backend="sp", options=options)'),
        ("import fxsp", "model"),
        ('torch.compile(torch.nn.Linear(8, 8), backend="eager")(x)', "model"),
    ],
)
def test_the_first_call_is_like_any_other(before: str, compiled: str, tmp_path: Path) -> None:
    """What watches Dynamo is in place when it traces the first frame, whatever was loaded before."""
    code = f"""
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(8, 8)
    def forward(self, x):
        return self.inner(x).relu()
model, x = Model(), torch.randn(1, 9, 8)
options = {{"inner": "eager"}}
{before}
import fxsp
options["plan"] = {{"inner": {{"input": fxsp.SequenceParallelInput(split_dim=1)}}}}
if {compiled!r} == "model":
    model.compile(backend="sp", options=options)
with torch.no_grad():
    {compiled}(x)
(report,) = fxsp.report_of(model).graphs
print([record.applied for record in report.report.plan], [record.kind for record in report.report.collectives])
"""
    assert run(code, tmp_path).splitlines()[-1] == "[True] ['all_gather']"


def test_the_lazy_names_are_those_of_the_type_checker() -> None:
    import fxsp

    (checked,) = (n for n in ast.parse(Path(fxsp.__file__).read_text()).body if isinstance(n, ast.If))
    names = {(a.name, n.module) for n in checked.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert {name for name, _ in names} == set(fxsp._HOMES) == set(fxsp.__all__) - set(fxsp.errors.__all__)
    for name, module in names:
        assert getattr(fxsp, name) is getattr(importlib.import_module(str(module)), name), name
    assert not hasattr(fxsp, "nothing_of_that_name")


def test_the_folders_do_not_shadow(tmp_path: Path) -> None:
    """From the top folder, where a bare ``import kernels`` would find ours, nobody imports it, twice or at all."""
    code = (
        "import sys, diffusers, transformers, fxsp.kernels, fxsp.passes\n"
        "import diffusers.models.attention_dispatch\n"
        "print([m for m in sys.modules if m.partition('.')[0] in ('kernels', 'passes')])"
    )
    assert run(code, ROOT) == "[]"


def test_the_front_door() -> None:
    import fxsp
    from fxsp.inspection.report_text import format_report

    assert fxsp.__version__ == importlib.metadata.version("fxsp")
    assert {"explain", "report_of", "whole", "Options", "PlanError", "__version__"} <= set(dir(fxsp))
    assert not [name for name in dir(fxsp) if not hasattr(fxsp, name)]
    report = fxsp.Report(notes=["said once"])
    assert str(report) == format_report(report)
    assert "said once" in str(report)
