"""Runs the real command line in forked processes and breaks something at a chosen call of the operating system."""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

__all__ = ["Ended", "Lab", "Point", "failing_at", "killed_at", "limited", "signalled_at", "tree"]

_LONGEST_S: Final = 300.0
_RECIPE: Final = """schema_version: 1
name: {name}
rules:
  - {{match: "*", weight: {{bits: {bits}}}, activation: {{bits: 8}}}}
calibration: {{prompts: 2, batch_size: 1, steps: 3}}
validation: {{images: 1, floor_seeds: 1, floor_steps: 1, golden: 1}}
"""

Break = Callable[["Point"], None]


@dataclass(frozen=True, slots=True)
class Point:
    """A call that changes something below the watched folder: its number, from 1, the function, and the path."""

    number: int
    call: str
    path: str


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended: exit code (a signal's number below zero), all that it printed, and its points."""

    code: int
    text: str
    points: list[Point] = field(default_factory=list)

    @property
    def message(self) -> str:
        """Its last line."""
        lines = self.text.strip().splitlines()
        return lines[-1] if lines else ""


class Lab:
    """A model, two recipes, and what a clean run makes of them.

    Args:
        folder: everything is made in it.
        quick: the clean run is ``quantize`` alone.
    """

    def __init__(self, folder: Path, *, quick: bool = False) -> None:
        self.folder = folder
        self.model = _nano(folder / "nano")
        self.recipes = {name: folder / f"{name}.yaml" for name in ("old", "new")}
        for name, bits in (("old", 8), ("new", 6)):
            self.recipes[name].write_text(_RECIPE.format(name=name, bits=bits))
        self.clean: dict[str, Path] = {}
        self.points: dict[str, list[Point]] = {}
        self.users = USERS[:2] if quick else USERS
        for name in ("old", "new"):
            self.clean[name] = folder / f"clean-{name}"
            clean = self.quantize if quick else self.compile
            ended = self.run(*clean(name, self.clean[name]))
            if ended.code != 0:
                raise RuntimeError(f"the clean run ended with {ended.code}: {ended.text}")

    def quantize(self, recipe: str, out: Path, *more: object) -> list[object]:
        """The arguments of ``quantize``."""
        given = ["--recipe", self.recipes[recipe], "--target", "onnxruntime", "--out", out]
        return ["quantize", self.model, *given, *more]

    def compile(self, recipe: str, out: Path, *more: object) -> list[object]:
        """The arguments of ``compile``."""
        return ["compile", *self.quantize(recipe, out, *more)[1:]]

    def verb(self, name: str, out: Path) -> list[object]:
        """A command over the folder of a clean run with the old recipe; the first two change to the new one."""
        return {
            "quantize": self.quantize("new", out),
            "compile": self.compile("new", out),
            "export --force": ["export", out, "--force"],
            "validate --force": ["validate", out, "--force"],
        }[name]

    def copy(self, place: Path, name: str = "old") -> Path:
        """An output folder as a clean run leaves it, with two files of the user's in it."""
        out = Path(shutil.copytree(self.clean[name], place / "out", symlinks=True))
        for file in self.users:
            (out / file).write_text("the user's")
        return out

    def run(
        self,
        *arguments: object,
        watch: Path | None = None,
        broken: Break | None = None,
        before: Callable[[], None] | None = None,
        meanwhile: Callable[[int], None] | None = None,
    ) -> Ended:
        """Runs ``qdexport`` with these arguments.

        Args:
            arguments: of the command line.
            watch: the folder whose changes count as points.
            broken: called in the process before each of these changes.
            before: called in the process before all.
            meanwhile: called here with the number of the process while it runs.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        with tempfile.TemporaryFile() as log, tempfile.TemporaryFile() as trace:
            pid = os.fork()
            if pid == 0:
                _child([str(item) for item in arguments], log.fileno(), (watch, trace.fileno(), broken), before)
            if meanwhile is not None:
                meanwhile(pid)
            status = _wait(pid)
            log.seek(0)
            trace.seek(0)
            text, lines = log.read().decode(errors="replace"), trace.read().decode(errors="replace").splitlines()
        points = [Point(number, *line.split("\t", 1)) for number, line in enumerate(lines, 1)]
        return Ended(os.waitstatus_to_exitcode(status), text, points)


USERS: Final = ("notes.txt", "checkpoint/mine.txt", "onnx/mine.txt", "images/mine.txt")


def tree(folder: Path) -> dict[str, str]:
    """Digest of every file in a folder, but those of the user's and those that differ from run to run."""
    from qdexport.core.digests import file_sha256

    left_out = {*USERS, "manifest.json", "report.json", "report.html", ".lock", "onnx/passes.json"}
    files = (path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: file_sha256(path) for name, path in names.items() if name not in left_out}


def killed_at(number: int) -> Break:
    """SIGKILL before the call of this number."""

    def broken(point: Point) -> None:
        if point.number == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return broken


def signalled_at(number: int, *signals: int) -> Break:
    """Signals, one after the other, before the call of this number."""

    def broken(point: Point) -> None:
        if point.number == number:
            for item in signals:
                os.kill(os.getpid(), item)

    return broken


def failing_at(number: int, error: int, *, from_then_on: bool = False) -> Break:
    """The system refuses the call of this number (and all later ones)."""

    def broken(point: Point) -> None:
        if point.number == number or (from_then_on and point.number > number):
            raise OSError(error, os.strerror(error), point.path)

    return broken


def limited(size: int) -> Callable[[], None]:
    """No file may be longer than so many bytes."""

    def before() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return before


def _nano(folder: Path) -> Path:
    import torch
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(16,), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), attention_head_dim=8,
    )  # fmt: skip
    DDIMPipeline(unet=unet, scheduler=DDIMScheduler(clip_sample=False)).save_pretrained(folder)
    return folder


