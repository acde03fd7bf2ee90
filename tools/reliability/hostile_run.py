"""Runs one command on hostile input in a forked process, and judges how it ended."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qdexport.core.shown import UNSAFE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["RECIPE", "Outcome", "Place", "Row", "Seeds", "make_seeds", "run_row"]

RECIPE: Final = """schema_version: 1
name: r
rules:
  - {match: "*", weight: {bits: 8}, activation: {bits: 8}}
calibration: {prompts: 1, batch_size: 1, steps: 3}
validation: {images: 1, floor_seeds: 1, floor_steps: 1, golden: 1}
companions: {networks: none}
"""
_MEMORY: Final = 24 << 30  # of addresses: a row that asks for more memory than there is must not end this machine
_BYTES: Final = 2_000_000  # of what a command may print


@dataclass(frozen=True, slots=True)
class Seeds:
    """Valid inputs that rows change copies of.

    Attributes:
        nano: a pipeline without prompts, of one block.
        sd: a Stable Diffusion pipeline with tokenizer, text encoder and VAE, all tiny.
        out: the output folder of `compile` of ``nano`` for ONNX Runtime.
    """

    nano: Path
    sd: Path
    out: Path


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row happens: an empty folder, which is the command's current folder, and the valid inputs."""

    folder: Path
    seeds: Seeds

    def copy(self, name: str) -> Path:
        """A copy of one of the seeds, under its own name."""
        return Path(shutil.copytree(getattr(self.seeds, name), self.folder / name, symlinks=True))

    def write(self, name: str, content: str | bytes) -> Path:
        """A file of this content."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
        return path

    @property
    def recipe(self) -> Path:
        """A small recipe."""
        return self.write("small.yaml", RECIPE)

    def quantize(self, model: Path | str, *more: object) -> list[object]:
        """The command that calibrates a model."""
        return ["quantize", model, "--recipe", self.recipe, "--out", self.folder / "out", *more]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One hostile input.

    Attributes:
        group: the kind of input.
        what: the input, in a few words.
        make: prepares a place and returns the arguments.
        codes: exit codes that are right.
        says: texts that the message must hold.
        seconds: when it counts as hanging.
        keeps_log: a traceback in a file is right: of a pass that the user wrote.
    """

    group: str
    what: str
    make: Callable[[Place], list[object]]
    codes: tuple[int, ...]
    says: tuple[str, ...] = ()
    seconds: float = 120.0
    keeps_log: bool = False


@dataclass(slots=True)
class Outcome:
    """How a row ended; it is green when nothing is wrong."""

    row: Row
    code: int | None
    seconds: float
    message: str
    wrong: list[str] = field(default_factory=list)


def make_seeds(folder: Path) -> Seeds:
    """Writes the valid inputs, unless the folder has them. Compiling takes some seconds."""
    import torch
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    from qdexport.models.tiny import save_tiny_pipeline

    seeds = Seeds(folder / "nano", folder / "sd", folder / "out")
    if (seeds.out / "report.json").is_file():
        return seeds
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(16,), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), attention_head_dim=8,
    )  # fmt: skip
    DDIMPipeline(unet=unet, scheduler=DDIMScheduler(clip_sample=False)).save_pretrained(seeds.nano)
    save_tiny_pipeline(seeds.sd, "sd")
    recipe = Place(folder, seeds).recipe
    arguments = ["compile", seeds.nano, "--recipe", recipe, "--target", "onnxruntime", "--out", seeds.out]
    code, text, _ = _in_fork([str(item) for item in arguments], folder, 600.0)
    if code != 0:
        raise RuntimeError(f"the valid input does not compile (exit {code}): {text[-2000:]}")
    return seeds


