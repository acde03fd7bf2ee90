"""JSON that every reader takes: NaN and infinity, which JSON lacks, are written as text, and come back as numbers."""

from __future__ import annotations

import json
import math
from typing import Any

__all__ = ["json_text"]


def json_text(value: Any, *, indent: int | None = None, ascii_only: bool = True) -> str:
    """A JSON text; NaN and infinity become ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``.

    Pydantic and ``float()`` read these words as the numbers they were.

    Args:
        value: what :mod:`json` takes.
        indent: spaces per level; None for one line.
        ascii_only: writes other characters as escapes, so that none of them can do anything to a terminal.
    """
    return json.dumps(_finite(value), indent=indent, ensure_ascii=ascii_only, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        if math.isnan(value):
            return "NaN"
        return value if math.isfinite(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
