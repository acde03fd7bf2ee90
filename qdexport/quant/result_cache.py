"""Long measurements in small steps: each result is a file of its own, so that a killed run goes on where it was."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, ValidationError

from qdexport.core.digests import digest_of
from qdexport.core.progress import ProgressSink, SilentProgress
from qdexport.core.sealed import read_sealed, write_sealed
from qdexport.quant.tasks import Job, Workers, map_tasks

__all__ = ["CachedTask", "ResultCache", "SweepRun"]

logger = logging.getLogger(__name__)

T = TypeVar("T", bound="CachedTask")
R = TypeVar("R", bound=BaseModel)
S = TypeVar("S")


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRun:
    """Where and how a sweep runs.

    Attributes:
        folder: results are kept below it, one small file per measurement; a killed sweep goes on from them.
        workers: processes, or a cluster.
        progress: where progress is shown.
    """

    folder: Path
    workers: Workers = field(default_factory=Workers)
    progress: ProgressSink = field(default_factory=SilentProgress)


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedTask:
    """A task whose result is kept in a file; all its fields count for finding it again.

    Attributes:
        label: for progress.
        file: name of the file.
        cost: denoiser calls per image that it takes, for the time left.
    """

    label: str
    file: str
    cost: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultCache(Generic[R]):
    """Results in a folder, each valid for one digest of everything that it depends on.

    Attributes:
        folder: made when missing.
        base: a digest of what all tasks depend on.
        kind: class of the results.
    """

    folder: Path
    base: str
    kind: type[R]

    def run(
        self,
        tasks: Sequence[T],
        make_job: Callable[[Sequence[T]], Job[S, T, R]],
        run: SweepRun,
        description: str,
    ) -> list[R]:
        """Runs the tasks that have no result yet.

        Args:
            tasks: what is wanted.
            make_job: called with the tasks to run, if there are any.
            run: who computes, and where progress is shown.
            description: of the whole, for progress.

        Returns:
            The results in the order of the tasks.
        """
        found = [self._read(task) for task in tasks]
        missing = [index for index, result in enumerate(found) if result is None]
        if missing and len(missing) < len(tasks):
            logger.info("%s: %d of %d found again", description, len(tasks) - len(missing), len(tasks))
        if missing:
            # the longest first: a short last task leaves the fewest workers idle
            missing.sort(key=lambda index: -tasks[index].cost)
            waiting = [tasks[index] for index in missing]
            with run.progress.track(sum(task.cost for task in waiting), description) as advance:
                for number, result in map_tasks(make_job(waiting), waiting, run.workers):
                    task = waiting[number]
                    self._write(task, result)
                    found[missing[number]] = result
                    logger.info("%s: %s", description, task.label)
                    advance(task.cost, task.label)
        return [result for result in found if result is not None]

    def _digest(self, task: CachedTask) -> str:
        return digest_of(self.base, asdict(task))

    def _read(self, task: CachedTask) -> R | None:
        path = self.folder / task.file
        stored = read_sealed(path)
        if stored is None or stored.get("digest") != self._digest(task):
            return None
        try:
            return self.kind.model_validate(stored.get("result"))
        except ValidationError as error:
            logger.warning("%s is damaged (%s) and is measured again", path, error.errors()[0]["msg"])
            return None

    def _write(self, task: CachedTask, result: R) -> None:
        write_sealed(self.folder / task.file, {"digest": self._digest(task), "result": result.model_dump(mode="json")})