def _child(
    arguments: list[str], log: int, watched: tuple[Path | None, int, Break | None], before: Callable[[], None] | None
) -> None:
    """Becomes the command; never returns."""
    code = 99
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, nohup SIGHUP
        for number in (signal.SIGHUP, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        sys.argv = ["qdexport", *arguments]
        import qdexport.cli.main as entry

        if before is not None:
            before()
        if watched[0] is not None:
            _watch(watched[0], watched[1], watched[2])
        entry.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 98
    except BaseException:  # noqa: BLE001 - judged by its text
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _watch(folder: Path, trace: int, broken: Break | None) -> None:
    """Counts the calls that change something below a folder, and lets ``broken`` happen before each."""
    from qdexport.core import replace

    root, count = f"{os.path.realpath(folder)}", [0]

    def note(call: str, path: Any, dir_fd: int | None) -> None:
        name = _name(path, dir_fd)
        if not f"{name}/".startswith(f"{root}/"):
            return
        count[0] += 1
        os.write(trace, f"{call}\t{os.path.relpath(name, root)}\n".encode())
        if broken is not None:
            broken(Point(count[0], call, name))

    def watched(call: str, real: Any, wanted: Callable[..., bool]) -> Any:
        def function(*args: Any, **kwargs: Any) -> Any:
            if args and wanted(*args, **kwargs):
                note(call, args[0], kwargs.get("dir_fd"))
            return real(*args, **kwargs)

        return function

    for call in ("replace", "rename", "unlink", "remove", "rmdir", "mkdir", "link", "chmod", "fsync"):
        setattr(os, call, watched(call, getattr(os, call), lambda *_, **__: True))
    os.open = watched("open", os.open, _for_writing)
    builtins.open = io.open = watched("open", io.open, _opened)
    replace._exchanged = watched("exchange", replace._exchanged, lambda *_: True)


def _name(path: Any, dir_fd: int | None) -> str:
    name = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fsdecode(path)
    return os.path.abspath(name if dir_fd is None else f"{os.readlink(f'/proc/self/fd/{dir_fd}')}/{name}")


def _for_writing(_: Any, flags: int, *__: Any, **___: Any) -> bool:
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _opened(file: Any, mode: str = "r", *_: Any, **__: Any) -> bool:
    return not isinstance(file, int) and bool(set(mode) & set("wax+"))


def _wait(pid: int) -> int:
    deadline = time.monotonic() + _LONGEST_S
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return 0x7F00  # exit code 127
        time.sleep(0.005)
