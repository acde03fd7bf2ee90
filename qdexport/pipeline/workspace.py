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
from qdexport.core.digests import tree_sha256
from qdexport.core.lock import locked, real_folder
from qdexport.core.paths import below
from qdexport.core.replace import sweep
from qdexport.core.results import Artifact, ArtifactKind, Manifest, Report, StageFacts
from qdexport.errors import ModelError
from qdexport.pipeline.ownership import Ownership, refuse_foreign

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

__all__ = ["Made", "Workspace", "settle"]

logger = logging.getLogger(__name__)

MANIFEST_FILE, REPORT_FILE, REPORT_PAGE = "manifest.json", "report.json", "report.html"
_SECTIONS = {"build": ("engine",), "validate": ("parity", "coverage")}
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
    def open(cls, root: Path, manifest: Manifest, report: Report) -> Iterator[Workspace]:
        """Locks the folder, and continues from what an earlier run left there.

        Args:
            root: made when absent; may be a link to a folder.
            manifest: header of a new manifest; artifacts of an earlier one are taken over.
            report: header of a new report; sections of an earlier one are taken over.

        Raises:
            OutputError: the folder cannot be written, another process works in it, it holds files and no manifest of
                ours, or a link or a folder of the user's is where a stage writes.
        """
        _refuse_foreign(root)  # before anything is written there, the lock included
        with locked(root):
            _refuse_foreign(root)
            sweep(root)
            workspace = cls(root, *_continued(root, manifest, report))
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

    def remove(self, path: str) -> None:
        """Removes what the manifest lists below a path, strikes it, and leaves everything else there."""
        self._ownership.remove(path)
        self._strike(lambda item: item.path == path or item.path.startswith(f"{path}/"))

    def is_current(self, stage: str, inputs: Mapping[str, str]) -> bool:
        """Whether a stage's artifacts and results are there, were made from these inputs, and are unchanged."""
        if any(getattr(self.report, section) is None for section in _SECTIONS.get(stage, ())):
            return False
        network = stage.partition(":")[2]
        if network and not self._knows(stage, network):
            return False
        made = [item for item in self.manifest.artifacts if item.stage == stage]
        return bool(made) and all(
            item.inputs == dict(inputs)
            and (path := below(self.root, item.path, self.root / MANIFEST_FILE)).exists()
            and tree_sha256(path) == item.sha256
            for item in made
        )

    def _knows(self, stage: str, network: str) -> bool:
        """Whether the report has what a stage of the networks beside the denoiser found."""
        known = self.report.companions or {}
        if stage == "validate:companions":
            return self.report.whole_pipeline is not None and all(item.parity is not None for item in known.values())
        return network in known and (stage.startswith("export:") or known[network].engine is not None)

    def _strike(self, gone: Callable[[Artifact], bool]) -> None:
        """Takes artifacts out of the manifest; files of theirs that are still there stay known as ours."""
        self._ownership.keep_claims()
        self.manifest.artifacts = [item for item in self.manifest.artifacts if not gone(item)]
        self._ownership.prune()

    def run_stage(
        self, stage: str, inputs: Mapping[str, str], work: Callable[[], Sequence[Made]], *, force: bool = False
    ) -> bool:
        """Does a stage unless it is current; returns whether it was found again.

        The manifest is saved after each stage, so an interrupted run continues behind the last finished one.
        """
        if not force and self.is_current(stage, inputs):
            known = self.report.stages.get(stage)
            self.report.stages[stage] = StageFacts(
                seconds=known.seconds if known else 0.0, peak_rss_mb=known.peak_rss_mb if known else 0.0, cached=True
            )
            logger.info("%s: unchanged, found again", stage)
            return True
        _reset_peak()
        started = time.perf_counter()
        made = work()
        self.report.stages[stage] = StageFacts(
            seconds=round(time.perf_counter() - started, 2), peak_rss_mb=round(_peak_mb(), 1), cached=False
        )
        self.record(stage, inputs, made)
        return False

    def record(self, stage: str, inputs: Mapping[str, str], made: Sequence[Made]) -> None:
        """Enters what a stage wrote in place of what it had written before, and saves report and manifest."""
        new = [self._artifact(item, stage, inputs) for item in made]
        self._strike(lambda item: item.stage == stage)
        self.manifest.artifacts += new
        self._ownership.prune()
        self.save()

    def _artifact(self, made: Made, stage: str, inputs: Mapping[str, str]) -> Artifact:
        item = Artifact.of(self.root, made.path, made.kind, stage, dict(inputs))
        if item.files is None:
            return item
        ours = self.ours(made.path)
        return item.model_copy(update={"files": [name for name in item.files if name in ours]})

    def forget(self, stage: str) -> None:
        """Takes what a stage wrote out of the manifest; its files stay."""
        self._strike(lambda item: item.stage == stage)
        self.report.stages.pop(stage, None)

    def save(self) -> None:
        """Writes report and manifest; the report's own digest in the manifest follows its contents."""
        path = self.root / REPORT_FILE
        if not self._ownership.listed(REPORT_FILE):
            self.claim([path])
        self.report.save(path)
        artifacts = [item for item in self.manifest.artifacts if item.path != REPORT_FILE]
        artifacts.append(Artifact.of(self.root, path, "report", "report", {}))
        self.manifest.artifacts = artifacts
        self.manifest.save(self.root / MANIFEST_FILE)

    def digest(self, kind: ArtifactKind) -> str:
        """The digest of the artifact of a kind. Raises ``ModelError`` when there is none."""
        item = self.manifest.artifact(kind)
        if item is None:
            raise ModelError(f"{self.root} holds no {kind} yet; run the stage that makes it, or `qdexport compile`")
        return item.sha256

    def path(self, kind: ArtifactKind) -> Path:
        """Where the artifact of a kind is. Raises ``ModelError`` when there is none."""
        item = self.manifest.artifact(kind)
        path = None if item is None else below(self.root, item.path, self.root / MANIFEST_FILE)
        if path is None or not path.exists():
            raise ModelError(f"{self.root} holds no {kind}; run the stage that makes it, or `qdexport compile`")
        return path


def _continued(root: Path, manifest: Manifest, report: Report) -> tuple[Manifest, Report]:
    path = root / MANIFEST_FILE
    if not path.is_file():
        return manifest, report
    earlier = Manifest.load(path)
    manifest.claimed = earlier.claimed
    if earlier.tool_version != __version__:
        manifest.artifacts = earlier.artifacts
        Ownership(root, manifest).keep_claims()
        manifest.artifacts = []
    else:
        manifest.artifacts, manifest.profiles = earlier.artifacts, earlier.profiles
        manifest.continues(earlier)
        if (root / REPORT_FILE).is_file():
            old = Report.load(root / REPORT_FILE)
            report = report.model_copy(
                update={
                    name: getattr(old, name)
                    for name in (
                        "body", "quality", "coverage", "parity", "engine",
                        "companions", "whole_pipeline", "stages", "notes",
                    )
                }
            )
    return manifest, report


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
