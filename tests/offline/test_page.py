"""The page of an explanation: it stands alone, holds what the explanation holds, and works in a real browser.

The browser is any Chromium on the machine (``chromium``, ``google-chrome``, or what ``FXSP_BROWSER`` names).
Without one, the structure of the page is tested all the same.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import fxsp
import small

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


#: Does what a reader would do, and writes down what the page looks like.
VISIT = """<script>
const seen = {};
const rows = () => document.querySelectorAll("#tree .row").length;
const visible = (node) => node.checkVisibility();
seen.folded = rows();
for (let i = 0; i < 9; i++)
  for (const box of document.querySelectorAll("#tree details:not([open])")) {
    box.open = true;
    box.dispatchEvent(new Event("toggle"));
  }
seen.unfolded = rows();
seen.shown = [...document.querySelectorAll("#tree .row")].filter(visible).length;
document.querySelector("#tree details details").open = false;
seen.less = [...document.querySelectorAll("#tree .row")].filter(visible).length;
document.getElementById("fold").click();
seen.again = rows();
seen.background = getComputedStyle(document.body).backgroundColor;
seen.ink = getComputedStyle(document.body).color;
seen.wide = document.documentElement.scrollWidth > window.innerWidth;
seen.loaded = performance.getEntriesByType("resource").length;
const lanes = document.getElementById("lanes");
const pixels = lanes.getContext("2d").getImageData(0, 0, lanes.width, lanes.height).data;
seen.drawn = pixels.filter((_, i) => i % 4 === 3 && pixels[i] > 0).length;
document.body.dataset.seen = JSON.stringify(seen);
</script></body>"""


def _visit(path: Path, folder: Path, *flags: str) -> tuple[dict[str, Any], str]:
    """What a visit of the page sees, and its document afterwards."""
    assert BROWSER is not None
    page = folder / "visit.html"
    page.write_text(path.read_text().replace("</body>", VISIT))
    command = [BROWSER, *FLAGS.split(), f"--user-data-dir={folder}/profile", "--disable-component-update"]
    command += ["--disable-sync", "--virtual-time-budget=4000", *flags, "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    dom = done.stdout
    assert 'data-ready="yes"' in dom, "the script of the page failed"
    seen = re.search(r'data-seen="([^"]*)"', dom)
    assert seen is not None, "the visit failed"
    return json.loads(html.unescape(seen[1])), dom


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine (FXSP_BROWSER names one)")
def test_in_a_browser(path: Path, tmp_path: Path, explanation: fxsp.Explanation) -> None:
    light, dom = _visit(path, tmp_path, "--blink-settings=preferredColorScheme=1")
    assert dom.count('class="card"') == 4
    assert "A&lt;/script&gt;&lt;b&gt;&amp;B on 2 ranks" in dom
    assert ">all_to_all</span>" in dom
    assert "cumsum" in dom
    assert "applied [2, 5, 8] along 1" in dom
    assert dom.count("<details") >= 3  # the model, its blocks folded
    program = explanation.results[0].program
    assert program is not None
    assert light["folded"] == light["again"] < light["unfolded"]
    computed = [node for node in program.graph.nodes if node.op != "placeholder"]
    assert light["unfolded"] == light["shown"] == len(computed)
    assert light["less"] < light["shown"]
    assert light["loaded"] == 0
    assert light["drawn"] > 1000
    assert not light["wide"]
    dark, _ = _visit(path, tmp_path, "--blink-settings=preferredColorScheme=0", "--window-size=500,900")
    assert _brightness(light["background"]) > 200 > 100 > _brightness(dark["background"])
    assert _brightness(light["ink"]) < 100 < 200 < _brightness(dark["ink"])
    assert not dark["wide"], "on a narrow screen nothing sticks out"


def _brightness(color: str) -> float:
    return sum(map(int, re.findall(r"\d+", color)[:3])) / 3


def test_gradients_and_notes(tmp_path: Path) -> None:
    e = fxsp.explain(small.Model(), small.inputs(), world_size=2, plan=small.SPLIT)
    reader = Reader()
    reader.feed(e.to_html(tmp_path / "page.html").read_text())
    graph = json.loads(reader.data)["graphs"][0]
    assert sum(c[7] for c in graph["backward"]) == sum(sent for _, sent in e.communication_backward.values())
    assert "backward" in graph["cards"][0][2]
    assert graph["letters"] == "P = 2; S = 5 tokens of <root>[x]"
