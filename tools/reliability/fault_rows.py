"""The rows of the table of faults: what is done, what must hold, and whether it did."""

from __future__ import annotations

import errno
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from reliability.fault_checks import Try, new_place, said
from reliability.fault_guests import (
    damaged,
    dangling_out,
    dead_holder,
    dumped,
    foreign,
    held,
    held_pictures,
    held_sweep,
    link,
    linked_out,
    manifest_names,
    notes,
    race,
    recipe_names,
    report_names,
    resumed,
    sampled,
    stage_name,
    struck,
    swept,
)
from reliability.fault_lab import Lab, Point, failing_at, killed_at, signalled_at
from reliability.fault_tries import (
    breaking,
    first,
    full,
    in_weights,
    limit,
    no_tmp,
    nohup,
    read_only,
    thrice,
    two_renames,
)

__all__ = ["Fault", "fault_rows", "few_rows"]

_OLD_OR_NEW: Final = "old or new folders whole; the next run ends with 0, the new results and nothing left over"
_REFUSED: Final = "exit 10, one sentence, before any work; nothing of the user's is changed"


@dataclass(frozen=True, slots=True)
class Fault:
    """One row.

    Attributes:
        group: the kind of fault.
        what: what is done.
        holds: what must hold.
        try_it: does it in an empty folder; returns what is wrong.
    """

    group: str
    what: str
    holds: str
    try_it: Try


def fault_rows(lab: Lab) -> list[Fault]:
    """All rows; the calls that something is broken at are counted in clean runs first."""
    return [
        *_kills(lab),
        *_signals(lab),
        *_errors(lab),
        *_disks(),
        *_links(),
        *_users_files(),
        *_two_writers(),
        *_damages(),
        *_names(),
    ]


def few_rows(lab: Lab) -> list[Fault]:
    """A dozen of them, of the quickest command."""
    points = _points(lab, "quantize")
    kills = [point for point in points if point.call in ("exchange", "replace", "link")]
    old = _OLD_OR_NEW
    return [
        *(
            Fault("kill -9", said(point), old, breaking("quantize", killed_at(point.number), -signal.SIGKILL))
            for point in kills[:4]
        ),
        Fault("signals", "SIGTERM", old, breaking("quantize", signalled_at(9, signal.SIGTERM), 130, tidy=True)),
        Fault("errors", "ENOSPC", old, breaking("quantize", failing_at(6, errno.ENOSPC, from_then_on=True), 10)),
        Fault("disk", "a limit", old, limit(2_000)),
        Fault("links", "checkpoint", _REFUSED, link("checkpoint", verb="quantize")),
        Fault("files of the user", "onnx", _REFUSED, foreign("onnx/model.onnx")),
        Fault("two writers", "quantize", "exit 10", held("quantize")),
        Fault("names in files", "recipe", "below qdexport-out", recipe_names),
        Fault("kill -9", "first", old, first(6)),
    ]


def _points(lab: Lab, verb: str) -> list[Point]:
    if verb in lab.points:
        return lab.points[verb]
    with new_place() as place:
        out = lab.copy(place)
        ended = lab.run(*lab.verb(verb, out), watch=out)
        if ended.code != 0 or not ended.points:
            raise RuntimeError(f"{verb} without a fault ended with {ended.code}: {ended.text}")
        lab.points[verb] = ended.points
        return ended.points


