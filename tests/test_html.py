"""The page of an explanation: it stands alone, holds what the explanation holds, and works in a real browser.

The browser is any Chromium on the machine (``chromium``, ``google-chrome``, or what ``FXSP_BROWSER`` names).
Without one, the structure of the page is tested all the same.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import small
import torch

import fxsp

BROWSER = os.environ.get("FXSP_BROWSER") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
VOID = {"meta", "input", "link", "br", "img", "hr"}


class Reader(HTMLParser):
    """Checks that elements close, and collects ids, addresses and the data."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.data = ""
        self._in_data = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        if known.get("id"):
            self.ids.append(str(known["id"]))
        self.addresses += [str(v) for k, v in attrs if k in ("src", "href")]
        self._in_data = known.get("id") == "data"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self._in_data = False

    def handle_data(self, data: str) -> None:
        if self._in_data:
            self.data += data


@pytest.fixture(scope="module")
def explanation() -> fxsp.Explanation:
    class Hostile(small.Model):
        """Its name must not end the page's data."""

    Hostile.__qualname__ = Hostile.__name__ = "A</script><b>&B"
    with torch.no_grad():
        return fxsp.explain(Hostile(mix=True), small.inputs(), world_size=2, plan=small.SPLIT)


@pytest.fixture(scope="module")
def path(explanation: fxsp.Explanation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return explanation.to_html(tmp_path_factory.mktemp("page") / "page.html")


def test_structure(path: Path, explanation: fxsp.Explanation) -> None:
    text = path.read_text()
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert len(reader.ids) == len(set(reader.ids))
    assert reader.addresses == []
    assert not re.search(r"https?://|@import|url\(", text)
    assert "prefers-color-scheme: dark" in text
    data = json.loads(reader.data)
    graph = data["graphs"][0]
    assert [c[0] for c in graph["collectives"]] == [c.value for c in explanation.collectives]
    assert all(".py:" in c[3] for c in graph["collectives"])
    names = {row[0] for row in graph["rows"]}
    assert {span[0] for span in graph["time"]} <= names
    assert {span[0] for span in graph["time"] if span[3]} == {c.value for c in explanation.collectives}
    assert all(start < end for _, start, end, _ in graph["time"])


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine (FXSP_BROWSER names one)")
def test_in_a_browser(path: Path, tmp_path: Path) -> None:
    assert BROWSER is not None
    command = [BROWSER, *FLAGS.split(), f"--user-data-dir={tmp_path}/profile", "--disable-component-update"]
    command += ["--disable-sync", "--virtual-time-budget=4000", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    dom = done.stdout
    assert 'data-ready="yes"' in dom, "the script of the page failed"
    assert dom.count('class="card"') == 4
    assert "A&lt;/script&gt;&lt;b&gt;&amp;B on 2 ranks" in dom
    assert ">all_to_all</span>" in dom
    assert "cumsum" in dom
    assert "applied [2, 5, 8] along 1" in dom
    assert dom.count("<details") >= 3  # the model, its blocks folded
    assert 'class="row' in dom
