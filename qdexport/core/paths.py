"""Paths that a file names: below the folder that they belong to, or refused.

A manifest, a report, an index of shards, an ONNX file with data beside it, a recipe, a bundle: each holds names of
other files, and each may come from somebody else. Whoever joins such a name with a folder does it here.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

from qdexport.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qdexport.errors import QdExportError

__all__ = ["as_file_name", "below", "why_unsafe"]

_RESERVED: Final = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
_DRIVE: Final = re.compile(r"[A-Za-z]:")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_LONGEST_PART: Final = 255  # bytes; what Linux, macOS and Windows have in common
_LONGEST_NAME: Final = 100
_SHOWN: Final = 80
# the Hugging Face cache keeps a model's files in models--OWNER--NAME/blobs, and its snapshots are links there
_HUB_REPO, _HUB_BLOBS = "models--", "blobs"


def why_unsafe(name: str) -> str | None:
    """Why a name from a file is no path below a folder, on any operating system; None when it is one.

    Args:
        name: with ``/`` between its parts.
    """
    if not name or not PurePosixPath(name).parts:
        return "which is empty"
    if _CONTROL.search(name) or _cannot_be_encoded(name):
        return "which holds characters that no file name has"
    if name.startswith("/") or _DRIVE.match(name):
        return "which is an absolute path"
    if "\\" in name:
        return "which holds a backslash"
    for part in PurePosixPath(name).parts:
        if part == "..":
            return "which leaves that folder"
        if _RESERVED.fullmatch(part) or part.endswith((" ", ".")):
            return "which is no file name on every system"
        if len(part.encode()) > _LONGEST_PART:
            return "which is longer than a file name can be"
    return None


def below(
    root: Path, name: str, named_by: str | Path, *, home: Path | None = None, error: type[QdExportError] = ModelError
) -> Path:
    """The path ``root / name``, made sure to be below ``root``, through links too.

    Links to the blobs of the Hugging Face cache are followed: its snapshots consist of them.

    Args:
        root: the folder that the name is relative to.
        name: from a file.
        named_by: that file, for the message.
        home: a folder around ``root`` that links may lead into; None: ``root`` alone.
        error: raised when the name is refused.

    Returns:
        The path; nothing needs to be there.

    Raises:
        ModelError: (or ``error``) the name is empty, absolute, leaves the folder by ``..`` or through a link, or is no
            file name on every system.
    """
    reason = why_unsafe(name)
    if reason is None:
        path = root / PurePosixPath(name)
        if _stays_inside(path, [root] if home is None else [root, home]):
            return path
        reason = "which is a link that leaves that folder"
    raise error(
        f"{named_by} names {_shown(name)}, {reason}; only what is below {root} is used. "
        "Get the files again from whom you trust"
    )


def as_file_name(text: str, otherwise: str) -> str:
    """One part of a path, made from a name that can be anything: letters, digits and ``._+@-`` stay, all else is ``_``.

    Args:
        text: a model's or a recipe's name.
        otherwise: taken when nothing is left.
    """
    name = re.sub(r"[^\w.+@-]+", "_", text).strip("._ ")
    while len(name.encode()) > _LONGEST_NAME:
        name = name[:-1]
    name = name.strip("._ ")
    if not name:
        return otherwise
    return f"_{name}" if _RESERVED.fullmatch(name) else name


def _stays_inside(path: Path, roots: Sequence[Path]) -> bool:
    try:
        real, homes = path.resolve(), [root.resolve() for root in roots]
    except (OSError, RuntimeError):  # a circle of links; RuntimeError before Python 3.13
        return False
    in_cache = real.parent.name == _HUB_BLOBS and real.parent.parent.name.startswith(_HUB_REPO)
    return any(map(real.is_relative_to, homes)) or (in_cache and path.is_symlink())


def _cannot_be_encoded(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return True
    return False


def _shown(name: str) -> str:
    text = ascii(name) if _cannot_be_encoded(name) else repr(name)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
