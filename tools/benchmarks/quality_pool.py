"""Runs the rows of the quality table in child processes, several at once, and shows how far they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from benchmarks.children import ChildError

if TYPE_CHECKING:
    from rich.console import Console

    from benchmarks.quality_store import RowStore

__all__ = ["Work", "run_rows"]

_TOOLS = Path(__file__).resolve().parents[1]
_POLL_SECONDS = 0.5
_LINE_SECONDS = 15.0  # between lines where there is no terminal
_SHOWN_LINES = 12
# preparing a row (loading, calibrating) takes about as long as sampling this many images, for the time left
_PREPARING: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One row to sample.

    Attributes:
        name: the row's.
        store: where its images go.
    """

    name: str
    store: RowStore

    @property
    def units(self) -> int:
        """How much there is to do, in images."""
        missing = sum(batch.count for batch in self.store.batches() if not batch.found)
        return missing + _PREPARING


class _Child:
    """A running child process."""

    def __init__(self, work: Work, threads: int) -> None:
        self.work, self.units, self.started = work, work.units, time.monotonic()
        folder = work.store.folder
        folder.mkdir(parents=True, exist_ok=True)
        self._answer, self._progress, self._log = (folder / name for name in ("answer.json", "progress.json", "log"))
        for path in (self._answer, self._progress):
            path.unlink(missing_ok=True)
        spec = folder / "spec.json"
        spec.write_text(json.dumps(self._spec(threads)), encoding="utf-8")
        with self._log.open("wb") as log:
            self._process = _start(spec, threads, log)

    def _spec(self, threads: int) -> dict[str, Any]:
        job, store = self.work.store.job, self.work.store
        return {
            "model": job.model,
            "recipe": None if job.recipe is None else job.recipe.model_dump(mode="json"),
            "prompts": list(job.prompts),
            "batches": [(batch.start, str(batch.path)) for batch in store.batches() if not batch.found],
            "noise_seed": job.noise_seed,
            "steps": job.steps,
            "guidance_scale": job.guidance_scale,
            "batch_size": job.batch_size,
            "threads": threads,
            "facts": str(store.facts_path),
            "state": str(store.state_folder),
            "progress": str(self._progress),
            "answer": str(self._answer),
        }

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def state(self) -> tuple[str, float]:
        """What it does, and how many of its units are done."""
        if not self._progress.is_file():
            return "starting", 0.0
        told = json.loads(self._progress.read_text(encoding="utf-8"))
        sampling = told["doing"] == "sampling"
        return told["doing"], min(float(self.units), told["images"] + (_PREPARING if sampling else 0))

    def failure(self) -> str:
        """Why it failed; empty when it did not."""
        code = self._process.returncode
        if code == 0 and self._answer.is_file():
            return ""
        said = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-_SHOWN_LINES:]
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return "\n".join([f"row {self.work.name} {how}; it last said:", *said])

    def stop(self) -> None:
        """Ends it and waits for its end."""
        if self.running:
            self._process.terminate()
        self._process.wait()


def run_rows(works: Sequence[Work], *, workers: int, threads: int, console: Console | None) -> dict[str, str]:
    """Samples rows, `workers` at once.

    Args:
        works: the rows with something to do.
        workers: processes at once.
        threads: of PyTorch, in each.
        console: shows the rows that run, what each does, and the time left; None shows nothing.

    Returns:
        The rows that failed and why; the others are in their stores. Interrupted, the children are stopped; what
        they had finished stays.
    """
    waiting, running, failed = deque(works), list[_Child](), dict[str, str]()
    show = _Show(console, sum(work.units for work in works), len(works))
    try:
        with show:
            while waiting or running:
                while waiting and len(running) < workers:
                    running.append(_Child(waiting.popleft(), threads))
                    show.line(f"{running[-1].work.name}: started")
                time.sleep(_POLL_SECONDS)
                for child in [child for child in running if not child.running]:
                    running.remove(child)
                    why = child.failure()
                    if why:
                        failed[child.work.name] = why
                    seconds = time.monotonic() - child.started
                    show.finished(child.units, f"{child.work.name}: {'FAILED' if why else 'done'} in {seconds:.0f} s")
                show.update({child.work.name: child.state() for child in running})
    finally:
        for child in running:
            child.stop()
    return failed


class _Show:
    """Bars on a terminal, a line now and then elsewhere, nothing without a console."""

    def __init__(self, console: Console | None, units: int, rows: int) -> None:
        self._console, self._units, self._done, self._rows, self._left = console, units, 0.0, rows, rows
        self._started = self._last = time.monotonic()
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        self._bar = Progress(*columns, console=console)
        self._task = self._bar.add_task(f"{rows} rows", total=units)
        fancy = console is not None and console.is_terminal and not console.is_dumb_terminal
        self._live = Live(self._bar, console=console, transient=True) if fancy else None

    def __enter__(self) -> None:
        if self._live is not None:
            self._live.start()

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def line(self, text: str) -> None:
        if self._console is not None:
            self._console.print(Text(text), soft_wrap=True)

    def finished(self, units: int, text: str) -> None:
        self._done += units
        self._left -= 1
        self.line(text)

    def update(self, states: Mapping[str, tuple[str, float]]) -> None:
        done = self._done + sum(units for _, units in states.values())
        if self._live is not None:
            self._bar.update(self._task, completed=int(done), description=f"{self._left} of {self._rows} rows left")
            doing = [Text(f"  {name}: {what}") for name, (what, _) in states.items()]
            self._live.update(Group(self._bar, *doing))
        elif states and time.monotonic() - self._last > _LINE_SECONDS:
            self._last = time.monotonic()
            self.line(self._plain(done, states))

    def _plain(self, done: float, states: Mapping[str, tuple[str, float]]) -> str:
        spent = time.monotonic() - self._started
        left = f"about {spent / done * (self._units - done) / 60:.1f} min left" if done else "time left unknown yet"
        doing = "; ".join(f"{name}: {what}" for name, (what, _) in states.items())
        return f"  {self._left} of {self._rows} rows left, {left} ({doing})"


def _start(spec: Path, threads: int, log: IO[bytes]) -> subprocess.Popen[bytes]:
    roots = [str(_TOOLS), str(_TOOLS.parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(root for root in roots if root),
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    command = [sys.executable, "-P", "-m", "benchmarks.quality_child", str(spec)]
    try:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
    except OSError as error:
        raise ChildError(f"cannot start {command[0]}: {error}") from error
