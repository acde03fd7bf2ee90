"""Files that are whole or absent: atomic writes."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdexport.core.json_text import json_text
from qdexport.core.writing import output_errors

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["atomic_dir", "atomic_path", "write_json", "write_text"]

@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling of ``path``; it replaces ``path`` only if the block ends without an error.

    Raises:
        OutputError: the folder is read-only, the disk is full, or the path cannot be created.
    """
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
    partial = Path(name)
    try:
        with output_errors(path):
            yield partial
            with partial.open("rb") as written:
                os.fsync(written.fileno())
            partial.chmod(0o666 & ~_umask())
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling folder; it replaces the folder ``path`` only if the block ends without an error.

    Raises:
        OutputError: the parent folder is read-only, or the disk is full.
    """
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        with output_errors(path):
            yield partial
            partial.chmod(0o777 & ~_umask())
            if path.exists():
                shutil.rmtree(path)
            partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically. Raises ``OutputError`` as :func:`atomic_path`."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically, two spaces of indent, keys in the given order; NaN and infinity as text."""
    write_text(path, json_text(value, indent=2, ascii_only=False) + "\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
