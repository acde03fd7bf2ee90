"""Goes on from what an earlier run left in an output folder, also where its manifest or its report is damaged."""

from __future__ import annotations

import logging
import re
import shutil
from typing import TYPE_CHECKING, Final

from qdexport import __version__
from qdexport.core.companion_facts import COMPANION_NAMES
from qdexport.core.digests import file_sha256
from qdexport.core.files import atomic_path
from qdexport.core.forms import FormTable
from qdexport.core.pass_log import PASS_LOG_FILE, PassLog
from qdexport.core.replace import files_below
from qdexport.core.results import Manifest, Plan, Report
from qdexport.emit.inspect import load_onnx
from qdexport.emit.onnx_file import DATA_FILE, MODEL_FILE
from qdexport.errors import DamagedError, ModelError, OutputError, QdExportError
from qdexport.pipeline.ownership import Ownership
from qdexport.quant.checkpoint import QUANTIZATION_FILE, RECIPE_FILE, read_facts

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["continued", "recognised"]

logger = logging.getLogger(__name__)

MANIFEST_FILE, REPORT_FILE = "manifest.json", "report.json"
_HEADER: Final = frozenset({"schema_version", "tool_version", "model", "recipe", "target"})
_ASIDE: Final = "manifest.json.damaged"
# what diffusers and transformers write for a pipeline, beside what we add
_CHECKPOINT: Final = re.compile(
    r"(\w+/)?([\w.-]+\.(safetensors|safetensors\.index\.json)|model_index\.json|(\w+_)?config\.json|vocab\.(json|txt)"
    rf"|merges\.txt|(special_tokens_map|added_tokens|tokenizer)\.json|(spiece|tokenizer)\.model|{RECIPE_FILE})"
)
_IMAGES: Final = re.compile(r"(\w+/\d{3,}\.png|grid\.png)")
_GOLDEN: Final = re.compile(r"\d{2,}\.npz")


def continued(root: Path, manifest: Manifest, report: Report, *, heal: bool) -> tuple[Manifest, Report]:
    """What is in an output folder, under the headers of a new run.

    A report that is not the one that the manifest describes counts for nothing: its stages are done again.

    Args:
        root: the output folder.
        manifest: header of the new manifest.
        report: header of the new report.
        heal: a damaged manifest is moved aside, and a new one begun that claims what is recognised as ours.

    Raises:
        DamagedError: the manifest is damaged, and is not to be healed.
        OutputError: it is, and nothing in the folder is recognised.
    """
    path = root / MANIFEST_FILE
    if not path.is_file():
        return manifest, report
    try:
        earlier = Manifest.load(path)
    except DamagedError as error:
        if not heal:
            raise
        _heal(root, manifest, error)
        return manifest, report
    manifest.claimed = earlier.claimed
    manifest.artifacts = earlier.artifacts
    if earlier.tool_version != __version__:
        Ownership(root, manifest).keep_claims()
        manifest.artifacts = []
        return manifest, report
    manifest.profiles = earlier.profiles
    manifest.continues(earlier)
    old = _known_report(root, earlier)
    if old is None:
        return manifest, report
    owned = {note for stage in old.stages.values() for note in stage.notes}
    old.notes = [note for note in old.notes if note in owned]
    sections = {name: getattr(old, name) for name in type(old).model_fields if name not in _HEADER}
    return manifest, report.model_copy(update=sections)


def _known_report(root: Path, manifest: Manifest) -> Report | None:
    path = root / REPORT_FILE
    listed = next((item for item in manifest.artifacts if item.path == REPORT_FILE), None)
    if listed is None and not path.is_file():
        return None
    if listed is None or not path.is_file() or file_sha256(path) != listed.sha256:
        logger.warning("%s is not the one that was written; stages whose results it held are done again", path)
        return None
    try:
        return Report.load(path)
    except ModelError as error:  # it was there a moment ago
        logger.warning("%s; stages whose results it held are done again", error)
        return None


def _heal(root: Path, manifest: Manifest, error: DamagedError) -> None:
    """Begins a new manifest. The damaged one is kept under another name; every file that is not recognised stays."""
    ours = recognised(root)
    if not ours:
        raise OutputError(
            f"{root / MANIFEST_FILE} cannot be read, and nothing else in {root} is recognised as written by qdexport, "
            "so nothing in it is touched; choose another --out"
        ) from error
    logger.warning("%s cannot be read; it is kept as %s, and a new one is begun", root / MANIFEST_FILE, _ASIDE)
    with atomic_path(root / _ASIDE) as partial:
        shutil.copyfile(root / MANIFEST_FILE, partial)
    manifest.claimed = ours
    manifest.save(root / MANIFEST_FILE)


def recognised(root: Path) -> list[str]:
    """Files that only qdexport can have written: the key file of their folder says so, and they have the names we give.

    Returns:
        Paths relative to the output folder, sorted.
    """
    found = _in(root, "checkpoint", _CHECKPOINT.fullmatch, lambda path: read_facts(path / QUANTIZATION_FILE))
    searched = {"forms.json", "search.json"}
    found += _in(root, "search", searched.__contains__, lambda path: FormTable.load(path / "forms.json"))
    for place in ("", *(f"{name}/" for name in COMPANION_NAMES)):
        compiled = _in(root, f"{place}onnx", {MODEL_FILE, DATA_FILE, PASS_LOG_FILE}.__contains__, _is_our_onnx)
        built = {"model.engine", "plan.json", "build.log"}
        compiled += _in(root, f"{place}engine", built.__contains__, lambda path: Plan.load(path / "plan.json"))
        if compiled:
            compiled += _in(root, f"{place}golden", _GOLDEN.fullmatch)
        found += compiled
    if (root / REPORT_FILE).is_file() and _reads(lambda path: Report.load(path / REPORT_FILE), root):
        found.append(REPORT_FILE)
    if found:  # the folder is ours; pictures and the page say nothing about who made them
        found += _in(root, "images", _IMAGES.fullmatch)
        found += [name for name in (REPORT_FILE, "report.html", "bits.yaml") if (root / name).is_file()]
    return sorted(set(found))


def _in(
    root: Path, folder: str, is_name: Callable[[str], object], read: Callable[[Path], object] = lambda _: None
) -> list[str]:
    """The files of a folder that have our names, if what says whose folder it is can be read."""
    path = root / folder
    if path.is_symlink() or not path.is_dir() or not _reads(read, path):
        return []
    return [f"{folder}/{name}" for name in files_below(path) if is_name(name)]


def _reads(read: Callable[[Path], object], path: Path) -> bool:
    try:
        read(path)
    except (QdExportError, OSError, ValueError):
        return False
    return True


def _is_our_onnx(folder: Path) -> None:
    """Raises what says that it is none of ours."""
    if (folder / PASS_LOG_FILE).is_file():
        PassLog.load(folder / PASS_LOG_FILE)
    model = load_onnx(folder / MODEL_FILE)
    if model.producer_name != "qdexport":
        raise ModelError(f"{folder / MODEL_FILE} was written by {model.producer_name}")
