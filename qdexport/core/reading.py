"""The boundary to files of users: whatever a library raises about one becomes one message with its exit code.

A file from elsewhere can make a library raise anything, so a list of exception types is never complete. What is read
stands inside :func:`reading`, which takes all of them; a mistake of ours in there is not hidden either, because the
command line keeps the traceback of what our own code raised (:func:`is_ours`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from qdexport.errors import ModelError, QdExportError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

__all__ = ["TEXT_LIMIT", "is_ours", "read_bytes", "read_json_file", "read_record", "read_text", "reading", "reason"]

_T = TypeVar("_T", bound=BaseModel)
TEXT_LIMIT = 64_000_000  # bytes; the longest text that users bring, the index of a sharded checkpoint, has a tenth
_RECORD_LIMIT = 1_000_000_000  # of our own files, whose length is that of a network
_LONGEST = 400
_PACKAGE = Path(__file__).resolve().parents[1]
_ROOTS = tuple(
    os.path.join(os.path.realpath(folder), "") for folder in (_PACKAGE, _PACKAGE / "passes", _PACKAGE / "plugins")
)
_ALLOCATOR = re.compile(r"you tried to allocate (\d+) bytes")


@contextlib.contextmanager
def reading(
    source: object, kind: type[QdExportError] = ModelError, remedy: str = "", *, what: str = "cannot be read"
) -> Iterator[None]:
    """Turns whatever is raised inside the block into one message; errors that are meant for users pass through.

    Args:
        source: the file or what else the user gave; begins the message.
        kind: the error, and with it the exit code.
        remedy: ends the message.
        what: what failed.

    Raises:
        kind: anything but a ``QdExportError`` was raised.
    """
    try:
        yield
    except QdExportError:
        raise
    except Exception as error:
        told = f"{source}{what and ' '}{what}: {reason(error)}"
        if isinstance(error, FileNotFoundError) and error.filename in {str(source), source}:
            told = f"{source} does not exist"
        raise kind(f"{told}; {remedy}" if remedy else told) from error


def reason(error: BaseException) -> str:
    """What an exception says, in one sentence that a user understands."""
    if (wanted := _ALLOCATOR.search(str(error))) is not None:
        return f"there is not enough memory for {int(wanted[1]) / 1e9:,.1f} GB more"
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 text (byte {error.start})"
    if isinstance(error, ValidationError):
        return _first_problem(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    if text.endswith(":") and len(lines) > 1:
        text = f"{text} {lines[1]}"  # the first line is a heading (torch's load_state_dict)
    if "integer string conversion" in text:
        return "a number in it has thousands of digits"
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    plain = isinstance(error, ValueError | OSError) or type(error) is RuntimeError
    return text if text and plain else f"{type(error).__name__}: {text}".removesuffix(": ")


def is_ours(error: BaseException | None) -> bool:
    """Whether an exception looks like a mistake in qdexport: our own code raised it, and not about a value."""
    about_values = OSError | ValueError | ImportError | MemoryError | RecursionError | OverflowError
    if error is None or isinstance(error, about_values) or type(error).__module__ != "builtins":
        return False
    frame: TracebackType | None = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    file = "" if frame is None else os.path.realpath(frame.tb_frame.f_code.co_filename)
    return file.startswith(_ROOTS)


def read_bytes(
    path: Path, kind: type[QdExportError] = ModelError, remedy: str = "", *, limit: int = TEXT_LIMIT
) -> bytes:
    """Reads a whole file. A pipe or a device is refused, since it may never end.

    Raises:
        kind: the file is missing, no regular file, or longer than ``limit``.
    """
    # without O_NONBLOCK the mere opening of a pipe waits for its writer
    with reading(path, kind, remedy), open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:
        state = os.fstat(stream.fileno())
        if not stat.S_ISREG(state.st_mode):
            raise OSError("it is a pipe or a device, not a file")
        if state.st_size > limit:
            raise ValueError(f"it has {state.st_size / 1e6:,.0f} MB, such a file has at most {limit / 1e6:,.0f}")
        return stream.read(limit + 1)


def read_text(path: Path, kind: type[QdExportError] = ModelError, remedy: str = "", *, limit: int = TEXT_LIMIT) -> str:
    """Reads a file of UTF-8 text; raises as :func:`read_bytes`, and for other text."""
    data = read_bytes(path, kind, remedy, limit=limit)
    with reading(path, kind, remedy):
        return data.decode("utf-8-sig")


def read_record(cls: type[_T], path: Path, kind: type[QdExportError] = ModelError, remedy: str = "") -> _T:
    """Reads a JSON file of ours; raises as :func:`read_bytes`, and for anything but such a record."""
    data = read_bytes(path, kind, remedy, limit=_RECORD_LIMIT)
    with reading(path, kind, remedy, what=f"is no {cls.__name__} of qdexport"):
        return cls.model_validate_json(data)


def read_json_file(
    path: Path, kind: type[QdExportError] = ModelError, remedy: str = "", *, limit: int = TEXT_LIMIT
) -> Any:
    """Reads a JSON file; raises as :func:`read_text`, and for anything that is no JSON."""
    text = read_text(path, kind, remedy, limit=limit)
    with reading(path, kind, remedy, what="is not JSON"):
        return json.loads(text)


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
