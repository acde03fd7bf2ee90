"""SHA-256 of files, folders and values; what is large and did not change is read once in a run."""

from __future__ import annotations

import hashlib
import json
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["digest_of", "digest_of_files", "file_sha256", "tree_files", "tree_sha256"]

_CHUNK = 1 << 20
# A file's times move in steps: what was written within one step of being hashed may change again and look the same.
# Steps are 10 ms at most on Linux' own file systems, and whole (or two) seconds on some others, which round.
_STEP_NS, _COARSE_STEP_NS = 20_000_000, 2_000_000_000
_WORTH_A_WAIT = 64_000_000  # bytes; such a file takes longer to read again than the wait for the next step

_Seen = tuple[int, int, int, int, int]
_known: dict[_Seen, str] = {}


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal; remembered while the file stays what it is."""
    seen = _seen(path.stat())
    if seen in _known:
        return _known[seen]
    if seen[2] >= _WORTH_A_WAIT and (wait := _settles_in(seen)) > 0:
        time.sleep(min(wait, _COARSE_STEP_NS) / 1e9)
    settled = _settles_in(seen) <= 0
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    found = digest.hexdigest()
    if settled and _seen(path.stat()) == seen:
        _known[seen] = found
    return found


def _seen(stat: os.stat_result) -> _Seen:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _settles_in(seen: _Seen) -> int:
    """Nanoseconds until a change of the file would show in its times."""
    changed = max(seen[3:])
    step = _COARSE_STEP_NS if changed % 1_000_000_000 == 0 else _STEP_NS
    return changed + step - time.time_ns()


def tree_files(path: Path) -> dict[str, str]:
    """The SHA-256 of every file in a folder, by its name relative to it."""
    files = sorted(item for item in path.rglob("*") if item.is_file())
    return {file.relative_to(path).as_posix(): file_sha256(file) for file in files}


def tree_sha256(path: Path) -> str:
    """One SHA-256 over a folder: the names (relative, sorted) and contents of all its files; of a file, its own."""
    return file_sha256(path) if path.is_file() else digest_of_files(tree_files(path))


def digest_of_files(files: Mapping[str, str]) -> str:
    """One SHA-256 over the names of files and their digests."""
    digest = hashlib.sha256()
    for name in sorted(files, key=lambda name: name.split("/")):
        digest.update(f"{name}\0{files[name]}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def digest_of(*values: Any) -> str:
    """A SHA-256 over JSON-able values, independent of the order of dictionary keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