def _some(points: list[Point], count: int) -> list[Point]:
    """About so many of them, evenly, the first and the last among them."""
    step = max(1, len(points) // count)
    return [*points[::step], *(points[-1:] if (len(points) - 1) % step else [])]


def _kills(lab: Lab) -> Iterator[Fault]:
    for verb, count in (("quantize", 30), ("export --force", 8), ("validate --force", 8), ("compile", 8)):
        for point in _some(_points(lab, verb), count):
            what = f"`{verb}` over a finished folder, before {said(point)}"
            yield Fault("kill -9", what, _OLD_OR_NEW, breaking(verb, killed_at(point.number), -signal.SIGKILL))
    for number in (1, 4, 9, 14):
        what = f"`quantize`, in the middle of the weights file, before tensor {number}"
        yield Fault("kill -9", what, _OLD_OR_NEW, in_weights(number))
    for number in (1, 3, 6, 9, 12):
        what = f"first `quantize` into a new folder, before its change {number}"
        yield Fault("kill -9", what, _OLD_OR_NEW, first(number))
    yield Fault("kill -9", "three runs one after the other, each at another call", _OLD_OR_NEW, thrice)
    yield Fault("kill -9", "between the two renames, where names cannot be exchanged", _OLD_OR_NEW, two_renames)


def _signals(lab: Lab) -> Iterator[Fault]:
    holds = f"exit 130, one sentence, nothing half written; {_OLD_OR_NEW}"
    for verb, count in (("quantize", 4), ("compile", 2)):
        for point in _some(_points(lab, verb), count):
            for name in ("TERM", "HUP", "INT"):
                number = getattr(signal, f"SIG{name}")
                what = f"SIG{name} in `{verb}` before {said(point)}"
                yield Fault("signals", what, holds, breaking(verb, signalled_at(point.number, number), 130, tidy=True))
    middle = _points(lab, "quantize")[10].number
    twice = signalled_at(middle, signal.SIGTERM, signal.SIGHUP)
    yield Fault("signals", "SIGTERM, then SIGHUP at once", holds, breaking("quantize", twice, 130, tidy=True))
    yield Fault("signals", "SIGHUP under nohup", "ignored: exit 0", nohup(middle))


def _errors(lab: Lab) -> Iterator[Fault]:
    names = ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EACCES")
    for verb, count in (("quantize", 4), ("compile", 3)):
        for index, point in enumerate(_some(_points(lab, verb), count)):
            for name in names if verb == "quantize" else names[index % 5 :][:1]:
                number = getattr(errno, name)
                what = f"{name} in `{verb}` from {said(point)} on"
                broken = failing_at(point.number, number, from_then_on=True)
                # the last calls remove what was replaced: that this fails is no failure of the command
                try_it = breaking(verb, broken, 10, or_done=True)
                yield Fault("errors", what, f"exit 10, one sentence; {_OLD_OR_NEW}", try_it)


def _disks() -> Iterator[Fault]:
    for size in (0, 2_000, 60_000):
        holds = f"exit 10, one sentence; {_OLD_OR_NEW}"
        yield Fault("disk", f"files of at most {size} bytes (`ulimit -f`)", holds, limit(size))
    holds = "exit 10, one sentence that names the folder; the old results whole; works again afterwards"
    yield Fault("disk", "a file system of 300 kB that fills up", holds, full)
    yield Fault("disk", "a file system that is mounted read-only", holds, read_only)
    holds = "exit 10, one sentence that names TMPDIR; works afterwards"
    yield Fault("disk", "no folder for temporary files", holds, no_tmp)


def _links() -> Iterator[Fault]:
    for name in ("onnx", "checkpoint", "images", "golden", "report.html", "manifest.json", ".calibration", ".lock"):
        yield Fault("links", f"OUT/{name} is a link to a folder or file elsewhere", _REFUSED, link(name))
    yield Fault("links", "OUT/onnx is a link to nowhere", _REFUSED, link("onnx", there=False))
    yield Fault("links", "OUT is a link to a folder", "followed: exit 0, the link stays", linked_out)
    yield Fault("links", "OUT is a link to nowhere", _REFUSED, dangling_out)


def _users_files() -> Iterator[Fault]:
    names = ("onnx/model.onnx", "golden/a.npz", "images/fp/0.png", "checkpoint/x", "a.txt", "manifest.json", ".env")
    for name in names:
        yield Fault("files of the user", f"`quantize --out` into a folder that holds {name}", _REFUSED, foreign(name))
    for verb in ("compile", "export --force", "validate --force"):
        holds = "exit 0; the notes in OUT, onnx/, images/ and checkpoint/ are still there"
        yield Fault("files of the user", f"`{verb}` with notes in the folders of stages", holds, notes(verb))
    yield Fault("files of the user", "a file onnx/model.onnx of the user in OUT", _REFUSED, stage_name)
    holds = "exit 0, the new results; the notes are still there"
    yield Fault("files of the user", "notes in stages' folders, `quantize` with another recipe", holds, struck)
    for name in ("grid.png", "fp/000.png"):
        yield Fault("files of the user", f"`sample --out` where {name} is", _REFUSED, sampled(name))
    yield Fault("files of the user", "`sensitivity --out` where sensitivity.json is", _REFUSED, swept)
    yield Fault("files of the user", "`compile --dump-passes` where a file of that name is", _REFUSED, dumped)


def _two_writers() -> Iterator[Fault]:
    holds = "exit 10: another process is working there"
    for verb in ("quantize", "export --force", "validate --force"):
        yield Fault("two writers", f"`{verb}` while another process holds OUT", holds, held(verb))
    yield Fault("two writers", "`sample` while another process writes the same pictures", holds, held_pictures)
    yield Fault("two writers", "`sensitivity` while another process sweeps into the folder", holds, held_sweep)
    said = "one ends with 0, the other with 0 or 10"
    yield Fault("two writers", "two runs that start together, five times", said, race)
    yield Fault("two writers", "the holder of the lock was killed", "exit 0", dead_holder)


def _damages() -> Iterator[Fault]:
    files = (
        "checkpoint/unet/diffusion_pytorch_model.safetensors", "checkpoint/quantization.safetensors",
        "checkpoint/recipe.yaml", "onnx/model.onnx", "manifest.json", "report.json",
    )  # fmt: skip
    for file in files:
        for how in ("flipped", "cut", "empty", "gone"):
            holds = "the verb ends with one sentence, or makes it anew; then `compile` ends with 0 and clean results"
            holds = holds if (file, how) != ("manifest.json", "gone") else _REFUSED
            yield Fault("damaged artefacts", f"{file} {how}, then `export` and `compile`", holds, damaged(file, how))
    for how in ("flipped", "cut", "empty"):
        holds = "exit 0, the clean results"
        what = f".calibration/calibration.safetensors {how}, then `quantize`"
        yield Fault("damaged artefacts", what, holds, resumed(how))


def _names() -> Iterator[Fault]:
    holds = "a folder beside OUT is untouched; one sentence"
    for name in ("../victim", "/victim", "onnx/../../victim", "onnx\\..\\victim"):
        yield Fault("names in files", f"manifest.json lists an artefact {name!r}", holds, manifest_names(name))
    yield Fault("names in files", "report.json names a network '../victim'", holds, report_names)
    yield Fault("names in files", "a recipe named '../../victim', no --out", "all below qdexport-out", recipe_names)
