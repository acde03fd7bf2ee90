"""Puts a new file or folder in the place of an old one, so that a stop at any moment leaves one of the two.

A folder cannot be replaced by a rename as a file can. Where the file system exchanges two names in one step
(``renameat2`` with ``RENAME_EXCHANGE``: ext4, xfs, btrfs, tmpfs), that is done. Elsewhere the old folder is renamed to
``.qdexport-old.NAME``, then the new one to ``NAME``; :func:`sweep` puts the old one back when a run was killed between.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qdexport.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

__all__ = [
    "NEW",
    "OLD",
    "files_below",
    "is_leftover",
    "keep_others",
    "remove_tree",
    "replace_folder",
    "sweep",
    "sync_folder",
    "sync_tree",
]

logger = logging.getLogger(__name__)

NEW: Final = ".qdexport-new."
OLD: Final = ".qdexport-old."
_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2
# the kernel or the file system does not exchange names: EINVAL and the like; EPERM comes from some sandboxes
_NO_EXCHANGE: Final = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}
# some network and user-space file systems cannot sync a folder
_NO_FOLDER_SYNC: Final = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EACCES}


def is_leftover(name: str) -> bool:
    """Whether a file or folder of this name is something that a killed run of qdexport left half written."""
    return name.startswith((NEW, OLD))


def replace_folder(new: Path, path: Path) -> None:
    """Puts the folder ``new`` at ``path``; an old one there is then at ``new``, or gone.

    Args:
        new: beside ``path``; complete, and on the disk.
        path: a folder, or nothing.

    Raises:
        OSError: neither is changed.
    """
    if not os.path.lexists(path):
        new.rename(path)
    elif not _exchanged(new, path):
        old = path.with_name(OLD + path.name)
        remove_tree(old)
        try:
            path.rename(old)
            new.rename(path)
        except BaseException:  # an interrupt, too: the old one goes back
            if not os.path.lexists(path):
                old.rename(path)
            raise
        remove_tree(old)
    sync_folder(path.parent)


def keep_others(old: Path, new: Path, ours: Collection[str]) -> None:
    """Gives the new folder what is in the old one and not ours: a second name of the same file, or a copy.

    Nothing of the old folder changes, so that it stays whole when the run is stopped here.

    Args:
        old: the folder that will be replaced; may be absent.
        new: the folder that will take its place.
        ours: names, relative to the old folder, of the files that are not kept.

    Raises:
        OutputError: the new folder has a file of that name.
        OSError: it cannot be written.
    """
    for name in files_below(old):
        if name in ours:
            continue
        target = new / name
        if os.path.lexists(target):
            raise OutputError(f"{old / name} is in the way and was not written by qdexport; move it elsewhere")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(old / name, target, follow_symlinks=False)
        except OSError:  # no second names on this file system
            shutil.copy2(old / name, target, follow_symlinks=False)


def files_below(folder: Path) -> list[str]:
    """The names of all files and links below a folder, relative to it, sorted; links are not followed."""
    return sorted(
        Path(parent, name).relative_to(folder).as_posix()
        for parent, folders, files in os.walk(folder)
        for name in [*files, *(item for item in folders if Path(parent, item).is_symlink())]
    )


def sweep(root: Path) -> list[Path]:
    """Removes what killed runs left half written below a folder, and puts an old folder back whose new one never came.

    Only for who holds the folder's lock. Links are not followed.

    Returns:
        What was removed or put back.
    """
    found = []
    for path in _leftovers(root):
        found.append(path)
        if path.name.startswith(OLD):
            home = path.with_name(path.name.removeprefix(OLD))
            if home.name and not os.path.lexists(home):
                logger.info("%s: put back, a run was stopped while it replaced it", home)
                path.rename(home)
                continue
        remove_tree(path)
    if found:
        logger.info("%s: tidied up %d things that a stopped run had left half done", root, len(found))
    return found


def remove_tree(path: Path) -> None:
    """Removes a folder or a file that is ours; what cannot be removed is said, and left for the next run."""
    if not os.path.lexists(path):
        return
    try:
        if path.is_dir() and not path.is_symlink():
            _remove_folder(path)
        else:
            path.unlink()
    except OSError as error:
        logger.warning("%s cannot be removed (%s); remove it by hand", path, error.strerror)


def _remove_folder(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except KeyboardInterrupt:  # what replaced it is there already: a moment more, and nothing is left over
        shutil.rmtree(path, ignore_errors=True)
        raise


def sync_tree(folder: Path) -> None:
    """Brings the files below a folder, and the folders, to the disk."""
    for parent, _, files in os.walk(folder):
        for name in files:
            file = Path(parent, name)
            if not file.is_symlink() and file.is_file():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
        sync_folder(Path(parent))


def sync_folder(folder: Path) -> None:
    """Brings a folder's list of names to the disk, where the file system can."""
    try:
        handle = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    except PermissionError:  # one may write names into a folder that one may not read
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(handle)


def _leftovers(root: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(root):
        ours = [name for name in folders if is_leftover(name)]
        folders[:] = [name for name in folders if not is_leftover(name)]
        yield from (Path(parent, name) for name in [*ours, *filter(is_leftover, files)])


def _exchanged(one: Path, other: Path) -> bool:
    """Whether two names were exchanged in one step; False where that cannot be done.

    Raises:
        OSError: it could be done, and the system refuses it.
    """
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2  # glibc 2.28 and later
    except (AttributeError, OSError):
        return False
    function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    if function(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))
