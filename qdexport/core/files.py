"""Files that are whole or absent: atomic writes."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qdexport.core.json_text import json_text
from qdexport.core.replace import NEW, files_below, keep_others, remove_tree, replace_folder, sync_folder, sync_tree
from qdexport.core.writing import output_errors

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

__all__ = ["Owner", "atomic_dir", "atomic_path", "write_json", "write_text"]

_NAME_SHOWN, _SUFFIX_SHOWN = 30, 20  # characters of a temporary file's name that say what it will be


class Owner(Protocol):
    """Knows which files of a folder are ours; all others are the user's, and stay."""

    def ours(self, folder: Path) -> Collection[str]:
        """Names, relative to the folder, of the files in it that qdexport wrote."""

    def claim(self, paths: Collection[Path]) -> None:
        """Notes files that are about to be written, before they are there."""


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling of ``path``; it replaces ``path`` only if the block ends without an error.

    Raises:
        OutputError: the folder is read-only, the disk is full, or the path cannot be created.
    """
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=NEW, suffix=_ending(path), dir=path.parent)
        os.close(handle)
    partial = Path(name)
    try:
        with output_errors(path):
            yield partial
            with partial.open("rb") as written:
                os.fsync(written.fileno())
            partial.chmod(0o666 & ~_umask())
            partial.replace(path)
            sync_folder(path.parent)
    finally:
        remove_tree(partial)


@contextlib.contextmanager
def atomic_dir(path: Path, owner: Owner | None = None) -> Iterator[Path]:
    """Yields a temporary sibling folder; it replaces the folder ``path`` only if the block ends without an error.

    Args:
        path: the folder; an old one is replaced in one step, and removed afterwards.
        owner: says which files of the old one are ours; the others stay in the new one. None: all are.

    Raises:
        OutputError: the parent folder is read-only, the disk is full, or a file of the user's is in the way.
    """
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=NEW, suffix=f".{path.name[:_NAME_SHOWN]}", dir=path.parent))
    try:
        with output_errors(path):
            yield partial
            partial.chmod(0o777 & ~_umask())
            if owner is not None:
                owner.claim([path / name for name in files_below(partial)])
                keep_others(path, partial, owner.ours(path))
            sync_tree(partial)
            replace_folder(partial, path)
    finally:
        remove_tree(partial)  # what was half written, or the old folder


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically. Raises ``OutputError`` as :func:`atomic_path`."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically, two spaces of indent, keys in the given order; NaN and infinity as text."""
    write_text(path, json_text(value, indent=2, ascii_only=False) + "\n")


def _ending(path: Path) -> str:
    """Of the temporary file: its name, and the suffix by which libraries choose a format."""
    return f".{path.stem[:_NAME_SHOWN]}{path.suffix[:_SUFFIX_SHOWN]}"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
