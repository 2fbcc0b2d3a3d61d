"""What `make docs` does to the pages: tests read more from a fence (``python torchrun``) than the site can."""

from __future__ import annotations

import re
from typing import Any

_FENCE = re.compile(r"^```(python|text) \w+$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page with fences that name a language alone."""
    return _FENCE.sub(r"```\1", markdown)
