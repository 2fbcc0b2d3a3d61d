"""What a version of torch lacks, as an error."""

from __future__ import annotations

import torch


def missing(what: str, error: Exception | None = None) -> RuntimeError:
    """The error where torch has no ``what``, and why (``error``); it names the versions that are supported."""
    reason = f": {error}" if error else ""
    return RuntimeError(f"torch {torch.__version__} has no {what}{reason}; fxsp supports torch 2.11 to 2.15")
