"""Which files of an output folder are ours: what its manifest lists or claims. All else is the user's, and stays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qdexport.core.companion_facts import COMPANION_NAMES
from qdexport.core.lock import LOCK_FILE
from qdexport.core.paths import below
from qdexport.core.replace import files_below, is_leftover, remove_tree
from qdexport.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from pathlib import Path

    from qdexport.core.results import Manifest

__all__ = ["Ownership", "is_place", "refuse_foreign"]

_STAGE_FOLDERS: Final = ("checkpoint", "search", "onnx", "engine", "images", "golden")
_NETWORK_FOLDERS: Final = ("onnx", "engine", "golden")
_FILES: Final = ("manifest.json", "report.json", "report.html", "bits.yaml")
_HIDDEN_FOLDERS: Final = (".calibration", ".search")
# files by which stages would collide with a user's after hours of work; the others are looked at when they are written
_KEY_FILES: Final = (
    "quantization.safetensors", "recipe.yaml", "model_index.json", "model.onnx", "model.onnx.data", "model.engine",
    "plan.json", "build.log", "forms.json", "search.json", "grid.png", "00.npz",
)  # fmt: skip
# what systems and people leave in a folder that is empty to them
_NOTHING: Final = {".DS_Store", ".gitkeep", ".gitignore", ".directory", "desktop.ini", "lost+found"}


class Ownership:
    """Reads and extends what a manifest says about the files of its folder.

    Args:
        root: the output folder.
        manifest: is changed by :meth:`claim` and :meth:`release`.
    """

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self._root = root
        self._manifest = manifest

    def ours(self, folder: Path) -> frozenset[str]:
        """Names, relative to a folder below the root, of the files in it that we wrote."""
        inside = f"{self._name(folder)}/"
        return frozenset(name.removeprefix(inside) for name in self._all() if name.startswith(inside))

    def claim(self, paths: Iterable[Path]) -> None:
        """Notes files that are about to be written.

        Raises:
            OutputError: one of them is there and not ours.
        """
        known = self._all()
        names = [self._name(path) for path in paths]
        for name in names:
            path = self._root / name
            if name not in known and (path.is_symlink() or path.exists()):
                raise OutputError(_in_the_way(path))
        self._manifest.claimed = sorted({*self._manifest.claimed, *names})

    def listed(self, path: str) -> list[str]:
        """The files of one artifact, or of all below a folder, relative to the root."""
        return sorted(name for name in self._all() if name == path or name.startswith(f"{path}/"))

    def keep_claims(self) -> None:
        """Turns every file that an artifact lists into a claim, for artifacts that are about to be struck."""
        self._manifest.claimed = sorted(self._all())

    def prune(self) -> None:
        """Drops claims that an artifact has taken over, or whose file never came."""
        listed = self._of_artifacts()
        self._manifest.claimed = [
            name for name in self._manifest.claimed if name not in listed and (self._root / name).exists()
        ]

    def remove(self, path: str) -> None:
        """Removes the files below a path that are ours, and the folders that are empty then."""
        for name in self.listed(path):
            file = below(self._root, name, self._root / "manifest.json", error=OutputError)
            remove_tree(file)
            for folder in file.parents:
                if folder == self._root or not folder.is_dir() or any(folder.iterdir()):
                    break
                folder.rmdir()

    def refuse_others(self) -> None:
        """Refuses links and files of the user's where the stages write, before any of them works. Other files of the
        user's in the folder of a stage are no harm: they stay when it is replaced.

        Raises:
            OutputError: names it, and says what to do.
        """
        for name in (*_FILES, *_HIDDEN_FOLDERS, *COMPANION_NAMES, *_places()):
            path = self._root / name
            if path.is_symlink():
                raise OutputError(
                    f"{path} is a link to {path.readlink()}, and what is there is replaced as a whole: remove the "
                    f"link. To write to another disk, let {self._root} itself be a link"
                )
        known = self._all()
        for name in _places():
            path = self._root / name
            if path.exists() and not path.is_dir():
                raise OutputError(_in_the_way(path))
            for file in _KEY_FILES:
                if (path / file).exists() and f"{name}/{file}" not in known:
                    raise OutputError(_in_the_way(path / file))

    def _all(self) -> set[str]:
        return {*self._manifest.claimed, *self._of_artifacts()}

    def _of_artifacts(self) -> set[str]:
        names: set[str] = set()
        for item in self._manifest.artifacts:
            path = self._root / item.path
            if item.files is None and not path.is_dir():
                names.add(item.path)
                continue
            # manifests of older versions do not list the files of a folder: all were ours
            files: Collection[str] = files_below(path) if item.files is None else item.files
            names.update(f"{item.path}/{name}" for name in files)
        return names

    def _name(self, path: Path) -> str:
        return path.relative_to(self._root).as_posix()


def refuse_foreign(root: Path) -> None:
    """Refuses a folder without a manifest of ours that holds anything but what a run leaves that was stopped at once.

    Raises:
        OutputError: names what is there, and says what to do.
    """
    if not root.is_dir():
        return
    try:
        found = sorted(item.name for item in root.iterdir())
    except OSError as error:
        raise OutputError(f"cannot read {root}: {error.strerror}; choose another --out") from error
    for name in found:
        if name in {LOCK_FILE, *_HIDDEN_FOLDERS} or name in _NOTHING or is_leftover(name):
            continue
        raise OutputError(
            f"{root} is not empty and no output folder of qdexport: it holds {name!r} and no manifest.json, so nothing "
            "in it is touched; choose another --out, or an empty folder"
        )


def is_place(root: Path, path: Path) -> bool:
    """Whether a path is the output folder itself, or in a folder that a stage writes."""
    real, home = path.resolve(), root.resolve()
    return real == home or any(real.is_relative_to(home / name) for name in (*_places(), *_HIDDEN_FOLDERS))


def _places() -> list[str]:
    return [*_STAGE_FOLDERS, *(f"{network}/{name}" for network in COMPANION_NAMES for name in _NETWORK_FOLDERS)]


def _in_the_way(path: Path) -> str:
    return f"{path} is not of qdexport (manifest.json does not list it); move it elsewhere, or choose another --out"
