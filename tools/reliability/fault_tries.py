"""Rows of the table of faults in which a run is stopped, or the system refuses something."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reliability.fault_checks import Try, afterwards, code_of, ending, leftovers, old_or_new
from reliability.fault_lab import USERS, Break, Lab, Point, killed_at, limited, signalled_at

__all__ = [
    "breaking",
    "first",
    "full",
    "in_weights",
    "limit",
    "no_tmp",
    "nohup",
    "read_only",
    "thrice",
    "two_renames",
]


def breaking(verb: str, broken: Break, code: int, *, tidy: bool = False, or_done: bool = False) -> Try:
    def try_it(lab: Lab, place: Path) -> list[str]:
        out = lab.copy(place)
        ended = lab.run(*lab.verb(verb, out), watch=out, broken=broken)
        allowed = (code, 0) if or_done else (code,)
        wrong = ending(ended, *allowed) if code >= 0 else code_of(ended, *allowed)
        left = leftovers(out) if tidy else []
        wrong += [f"left half written: {left}"] if left else []
        return [*wrong, *old_or_new(lab, out), *afterwards(lab, verb, out)]

    return try_it


def in_weights(number: int) -> Try:
    def patch() -> None:
        import qdexport.quant.stream as stream

        real, count = stream._checked, [0]

        def checked(*arguments: Any) -> Any:
            count[0] += 1
            if count[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        stream._checked = checked  # type: ignore[assignment]

    def try_it(lab: Lab, place: Path) -> list[str]:
        out = lab.copy(place)
        ended = lab.run(*lab.verb("quantize", out), before=patch)
        return [*code_of(ended, -signal.SIGKILL), *old_or_new(lab, out), *afterwards(lab, "quantize", out)]

    return try_it


def first(number: int) -> Try:
    def try_it(lab: Lab, place: Path) -> list[str]:
        out = place / "out"
        ended = lab.run(*lab.quantize("new", out), watch=out, broken=killed_at(number))
        wrong = code_of(ended, -signal.SIGKILL)
        again = lab.run(*lab.quantize("new", out))
        left = leftovers(out)
        return [*wrong, *code_of(again, 0), *([f"left: {left}"] if left else [])]

    return try_it


def thrice(lab: Lab, place: Path) -> list[str]:
    out, wrong = lab.copy(place), []
    for number in (25, 40, 12):
        wrong += code_of(lab.run(*lab.verb("quantize", out), watch=out, broken=killed_at(number)), -signal.SIGKILL, 0)
    return [*wrong, *afterwards(lab, "quantize", out)]


def two_renames(lab: Lab, place: Path) -> list[str]:
    def patch() -> None:
        from qdexport.core import replace

        replace._exchanged = lambda *_: False

    def broken(point: Point) -> None:
        if point.call == "rename" and point.path.endswith("/checkpoint") is False and ".qdexport-new." in point.path:
            os.kill(os.getpid(), signal.SIGKILL)

    out = lab.copy(place)
    ended = lab.run(*lab.verb("quantize", out), watch=out, broken=broken, before=patch)
    hidden = [] if any(out.glob(".qdexport-old.checkpoint")) else ["the fault was not injected"]
    exported = lab.run("export", out)  # reads the checkpoint, so it must have been put back
    return [*code_of(ended, -signal.SIGKILL), *hidden, *code_of(exported, 0), *afterwards(lab, "quantize", out)]


def nohup(number: int) -> Try:
    def try_it(lab: Lab, place: Path) -> list[str]:
        out = lab.copy(place)

        def ignore() -> None:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

        broken = signalled_at(number, signal.SIGHUP)
        return code_of(lab.run(*lab.verb("quantize", out), watch=out, broken=broken, before=ignore), 0)

    return try_it


def limit(size: int) -> Try:
    def try_it(lab: Lab, place: Path) -> list[str]:
        out = lab.copy(place)
        log = place / "log"  # what the command prints is a file here, too, and must stay below the limit
        ended = lab.run(*lab.verb("quantize", out), before=limited(max(size, 1_000)))
        log.unlink(missing_ok=True)
        return [*ending(ended, 10), *old_or_new(lab, out), *afterwards(lab, "quantize", out)]

    return try_it


@contextlib.contextmanager
def _file_system(place: Path, size: str) -> Iterator[Path | None]:
    """A small file system of its own; None where this process may not mount one."""
    folder = place / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], capture_output=True, check=False)


def full(lab: Lab, place: Path) -> list[str]:
    with _file_system(place, "4m") as folder:
        if folder is None:
            return ["not tried: mounting is not allowed here"]
        out = Path(shutil.copytree(lab.clean["old"], folder / "out"))
        for name in USERS:
            (out / name).write_text("the user's")
        (folder / "filler").write_bytes(b"")
        free = shutil.disk_usage(folder).free - 60_000
        (folder / "filler").write_bytes(b"x" * free)
        ended = lab.run(*lab.verb("quantize", out))
        wrong = ending(ended, 10)
        if str(out) not in ended.text:
            wrong.append(f"does not name the folder: {ended.message[:200]}")
        (folder / "filler").unlink()
        return [*wrong, *old_or_new(lab, out), *afterwards(lab, "quantize", out)]


def read_only(lab: Lab, place: Path) -> list[str]:
    with _file_system(place, "4m") as folder:
        if folder is None:
            return ["not tried: mounting is not allowed here"]
        out = Path(shutil.copytree(lab.clean["old"], folder / "out"))
        for name in USERS:
            (out / name).write_text("the user's")
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], capture_output=True, check=True)
        wrong = [*ending(lab.run(*lab.verb("quantize", out)), 10), *code_of(lab.run("inspect", out), 0)]
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], capture_output=True, check=True)
        return [*wrong, *afterwards(lab, "quantize", out)]


def no_tmp(lab: Lab, place: Path) -> list[str]:
    def patch() -> None:
        def refuse(*_: object, **__: object) -> str:
            raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

        tempfile.gettempdir = refuse

    out = lab.copy(place)
    ended = lab.run(*lab.verb("compile", out), before=patch)
    said = [] if "TMPDIR" in ended.text else [f"does not say TMPDIR: {ended.message[:200]}"]
    return [*ending(ended, 10), *said, *afterwards(lab, "compile", out)]
