"""Folders that commands write single files into (pictures, bit plans, graphs of passes), among files of the user's.

``.qdexport.json`` in such a folder lists what qdexport wrote there. A file that it does not list, or that was changed
since, is the user's: it is never overwritten, and the command is refused before its work begins.
"""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Final

from qdexport.core.digests import file_sha256
from qdexport.core.files import write_json
from qdexport.core.lock import locked, real_folder
from qdexport.core.replace import sweep
from qdexport.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

__all__ = ["LISTING", "refuse_overwriting", "written_into"]

LISTING: Final = ".qdexport.json"


@contextlib.contextmanager
def written_into(folder: Path, names: Sequence[str]) -> Iterator[None]:
    """Inside the block this process alone writes these files into a folder; in the end they are known as ours.

    Args:
        folder: made when absent; may be a link to a folder.
        names: files that will be written, relative to the folder.

    Raises:
        OutputError: one of them is there and is the user's, or another process writes into the folder.
    """
    real_folder(folder)
    _refuse(folder, names)  # before anything is written there
    with locked(folder):
        sweep(folder)
        known = _refuse(folder, names)
        write_json(folder / LISTING, {"written": known | dict.fromkeys(names, "")})
        try:
            yield
        finally:
            made = {name: file_sha256(folder / name) for name in names if (folder / name).is_file()}
            write_json(folder / LISTING, {"written": known | made})


def refuse_overwriting(path: Path, is_ours: Callable[[Path], bool]) -> None:
    """Refuses a single file that is there already and not of the kind that would be written.

    Args:
        path: as the user gave it.
        is_ours: whether a file that exists is one that qdexport wrote.

    Raises:
        OutputError: it is the user's, a folder, or a link to nowhere.
    """
    if path.is_symlink() and not path.exists():
        raise OutputError(f"{path} is a link to {path.readlink()}, which is not there; choose another name")
    if path.is_dir():
        raise OutputError(f"{path} is a folder; name a file")
    if path.exists() and not (path.is_file() and is_ours(path)):
        raise OutputError(f"{path} exists and was not written by qdexport; move it elsewhere, or choose another name")


def _refuse(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """What is known as ours; refuses where one of the names is something else."""
    known = _read(folder)
    for name in names:
        path = folder / name
        for place in (path, *path.parents):
            if place == folder:
                break
            if place.is_symlink():
                raise OutputError(f"{place} is a link, which is not followed; remove it, or choose another folder")
        if not path.exists():
            continue
        if not path.is_file() or name not in known:
            raise OutputError(f"{path} was not written by qdexport; move it elsewhere, or choose another folder")
        if known[name] not in ("", file_sha256(path)):
            raise OutputError(
                f"{path} was changed since qdexport wrote it; move it elsewhere to keep it, or choose another folder"
            )
    return known


def _read(folder: Path) -> dict[str, str]:
    path = folder / LISTING
    if path.is_symlink() or not path.is_file():
        return {}
    try:
        written = json.loads(path.read_text(encoding="utf-8"))["written"]
        return {str(name): str(digest) for name, digest in written.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # damaged: nothing there is known, so nothing is overwritten
