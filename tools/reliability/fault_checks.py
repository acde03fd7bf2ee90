"""What must hold after a fault: how the command ended, what is left, and what the same command does next."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from reliability.fault_lab import Ended, Lab, Point, tree

__all__ = ["Try", "afterwards", "code_of", "ending", "leftovers", "new_place", "old_or_new", "said", "users_lost"]

Try = Callable[[Lab, Path], list[str]]


def old_or_new(lab: Lab, out: Path) -> Iterator[str]:
    """What must hold after a run that was stopped, before the next one."""
    for folder in ("checkpoint", "onnx", "golden"):
        found = {name: digest for name, digest in tree(out).items() if name.startswith(f"{folder}/")}
        clean = [
            {name: digest for name, digest in tree(lab.clean[recipe]).items() if name.startswith(f"{folder}/")}
            for recipe in ("old", "new")
        ]
        hidden = any(out.glob(f".qdexport-old.{folder}"))  # two renames: the next run heals it
        # what was made from something that changes is removed, file by file
        parts = folder != "checkpoint" and any(found.items() <= whole.items() for whole in clean)
        if found not in clean and not hidden and not parts:
            yield f"{folder}/ is neither old nor new"


def afterwards(lab: Lab, verb: str, out: Path) -> Iterator[str]:
    """What must hold after the same command once more."""
    again = lab.run(*lab.verb(verb, out))
    yield from code_of(again, 0)
    changes = verb in ("quantize", "compile")
    wanted = tree(lab.clean["new" if changes else "old"])
    if verb == "quantize":
        wanted = {name: digest for name, digest in wanted.items() if name.startswith("checkpoint/")}
    have = tree(out)
    different = sorted(name for name, digest in wanted.items() if have.get(name) != digest and not name.startswith("."))
    if different:
        yield f"after the next run {different[0]} is not that of a clean one ({len(different)} files)"
    yield from users_lost(lab, out)
    if left := leftovers(out):
        yield f"after the next run there is still {left}"


def users_lost(lab: Lab, out: Path) -> list[str]:
    return [f"the user's {name} is gone" for name in lab.users if not (out / name).is_file()]


def leftovers(out: Path) -> list[str]:
    known = {".calibration", ".lock", ".search"}
    return sorted(path.name for path in out.rglob(".*") if path.name not in known)


def code_of(ended: Ended, *allowed: int) -> list[str]:
    return [] if ended.code in allowed else [f"exit {ended.code}: {ended.message[:200]}"]


def ending(ended: Ended, *allowed: int) -> list[str]:
    """An ending with a documented code, one sentence and no traceback."""
    wrong = code_of(ended, *allowed)
    if "Traceback" in ended.text or "traceback:" in ended.text:
        wrong.append(f"a traceback: {ended.message[:200]}")
    sentences = [line for line in ended.text.splitlines() if line.startswith(("Error: ", "Interrupted."))]
    if ended.code != 0 and len(sentences) != 1:
        wrong.append(f"{len(sentences)} sentences: {ended.message[:200]}")
    return wrong


def said(point: Point) -> str:
    name = Path(point.path)
    parts = [part if not part.startswith(".qdexport") else "(new)" for part in name.parts]
    return f"`{point.call}` {point.number} of {'/'.join(parts[-2:])}"


@contextlib.contextmanager
def new_place() -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
