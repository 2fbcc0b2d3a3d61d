"""What the compiler did, to read: reports and graphs as text."""

from __future__ import annotations

from fxsp.inspection.printer import format_graph
from fxsp.inspection.report_text import format_report
from fxsp.inspection.wire import format_bytes

__all__ = ["format_bytes", "format_graph", "format_report"]
