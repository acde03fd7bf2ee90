"""Whether the files of an output folder are those that its manifest describes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qdexport.core.digests import file_sha256, tree_sha256
from qdexport.core.paths import below
from qdexport.core.results import Manifest
from qdexport.errors import DamagedError, QdExportError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from qdexport.core.results import Artifact

__all__ = ["Damage", "check_whole", "damage_at", "damage_of"]

_DEEPEST = 3  # folders of a file below its output folder: OUT/vae_decoder/onnx/model.onnx
_SHOWN = 12  # digits of a digest that a person compares


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """A file that is not what its manifest says.

    Attributes:
        path: of the file, relative to the output folder.
        expected: its SHA-256 in the manifest.
        found: its SHA-256 now; None when it is gone.
    """

    path: str
    expected: str
    found: str | None

    def __str__(self) -> str:
        if self.found is None:
            return f"{self.path} is missing"
        return (
            f"{self.path} was changed after it was written (manifest.json has SHA-256 {self.expected[:_SHOWN]}..., the "
            f"file {self.found[:_SHOWN]}...)"
        )


def damage_of(root: Path, item: Artifact) -> list[Damage]:
    """The files of an artifact that differ from the manifest; those that it does not list are not ours.

    Raises:
        ModelError: the manifest names a path outside its folder.
    """
    whole = below(root, item.path, root / "manifest.json")
    if item.files is None and whole.is_dir():  # manifests of older versions do not list the files of a folder
        tree = tree_sha256(whole)
        return [] if tree == item.sha256 else [Damage(path=item.path, expected=item.sha256, found=tree)]
    found = []
    for name, expected in item.digests().items():
        path = below(root, name, root / "manifest.json")
        sha256 = file_sha256(path) if path.is_file() else None
        if sha256 != expected:
            found.append(Damage(path=name, expected=expected, found=sha256))
    return found


def check_whole(root: Path, items: Iterable[Artifact], remedy: str) -> None:
    """Makes sure that artifacts are what the manifest says.

    Args:
        root: the output folder.
        items: artifacts of its manifest.
        remedy: what makes them again.

    Raises:
        DamagedError: names the first file that differs.
        OutputError: a file cannot be read.
    """
    for item in items:
        for damage in damage_of(root, item)[:1]:
            raise DamagedError(f"{root / damage.path}{str(damage).removeprefix(damage.path)}; get it back, or {remedy}")


def damage_at(path: Path) -> list[str]:
    """What differs at a path from the manifest of the output folder that it is, or lies in: a sentence for each file.

    Returns:
        Nothing where no manifest that can be read lists anything there.
    """
    for root in (path, *list(path.parents)[:_DEEPEST]):
        if (root / "manifest.json").is_file():
            try:
                manifest = Manifest.load(root / "manifest.json")
            except QdExportError:
                return []
            inside = path.relative_to(root).as_posix()
            found = [damage for item in manifest.artifacts for damage in damage_of(root, item)]
            return [str(damage) for damage in found if _within(damage.path, inside)]
    return []


def _within(name: str, folder: str) -> bool:
    return folder in (".", name) or name.startswith(f"{folder}/")
