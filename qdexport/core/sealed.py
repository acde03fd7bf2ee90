"""Small results that survive an interruption, each with a checksum: a damaged one is made again, never used."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

from qdexport.core.digests import digest_of
from qdexport.core.files import write_json
from qdexport.core.json_text import json_text
from qdexport.core.reading import read_bytes
from qdexport.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["read_sealed", "write_sealed"]

logger = logging.getLogger(__name__)

_SEAL = "sha256"


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON object with its checksum, atomically. Raises ``OutputError`` when the folder cannot be written."""
    value = json.loads(json_text(value))  # as it will be read: keys are text
    write_json(path, {**value, _SEAL: digest_of(value)})


def read_sealed(path: Path) -> dict[str, Any] | None:
    """The object that :func:`write_sealed` wrote; None where there is none, or a damaged one, of which a line tells."""
    if not path.exists():
        return None
    try:
        value = json.loads(read_bytes(path))
        if value.pop(_SEAL) == digest_of(value):
            return dict(value)
    except (ModelError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    logger.warning("%s is damaged; what it held is worked out again", path)
    return None
