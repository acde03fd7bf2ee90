"""One sentence, with what to do, for everything that the system or a library says when a file cannot be written."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qdexport.errors import OutputError, QdExportError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "STORAGE_ERRORS",
    "output_errors",
    "scratch_failure",
    "scratch_folder",
    "unexplained_failure",
    "write_failure",
]

_ELSEWHERE: Final = "choose another output folder"
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_ADVICE: Final = {
    errno.ENOSPC: f"free some space or {_ELSEWHERE}",
    errno.EDQUOT: f"your share of the disk is used up: remove files of yours there or {_ELSEWHERE}",
    errno.EROFS: _ELSEWHERE,
    errno.EACCES: _ELSEWHERE,
    errno.EPERM: _ELSEWHERE,
    errno.ENOTDIR: f"a part of this path is a file, not a folder; {_ELSEWHERE}",
    errno.EISDIR: "a folder has the name of a file that has to be written; move it away",
    errno.EEXIST: f"something else has this name; move it away or {_ELSEWHERE}",
    errno.ENOTEMPTY: f"something else was put there meanwhile; move it away or {_ELSEWHERE}",
    errno.ENOENT: f"its folder cannot be made, or was removed meanwhile; run the same command again or {_ELSEWHERE}",
    errno.ENAMETOOLONG: "choose an output folder with a shorter name",
    errno.ELOOP: f"the links in this path lead in a circle; {_ELSEWHERE}",
    errno.EINVAL: f"the file system does not take this name or this kind of file; {_ELSEWHERE}",
    errno.EMFILE: "let this process open more files (`ulimit -n 4096`) and run the same command again",
    errno.ENFILE: "the whole machine has too many files open; close programs and run the same command again",
    errno.EFBIG: f"let files be larger (`ulimit -f unlimited`), or {_ELSEWHERE} on a file system that takes them",
    errno.EIO: f"the disk does not answer as it should (see `dmesg`); {_ELSEWHERE} on another disk",
    errno.EBUSY: "another program uses it; close that and run the same command again",
    errno.ETXTBSY: "another program runs it; close that and run the same command again",
    errno.ENODEV: f"the disk is gone; attach it again or {_ELSEWHERE}",
    errno.ESTALE: "the network file system lost it; run the same command again when it is back",
    errno.ETIMEDOUT: "the network file system does not answer; run the same command again when it does",
    errno.ENOTSUP: f"this file system cannot do that; {_ELSEWHERE} on a local disk",
    errno.ENOMEM: "memory is short; close programs, or use fewer workers, and run the same command again",
}
# what a library may hide in an error of its own; others (a file that is not there) are more often about what is read
STORAGE_ERRORS: Final = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG}
)
_NUMBER: Final = re.compile(r"\(os error (\d+)\)|\bOs \{ code: (\d+)")  # Rust: safetensors, tokenizers
# numpy.tofile and torch.save count the bytes that arrived and do not say why they are too few
_SHORT: Final = re.compile(r"\d+ requested and \d+ written|file write failed|unexpected pos \d+ vs \d+|iostream error")
_NEARLY_FULL: Final = 1 << 20
_scratch_folders: set[Path] = set()  # of :func:`scratch_folder`, while they are there


@contextlib.contextmanager
def output_errors(path: Path, needs: int | None = None) -> Iterator[None]:
    """Turns what the system says while ``path`` is written, directly or through a library, into ``OutputError``.

    Args:
        path: the file or folder that is written.
        needs: bytes that it will have, where that is known; a full disk is then said with it.

    Raises:
        OutputError: the message names the path, the reason and what to do.
    """
    try:
        yield
    except QdExportError:
        raise
    except Exception as error:
        failure = write_failure(error, path, needs)
        if failure is None:
            raise
        raise failure from error


@contextlib.contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """A folder for temporary files (below ``TMPDIR``), removed in the end.

    Raises:
        OutputError: temporary files cannot be written.
    """
    try:
        made = tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True)
    except OSError as error:
        raise OutputError(_no_scratch(error.strerror or str(error), _scratch())) from error
    folder = Path(made.name)
    _scratch_folders.add(folder)
    try:
        with made, output_errors(folder):
            yield folder
    finally:
        _scratch_folders.discard(folder)


def write_failure(error: BaseException, path: Path | None = None, needs: int | None = None) -> OutputError | None:
    """The ``OutputError`` for an error that came from writing; None for one that has another reason.

    Args:
        error: of the system, or of a library around one of the system's.
        path: what was written, where that is known.
        needs: bytes that it will have, where that is known.
    """
    found = _system_error(error, path)
    if found is None:
        return None
    number, file = found
    reason = "permission denied" if number in {errno.EACCES, errno.EPERM} else os.strerror(number)
    scratch = _scratch()
    if scratch is not None and _is_in_scratch(number, file or path, path, scratch):
        return OutputError(_no_scratch(reason, scratch))
    if file is not None and path is not None and not _near(file, path):
        return OutputError(f"cannot use {file}, which is needed to write {path}: {reason}")
    advice = _ADVICE.get(number, _ELSEWHERE) + (_room(path or file, needs) if number in _FULL else "")
    return OutputError(f"cannot write {path or file or 'a file, or where the output goes'}: {reason}; {advice}")


def scratch_failure(error: BaseException) -> OutputError | None:
    """The ``OutputError`` for an error that says that there is no folder for temporary files; None for another."""
    behind: BaseException | None = error
    for _ in range(20):  # chains of contexts can be circular
        if behind is None:
            break
        if isinstance(behind, FileNotFoundError) and "usable temporary directory" in str(behind):
            return OutputError(_no_scratch("no folder takes them"))
        behind = behind.__cause__ or behind.__context__
    return None


def unexplained_failure(path: Path) -> OutputError:
    """The ``OutputError`` for a write that ended early, of which nobody said why: a full disk, or a limit."""
    number = _why_short(path)
    failure = write_failure(OSError(number, os.strerror(number)), path)
    return failure or OutputError(f"cannot write {path}")


def _system_error(error: BaseException, path: Path | None) -> tuple[int, Path | None] | None:
    """The number that the system gave, and the file it named; of the error itself or of what is behind it."""
    if isinstance(error, OSError) and error.errno:
        name = error.filename
        return error.errno, Path(os.fsdecode(name)) if isinstance(name, str | bytes | os.PathLike) else None
    seen: set[int] = set()
    behind: BaseException | None = error
    while behind is not None and id(behind) not in seen:
        seen.add(id(behind))
        number = _number_in(behind)
        if number is not None:
            return number, None
        if _SHORT.search(str(behind)):
            return _why_short(path), None
        behind = behind.__cause__ or behind.__context__
    return None


def _number_in(error: BaseException) -> int | None:
    text = str(error)
    if isinstance(error, OSError) and error.errno in STORAGE_ERRORS:
        return error.errno
    for match in _NUMBER.finditer(text):
        number = int(match[1] or match[2])
        if number != errno.ENOENT:  # of a file that is read
            return number
    return next((number for number in STORAGE_ERRORS if os.strerror(number) in text), None)


def _why_short(path: Path | None) -> int:
    """Why fewer bytes arrived than were written: a full disk, or a limit on the size of files."""
    free = _free(path)
    limited = resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY
    return errno.EFBIG if limited and (free is None or free > _NEARLY_FULL) else errno.ENOSPC


def _is_in_scratch(number: int, file: Path | None, path: Path | None, scratch: Path) -> bool:
    """Whether it was the folder of temporary files that could not be written, and not ``path``."""
    if file is not None and any(file.is_relative_to(folder) for folder in _scratch_folders):
        return True
    if path is None or path.is_relative_to(scratch):  # a user's own folder may lie there
        return path is None and file is not None and file.is_relative_to(scratch)
    if file != path:
        return file is not None and file.is_relative_to(scratch)
    here, there = _free(path), _free(scratch)
    return number in _FULL and here is not None and there is not None and there < _NEARLY_FULL <= here


def _near(file: Path, path: Path) -> bool:
    """Whether a file is ``path``, something in it, or a temporary file beside it."""
    return file.is_relative_to(path) or file.parent == path.parent or path.is_relative_to(file)


def _scratch() -> Path | None:
    try:
        return Path(tempfile.gettempdir())
    except OSError:
        return None


def _no_scratch(reason: str, scratch: Path | None = None) -> str:
    where = f"in {scratch}: {reason}" if scratch else f": {reason}"
    return f"cannot write temporary files {where}; free some space there, or set TMPDIR to a folder that has some"


def _room(path: Path | None, needs: int | None) -> str:
    """What is free, and what is needed."""
    free = _free(path)
    said = [f"{_size(free)} are free"] if free is not None else []
    said += [f"about {_size(needs)} are needed"] if needs else []
    return f" ({', '.join(said)})" if said else ""


def _free(path: Path | None) -> int | None:
    """Free bytes where ``path`` is, or will be."""
    for folder in (path, *path.parents) if path is not None else ():
        with contextlib.suppress(OSError):
            return shutil.disk_usage(folder).free
    return None


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
