"""Every Python block of the README and of the pages runs, and what is shown as its output is its output.

A block marked ``python torchrun`` is a script for two processes, any other one for a single process.  A block marked
``text output`` shows lines of what the block before it printed, in order; ``...`` stands for lines left out, or for the
end of a line.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass
class Block:
    line: int
    ranks: int
    code: str
    output: list[str]
    page: Path = README

    def __str__(self) -> str:
        return f"{self.page.name}, line {self.line}"


def blocks(text: str, page: Path = README) -> list[Block]:
    """The Python blocks of a page, each with the output shown after it."""
    found: list[Block] = []
    for match in _FENCE.finditer(text):
        info, body = match.groups()
        if info.startswith("python"):
            assert info in ("python", "python torchrun"), f"what does {info!r} mean?"
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(line, 2 if info.endswith("torchrun") else 1, body, [], page))
        elif info == "text output":
            found[-1].output = body.splitlines()
    return found


def missing_line(shown: list[str], printed: str) -> str | None:
    """The first line that is shown but was not printed (after those before it)."""
    lines = iter([" ".join(line.split()) for line in printed.splitlines()])
    for line in shown:
        wanted = " ".join(line.split())
        if wanted in ("", "..."):
            continue
        start = wanted.removesuffix(" ...")
        if not any(got == wanted or (start != wanted and got.startswith(start)) for got in lines):
            return line  # `lines` goes on behind the last line that matched
    return None


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for page in PAGES for b in blocks(page.read_text(), page)], ids=str)
def test_block(block: Block, tmp_path: Path) -> None:
    script = tmp_path / ("readme.py" if block.page == README else "page.py")
    script.write_text(block.code)
    launcher = [sys.executable]
    if block.ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={block.ranks}"]
        launcher += ["--local-ranks-filter=0"]  # both print
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONWARNINGS")}
    environment["OMP_NUM_THREADS"] = "1"
    command = [*launcher, str(script)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    missing = missing_line(block.output, done.stdout)
    assert missing is None, f"{block}, does not print\n{missing}\nbut\n{done.stdout}"


def test_the_page_is_read() -> None:
    page = "a\n```python\nx\n```\n```text output\nprinted\n```\n```sh\nls\n```\n```python torchrun\ny\n```\n"
    assert blocks(page) == [Block(2, 1, "x\n", ["printed"]), Block(11, 2, "y\n", [])]
    assert any(block.ranks == 2 for block in blocks(README.read_text()))


def test_missing_lines_are_found() -> None:
    printed = "first\n  second  x\nthird\n"
    assert missing_line(["first", "...", "third"], printed) is None
    assert missing_line(["second x"], printed) is None
    assert missing_line(["sec ...", "third"], printed) is None
    assert missing_line(["third", "first"], printed) == "first"
    assert missing_line(["fourth"], printed) == "fourth"


def test_no_machine_in_the_page() -> None:
    assert not re.search(
        r"/(tmp|home|work|root|opt|Users)/|https?://(?!github\.com/huggingface|pytorch\.org)", README.read_text()
    )
