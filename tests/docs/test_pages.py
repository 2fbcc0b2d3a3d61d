"""The pages of docs/: links lead somewhere, options are those of the code, and the site has every page."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *sorted(DOCS.glob("*.md"))]
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors(text: str) -> set[str]:
    """The anchors of the headings of a page, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", _FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken(page: Path, text: str) -> list[str]:
    """The links of a page that lead nowhere; those to other machines must be https."""
    found = []
    for link in _LINK.findall(_FENCED.sub("", text)):
        if "://" in link:
            if not link.startswith("https://"):
                found.append(link)
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        outside = page.parent == DOCS and target.parent != DOCS  # no part of the site
        known = target.is_file() and not outside
        if not known or (anchor and anchor not in anchors(text if target == page else target.read_text())):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    assert broken(page, page.read_text()) == []


def test_broken_links_are_found() -> None:
    page = "# A b, c\n[x](plans.md) [y](nowhere.md) [z](#a-b-c) [w](#d) [o](../README.md) [p](http://example.org)\n"
    assert broken(DOCS / "index.md", page) == ["nowhere.md", "#d", "../README.md", "http://example.org"]
    assert broken(DOCS / "index.md", "[x](plans.md#plans) [y](plans.md#nothing)") == ["plans.md#nothing"]


def test_the_site_has_every_page() -> None:
    named = re.findall(r"[\w]+\.md", (ROOT / "mkdocs.yml").read_text())
    assert sorted(named) == sorted(page.name for page in DOCS.glob("*.md"))


def test_options_are_those_of_the_code() -> None:
    sys.path.insert(0, str(DOCS))
    try:
        import generate
    finally:
        sys.path.remove(str(DOCS))
    assert (DOCS / "options.md").read_text() == generate.options_page(), "run python docs/generate.py"


def test_options_have_a_row_each() -> None:
    import fxsp

    rows = re.findall(r"^\| `(\w+)` \| .* \| .+ \| .{10,} \|$", (DOCS / "options.md").read_text(), re.MULTILINE)
    assert rows == fxsp.Options.names()


def test_messages_are_those_of_the_code() -> None:
    """Of each message in the first column; what differs from case to case is left out as ``...``."""
    source = "\n".join(
        path.read_text() for name in ("fxsp", "passes", "kernels") for path in (ROOT / name).rglob("*.py")
    )
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # literals that follow one another
    rows = re.findall(r"^\| (`.*?`) \| ", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    pieces = [
        part for row in rows for span in re.findall(r"`([^`]+)`", row) for part in re.split(r"\s*\.\.\.\s*|: ", span)
    ]
    assert len(pieces) > 25
    assert [part for part in pieces if part not in source] == []


def test_no_machine_in_the_pages() -> None:
    for page in PAGES:
        assert not re.search(r"/(tmp|home|work|root|opt|Users)/", page.read_text()), page.name
