"""Where measured images lie: one file per batch of a row, so that an interrupted benchmark goes on."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import qdexport
from qdexport.core.digests import digest_of, file_sha256
from qdexport.core.files import atomic_path, write_json
from qdexport.errors import OutputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qdexport.core.recipe import Recipe

__all__ = ["Batch", "RowJob", "RowStore", "model_digest", "source_digest", "write_batch", "write_facts"]

_SHORT = 12
_READ_BYTES = 1 << 26


@dataclass(frozen=True, slots=True, kw_only=True)
class RowJob:
    """What a child process samples for one row.

    Attributes:
        model: as `load_model` takes it.
        recipe: None for the floating-point model.
        prompts: one per image.
        noise_seed: the noise of image i comes from `noise_seed + i`.
        steps: sampler steps; None for the model's usual number.
        guidance_scale: None for the model's usual one.
        batch_size: images sampled at once, and per file.
    """

    model: str
    recipe: Recipe | None
    prompts: tuple[str, ...]
    noise_seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    batch_size: int = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One file of a row: the images of `prompts[start : start + count]`."""

    start: int
    count: int
    path: Path
    found: bool


class RowStore:
    """The folder of one row.

    Files are named by what their images depend on, the source code of qdexport included.

    Args:
        cache: the folder of all rows.
        job: the row.
        model: digest of the model, from :func:`model_digest`.
        source: digest of the code, from :func:`source_digest`.
        reuse: take what older code made.
    """

    def __init__(self, cache: Path, job: RowJob, *, model: str, source: str, reuse: bool = False) -> None:
        recipe = None if job.recipe is None else job.recipe.model_dump(mode="json", exclude_defaults=True)
        files = [] if job.recipe is None else [job.recipe.bit_plan, job.recipe.calibration.prompts_file]
        read = [file_sha256(Path(path)) for path in files if path is not None and Path(path).is_file()]
        key = digest_of(model, recipe, read, job.noise_seed, job.steps, job.guidance_scale, job.batch_size)
        self.job = job
        self.folder = cache / key[:16]
        self._source, self._reuse = source[:_SHORT], reuse

    def batches(self) -> list[Batch]:
        """All files of the row, those that are there and those that are missing."""
        size = self.job.batch_size
        starts = range(0, len(self.job.prompts), size)
        return [self._batch(start, self.job.prompts[start : start + size]) for start in starts]

    @property
    def facts_path(self) -> Path:
        """The file that the child writes its facts to (widths, seconds)."""
        return self._named("facts", ".json")

    @property
    def state_folder(self) -> Path:
        """Where the child keeps unfinished calibrations and measurements; of this code alone."""
        return self.folder / f"state-{self._source}"

    def facts(self) -> dict[str, Any] | None:
        """What the child told about the row; None before it ran."""
        path = self.facts_path
        if not path.is_file():
            return None
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return facts

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.facts() is not None and all(batch.found for batch in self.batches())

    def images(self) -> NDArray[np.float32]:
        """All images, FP32 ``[N, 3, H, W]`` in [-1, 1].

        Raises:
            OutputError: a file is missing or damaged.
        """
        return np.concatenate([_read(batch.path, "images") for batch in self.batches()])

    def latents(self) -> NDArray[np.float32]:
        """The latents that the denoiser saw, FP32 ``[steps, images, C, h, w]``, of the first images."""
        return _read(self.batches()[0].path, "latents")

    def timesteps(self) -> NDArray[np.float32]:
        """The timestep of each row of :meth:`latents`."""
        return _read(self.batches()[0].path, "timesteps")

    def _batch(self, start: int, prompts: Sequence[str]) -> Batch:
        path = self._named(f"{start:05d}-{digest_of(list(prompts))[:_SHORT]}", ".npz")
        return Batch(start=start, count=len(prompts), path=path, found=path.is_file())

    def _named(self, stem: str, ending: str) -> Path:
        path = self.folder / f"{stem}-{self._source}{ending}"
        if self._reuse and not path.is_file():
            older = sorted(self.folder.glob(f"{stem}-*{ending}"), key=lambda found: found.stat().st_mtime)
            path = older[-1] if older else path
        return path


def write_batch(path: Path, **arrays: NDArray[np.float32]) -> None:
    """Writes one file of images, whole or not at all."""
    with atomic_path(path) as partial, partial.open("wb") as stream:
        np.savez(stream, allow_pickle=False, **arrays)


def write_facts(path: Path, facts: dict[str, Any]) -> None:
    """Writes the facts of a row."""
    write_json(path, facts)


def model_digest(folder: Path) -> str:
    """A digest of a model's folder: contents of small files; names, sizes and times of those too large to be read."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return digest_of([(path.relative_to(folder).as_posix(), _file_digest(path)) for path in files])


def _file_digest(path: Path) -> str:
    stat = path.stat()
    return file_sha256(path) if stat.st_size <= _READ_BYTES else f"{stat.st_size} {stat.st_mtime_ns}"


def source_digest() -> str:
    """A digest of the Python files of qdexport."""
    digest, root = hashlib.sha256(), Path(str(qdexport.__file__)).resolve().parent
    for folder, _, names in sorted(os.walk(root, followlinks=True)):
        for name in sorted(names):
            if name.endswith(".py"):
                path = Path(folder) / name
                digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _read(path: Path, key: str) -> NDArray[np.float32]:
    try:
        # opened here: numpy leaves a file open that it cannot read
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            array: NDArray[np.float32] = arrays[key]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise OutputError(f"{path} cannot be read ({error}); delete it, and run the benchmark again") from error
    return array