def run_row(row: Row, seeds: Seeds) -> Outcome:
    """Runs a row in a folder of its own, which is removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    try:
        place = Place(folder / "work", seeds)
        place.folder.mkdir()
        arguments = [os.fspath(item) if isinstance(item, Path) else str(item) for item in row.make(place)]
        for name in ("home", "tmp"):
            (folder / name).mkdir()
        before = _contents(folder)
        with _unchanged(seeds) as damage:
            code, text, seconds = _in_fork(arguments, place.folder, row.seconds, folder / "home", folder / "tmp")
        outcome = Outcome(row, code, seconds, _message(text).replace(f"{place.folder}/", "").replace(f"{folder}/", ""))
        outcome.wrong = [*_judged(row, code, text), *_strange_files(before, _contents(folder), row.keeps_log), *damage]
        return outcome
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _judged(row: Row, code: int | None, text: str) -> Iterator[str]:
    if code is None:
        yield f"no end within {row.seconds:.0f} s"
        return
    if code not in row.codes:
        yield f"exit {code}, not {' or '.join(map(str, row.codes))}"
    if "Traceback (most recent" in text:
        yield "a traceback"
    if "did not foresee" in text or ("(traceback: " in text and not row.keeps_log):
        yield "was not foreseen"
    if (found := UNSAFE.search(text)) is not None:
        yield f"a control character reaches the terminal: {found[0]!r}"
    errors = [line for line in text.splitlines() if line.startswith("Error: ")]
    if code not in (0, 8) and len(errors) != 1:  # 8 is told by the report
        yield f"{len(errors)} messages"
    yield from (f"does not say {word!r}" for word in row.says if word not in text)
    if len(text) > _BYTES // 10:
        yield f"prints {len(text)} letters"


def _message(text: str) -> str:
    lines = text.splitlines()
    errors = [line for line in lines if line.startswith("Error: ")]
    return errors[0].removeprefix("Error: ") if errors else (lines[-1] if lines else "")


def _strange_files(before: dict[str, int], after: dict[str, int], keeps_log: bool) -> Iterator[str]:
    """Files that a command has no business with: outside its output folder, or left in a folder of others."""
    ours = ("work/out/", "work/pictures/", "work/qdexport-out/", "home/.cache/", "home/.config/", "tmp/.ses")
    allowed: tuple[str, ...] = (*ours, "home/qdexport/fault-") if keeps_log else ours
    for name in sorted(after):
        if before.get(name) != after[name] and not name.startswith(allowed):
            yield f"{'changes' if name in before else 'leaves'} {name!r}"
    yield from (f"removes {name!r}" for name in sorted(set(before) - set(after)) if not name.startswith(allowed))


def _contents(folder: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for root, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(root, name)
            found[os.path.relpath(path, folder)] = os.lstat(path).st_mtime_ns
    return found


@contextlib.contextmanager
def _unchanged(seeds: Seeds) -> Iterator[list[str]]:
    damage: list[str] = []
    before = [_contents(path) for path in (seeds.nano, seeds.sd, seeds.out)]
    yield damage
    if [_contents(path) for path in (seeds.nano, seeds.sd, seeds.out)] != before:
        damage.append("changes files outside its folder")


def _in_fork(
    arguments: list[str], folder: Path, seconds: float, home: Path | None = None, scratch: Path | None = None
) -> tuple[int | None, str, float]:
    """Exit code (None: it did not end; negative: a signal), all that it printed, and how long it took."""
    with tempfile.TemporaryFile() as log:
        started = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _child(arguments, folder, log.fileno(), home, scratch)
        status = _wait(pid, started + seconds)
        took = time.monotonic() - started
        log.seek(0)
        text = log.read(_BYTES).decode("utf-8", "replace")
    return None if status is None else os.waitstatus_to_exitcode(status), text, took


def _child(arguments: list[str], folder: Path, log: int, home: Path | None, scratch: Path | None) -> None:
    """Becomes the command; never returns."""
    code = 99
    try:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - for the rest of this process
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        os.chdir(folder)
        if home is not None and scratch is not None:
            os.environ |= {"HOME": str(home), "XDG_STATE_HOME": str(home), "TMPDIR": str(scratch)}
            tempfile.tempdir = None
        sys.argv = ["qdexport", *arguments]
        import qdexport.cli.main as entry

        entry.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 98
    except BaseException:  # noqa: BLE001 - judged by its text
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _wait(pid: int, deadline: float) -> int | None:
    pause = 0.002
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        if time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(pause)
        pause = min(pause * 1.5, 0.1)
