"""What the compiler did, to read: reports and graphs as text."""

from __future__ import annotations

from fxsp.inspection.report_text import (
    attention_lines,
    bytes_sent,
    format_bytes,
    format_graph,
    format_report,
    gather_lines,
    local_shape,
    memory_text,
    module_path,
    node_source,
    op_text,
    output_lines,
    places_text,
    plan_lines,
    section,
)

__all__ = [
    "attention_lines",
    "bytes_sent",
    "format_bytes",
    "format_graph",
    "format_report",
    "gather_lines",
    "local_shape",
    "memory_text",
    "module_path",
    "node_source",
    "op_text",
    "output_lines",
    "places_text",
    "plan_lines",
    "section",
]
