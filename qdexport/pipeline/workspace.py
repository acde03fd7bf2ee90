"""An output folder: its manifest, its report, its lock, and which stages are already done."""

from __future__ import annotations

import contextlib
import logging
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qdexport import __version__
from qdexport.core.integrity import damage_of
from qdexport.core.lock import locked, real_folder
from qdexport.core.paths import below
from qdexport.core.replace import sweep
from qdexport.core.results import Artifact, ArtifactKind, Manifest, Report, StageFacts
from qdexport.core.writing import output_errors
from qdexport.errors import ModelError
from qdexport.pipeline.continuing import MANIFEST_FILE, REPORT_FILE, continued
from qdexport.pipeline.lineage import Lineage, check_made, clear_results, has_results, order_of
from qdexport.pipeline.ownership import Ownership, refuse_foreign

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

__all__ = ["Made", "Workspace", "settle"]

logger = logging.getLogger(__name__)

REPORT_PAGE = "report.html"
_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass(frozen=True, slots=True)
class Made:
    """Something a stage wrote."""

    kind: ArtifactKind
    path: Path


class Workspace:
    """Finds finished stages again by the digests of their inputs, and records new ones.

    Args:
        root: the output folder.
        manifest: what is there.
        report: the results so far.
    """

    def __init__(self, root: Path, manifest: Manifest, report: Report) -> None:
        self.root = root
        self.manifest = manifest
        self.report = report
        self._ownership = Ownership(root, manifest)

    @classmethod
    @contextlib.contextmanager
    def open(
        cls, root: Path, manifest: Manifest, report: Report, *, heal: bool = False
    ) -> Iterator[Workspace]:
        """Locks the folder, and continues from what an earlier run left there.

        Args:
            root: made when absent; may be a link to a folder.
            manifest: header of a new manifest; artifacts of an earlier one are taken over.
            report: header of a new report; sections of an earlier one are taken over.
            heal: begin a new manifest where the earlier one is damaged.

        Raises:
            DamagedError: the manifest is damaged, and ``heal`` is not set.
            OutputError: the folder cannot be written, another process works in it, it holds files and no manifest of
                ours, or a link or a folder of the user's is where a stage writes.
        """
        with output_errors(root):
            _refuse_foreign(root)  # before anything is written there, the lock included
        with locked(root):
            _refuse_foreign(root)
            sweep(root)
            workspace = cls(root, *continued(root, manifest, report, heal=heal))
            workspace._ownership.refuse_others()
            yield workspace

    def ours(self, folder: Path) -> Collection[str]:
        """Names, relative to a folder of a stage, of the files in it that qdexport wrote; others stay there."""
        return self._ownership.ours(folder)

    def files(self, folder: Path, last: Path) -> list[Path]:
        """Our files directly in a folder, sorted; ``last`` comes last."""
        found = sorted(path for path in folder.iterdir() if path.name in self.ours(folder))
        return sorted(found, key=lambda path: path == last)

    def claim(self, paths: Collection[Path]) -> None:
        """Notes in the manifest what is about to be written.

        Raises:
            OutputError: a file of the user's is in the way.
        """
        self._ownership.claim(paths)
        self.manifest.save(self.root / MANIFEST_FILE)

    @property
    def lineage(self) -> Lineage:
        """What was made from what."""
        return Lineage(self.root, self.manifest)

    def is_current(self, stage: str, inputs: Mapping[str, str]) -> bool:
        """Whether a stage's artifacts and results are there, were made from these inputs, and are unchanged."""
        made = self.lineage.artifacts(stage)
        return (
            bool(made)
            and has_results(self.report, stage)
            and all(item.inputs == inputs for item in made)
            and not any(damage_of(self.root, item) for item in made)
        )

    def run_stage(
        self, stage: str, options: Mapping[str, str], work: Callable[[], Sequence[Made]], *, force: bool = False
    ) -> bool:
        """Does a stage unless it is current; returns whether it was found again.

        What was made from its earlier result is struck: artifacts, their files, and what the report says about them.
        The manifest is saved after each stage, so an interrupted run continues behind the last finished one.

        Args:
            stage: its name.
            options: digests of what it depends on beside what it is made from.
            work: does it.
            force: do it in any case.

        Raises:
            ModelError: what it is made from is not there, or is itself made from something that is gone.
            DamagedError: what it reads is not what the manifest says.
        """
        inputs = {**options, **self.inputs(stage), "tool": __version__}
        if not force and self.is_current(stage, inputs):
            known = self.report.stages.get(stage) or StageFacts(seconds=0.0, peak_rss_mb=0.0, cached=True)
            self.report.stages[stage] = known.model_copy(update={"cached": True})
            logger.info("%s: unchanged, found again", stage)
            self.strike_stale()
            return True
        clear_results(self.report, stage)
        before = list(self.report.notes)
        _reset_peak()
        started = time.perf_counter()
        made = work()
        self.report.stages[stage] = StageFacts(
            seconds=round(time.perf_counter() - started, 2),
            peak_rss_mb=round(_peak_mb(), 1),
            cached=False,
            notes=[note for note in self.report.notes if note not in before],
        )
        self.record(stage, inputs, made)
        return False

    def inputs(self, stage: str) -> dict[str, str]:
        """Digests of what a stage is made from, whose files are there and unchanged.

        Raises:
            ModelError: something is missing, or is itself made from something that is gone.
            DamagedError: a file that the stage reads is not what the manifest says.
        """
        check_made(self.root, self.manifest, stage)
        return self.lineage.inputs(stage) or {}

    def record(self, stage: str, inputs: Mapping[str, str], made: Sequence[Made]) -> None:
        """Enters what a stage wrote in place of what it had written before, strikes what was made from that, and saves
        report and manifest.
        """
        new = [Artifact.of(self.root, item.path, item.kind, stage, inputs, self.ours(item.path)) for item in made]
        kept = {item.path for item in new}
        for item in self.lineage.artifacts(stage):
            if item.path not in kept:
                self._ownership.remove(item.path)
        self._strike(lambda item: item.stage == stage)
        self.manifest.artifacts += new
        self._ownership.prune()
        self.report.stages = dict(sorted(self.report.stages.items(), key=lambda item: order_of(item[0])))
        self.strike_stale()
        self.save()

    def strike_stale(self) -> None:
        """Strikes every stage whose inputs are gone or changed, and what was made from it in turn."""
        for stage in self.lineage.made():  # in the order of making: what is struck makes what follows stale
            if self.lineage.is_stale(stage):
                logger.info("%s was made from something that is gone, and is removed", stage)
                self.strike(stage)

    def strike(self, stage: str) -> None:
        """Takes what a stage made out of the manifest and the report, and removes its files; others stay."""
        for item in self.lineage.artifacts(stage):
            edited = item.kind == "bit_plan" and damage_of(self.root, item)  # by its user, who is invited to
            if not edited:
                self._ownership.remove(item.path)
        self._strike(lambda item: item.stage == stage)
        clear_results(self.report, stage)
        if stage == "export":
            self.manifest.profiles = {}

    def _strike(self, gone: Callable[[Artifact], bool]) -> None:
        """Takes artifacts out of the manifest; files of theirs that are still there stay known as ours."""
        self._ownership.keep_claims()
        self.manifest.artifacts = [item for item in self.manifest.artifacts if not gone(item)]
        self._ownership.prune()

    def note(self, stage: str, text: str) -> None:
        """Adds a note to the report that goes when a stage goes."""
        if text not in self.report.notes:
            self.report.notes.append(text)
            unknown = StageFacts(seconds=0.0, peak_rss_mb=0.0, cached=True)
            self.report.stages.setdefault(stage, unknown).notes.append(text)

    def save(self) -> None:
        """Writes report and manifest; the report's own digest in the manifest follows its contents."""
        path = self.root / REPORT_FILE
        if not self._ownership.listed(REPORT_FILE):
            self.claim([path])
        self.report.save(path)
        artifacts = [item for item in self.manifest.artifacts if item.path != REPORT_FILE]
        artifacts.append(Artifact.of(self.root, path, "report", "results", {}))
        self.manifest.artifacts = artifacts
        self.manifest.save(self.root / MANIFEST_FILE)

    def path(self, kind: ArtifactKind) -> Path:
        """Where the artifact of a kind is. Raises ``ModelError`` when there is none."""
        item = self.manifest.artifact(kind)
        path = None if item is None else below(self.root, item.path, self.root / MANIFEST_FILE)
        if path is None or not path.exists():
            raise ModelError(f"{self.root} holds no {kind}; run the stage that makes it, or `qdexport compile`")
        return path


def _refuse_foreign(root: Path) -> None:
    real_folder(root)
    if not (root / MANIFEST_FILE).is_file():
        refuse_foreign(root)


def settle(root: Path) -> None:
    """Puts an output folder in order that a killed run left; needed before anything of it is read outside its lock.

    Raises:
        OutputError: another process works in it.
    """
    if (root / MANIFEST_FILE).is_file():
        with locked(root):
            sweep(root)


def _reset_peak() -> None:
    """Starts a new peak of resident memory; where Linux does not allow it, the peak is the process's own."""
    with contextlib.suppress(OSError):
        _CLEAR_REFS.write_text("5")


def _peak_mb() -> float:
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
