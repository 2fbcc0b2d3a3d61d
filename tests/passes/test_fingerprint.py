"""A cache of a compiler must not outlive a change of what its entries were made by."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fxsp.passes.emit.emit import FOLDERS, fingerprint

ROOT = Path(__file__).resolve().parents[2]
#: One file of each folder that holds code of ours.
ONE_EACH = {
    file.parent: file.relative_to(ROOT)
    for folder in ("fxsp", "passes", "kernels")
    for file in sorted((ROOT / folder).rglob("*.py"))
    if file.name != "__init__.py"
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("copy")
    for folder in FOLDERS:
        shutil.copytree(folder, path / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    return path


def _of(root: Path) -> str:
    return fingerprint.__wrapped__(tuple(root / folder.name for folder in FOLDERS))


def test_it_covers_the_folders_of_this_repository() -> None:
    assert [folder.resolve() for folder in FOLDERS] == [ROOT / name for name in ("fxsp", "passes", "kernels")]
    assert {"kernels/attention", "kernels/exchange"} <= {str(file.parent) for file in ONE_EACH.values()}


def test_it_depends_on_nothing_else(copy: Path) -> None:
    assert _of(copy) == fingerprint()


@pytest.mark.parametrize("file", ONE_EACH.values(), ids=str)
def test_a_changed_file_changes_it(copy: Path, file: Path) -> None:
    before, path = _of(copy), copy / file
    text = path.read_text()
    path.write_text(text + "\n# changed\n")
    try:
        assert _of(copy) != before
    finally:
        path.write_text(text)


def test_a_new_a_moved_and_a_removed_kernel_change_it(copy: Path) -> None:
    before, path = _of(copy), copy / "kernels" / "attention" / "new.py"
    path.write_text("")
    new = _of(copy)
    moved = path.rename(copy / "kernels" / "exchange" / "new.py")
    assert len({before, new, _of(copy)}) == 3
    moved.unlink()
    assert _of(copy) == before
