"""One writer at a time in a folder."""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING

import filelock

from qdexport.core.writing import write_failure
from qdexport.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["LOCK_FILE", "locked", "real_folder"]

LOCK_FILE = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder, which is made when absent.

    The file ``.lock`` stays there when the lock is released: whoever removes it takes it away from a process that has
    just opened it, and two would then hold locks on different files. The system drops the lock of a process that dies.

    Raises:
        OutputError: the folder cannot be written, or another process holds the lock.
    """
    try:
        real_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / LOCK_FILE)
        with warnings.catch_warnings():
            # a file system without locks: filelock then marks the folder by a file of its own
            warnings.simplefilter("ignore", UserWarning)
            lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise OutputError(f"another process is working in {folder}; wait for it or choose another folder") from error
    except OSError as error:
        raise write_failure(error, folder) or OutputError(f"cannot write {folder}; choose another folder") from error
    try:
        yield
    finally:
        lock.release()


def real_folder(path: Path) -> None:
    """Refuses a path for a folder that is a file or a link to nowhere; a link to a folder is followed.

    Raises:
        OutputError: it is one of these.
    """
    if path.is_symlink() and not path.exists():
        raise OutputError(f"{path} is a link to {path.readlink()}, which is not there; remove it")
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file, not a folder; choose another folder")
