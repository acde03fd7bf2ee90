"""Runs :mod:`qdexport.build.child` and tells apart the ways in which it can end."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qdexport.core.children import child_environment
from qdexport.core.writing import scratch_folder
from qdexport.errors import BuildError

if TYPE_CHECKING:
    from collections.abc import Callable

    from qdexport.build.child import BuildResult, BuildSpec
    from qdexport.core.io_spec import ProfileShapes

__all__ = ["BuildJob", "ChildRun", "run_child"]

_POLL_S = 0.1
_REPORT_EVERY_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildJob:
    """One build: an ONNX file in, an engine and a log out."""

    module: str
    versions: tuple[tuple[int, ...], tuple[int, ...]]
    onnx: Path
    engine: Path
    log: Path
    compute_capabilities: tuple[str, ...]
    profiles: tuple[ProfileShapes, ...]
    needs_gpu: bool
    timeout_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildRun:
    """How the child ended: ``phase`` is what it did last, ``result`` is None when it left none."""

    phase: str
    returncode: int
    timed_out: bool
    seconds: float
    result: BuildResult | None

    @property
    def success(self) -> BuildResult | None:
        """The result of a build that left an engine, else None."""
        return self.result if self.result is not None and self.result["stage"] == "done" else None


def run_child(job: BuildJob, on_progress: Callable[[str], None] | None = None) -> ChildRun:
    """Builds in a child process and waits; the child is killed on any exception, an interrupt included.

    Raises:
        BuildError: the process could not be started.
        OutputError: temporary files cannot be written.
    """
    with scratch_folder("qdexport-build-") as folder:
        spec = _spec(job, folder)
        (folder / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
        started = time.monotonic()
        process = _start(folder / "spec.json", job.log)
        try:
            timed_out = _wait(process, Path(spec["progress"]), job.timeout_s, on_progress)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        result = Path(spec["result"])
        return ChildRun(
            phase=_read(Path(spec["progress"])),
            returncode=process.returncode,
            timed_out=timed_out,
            seconds=time.monotonic() - started,
            result=json.loads(result.read_bytes()) if process.returncode == 0 and result.is_file() else None,
        )


def _spec(job: BuildJob, folder: Path) -> BuildSpec:
    return {
        "module": job.module,
        "versions": [list(bound) for bound in job.versions],
        "onnx": str(job.onnx.resolve()),
        "engine": str(job.engine.resolve()),
        "result": str(folder / "result.json"),
        "progress": str(folder / "progress"),
        "compute_capabilities": list(job.compute_capabilities),
        "profiles": list(job.profiles),
        "needs_gpu": job.needs_gpu,
    }


def _start(spec: Path, log: Path) -> subprocess.Popen[bytes]:
    environment = child_environment()
    command = [sys.executable, "-P", "-m", "qdexport.build.child", str(spec)]
    with log.open("ab") as stream:
        try:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, env=environment
            )
        except OSError as error:
            raise BuildError(
                f"cannot start the builder process {sys.executable}: {error.strerror}"
            ) from error


def _wait(
    process: subprocess.Popen[bytes],
    progress: Path,
    timeout_s: float | None,
    on_progress: Callable[[str], None] | None,
) -> bool:
    started = time.monotonic()
    phase, next_report = "", started
    while process.poll() is None:
        try:
            process.wait(timeout=_POLL_S)
        except subprocess.TimeoutExpired:
            now = time.monotonic()
            if timeout_s is not None and now - started > timeout_s:
                process.kill()
                process.wait()
                return True
            current = _read(progress)
            if on_progress is not None and current and (current != phase or now >= next_report):
                on_progress(f"{current} ({now - started:.0f} s)")
                phase, next_report = current, now + _REPORT_EVERY_S
    return False


def _read(progress: Path) -> str:
    return progress.read_text(encoding="utf-8") if progress.is_file() else ""
