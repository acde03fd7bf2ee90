"""The same measurement for a user's own pipeline: FP against each recipe, on prompts from a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from benchmarks.costs import machine
from benchmarks.quality_networks import Networks, ReferenceImages, network_scores
from benchmarks.quality_pool import Work, run_rows
from benchmarks.quality_rows import Metric
from benchmarks.quality_scores import Scored, estimate, score_images
from benchmarks.quality_store import RowJob, RowStore, model_digest, source_digest
from qdexport.core.recipe import Recipe
from qdexport.errors import ModelError, RecipeError
from qdexport.models.source import resolve_source

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from rich.console import Console

    from benchmarks.quality_table import Settings
    from qdexport.core.progress import ProgressSink

__all__ = ["UserJob", "measure_user", "read_prompts", "read_real_images", "shown_names"]

_PAIRED: tuple[Metric, ...] = ("mse", "psnr_db", "ssim")
_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True, slots=True, kw_only=True)
class UserJob:
    """What to measure.

    Attributes:
        model: as `load_model` takes it.
        prompts: one per image.
        recipes: by the name under which each is shown.
        real: a folder of real images, or None.
        networks: where the weights of the metrics lie.
        noise_seed: the noise of image i comes from `noise_seed + i`.
    """

    model: str
    prompts: tuple[str, ...]
    recipes: Mapping[str, Recipe]
    real: Path | None
    networks: Networks
    noise_seed: int = 0


def read_prompts(path: Path, most: int | None) -> tuple[str, ...]:
    """The lines of a text file that are not empty, at most so many.

    Raises:
        RecipeError: it cannot be read, or has fewer than two prompts.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the prompts in {path}: {error}") from error
    if len(lines) < 2:
        raise RecipeError(f"{path} has {len(lines)} prompts; write two at least, one per line")
    return tuple(lines[:most])


def read_real_images(folder: Path, size: tuple[int, int]) -> NDArray[np.float32]:
    """All pictures of a folder, cut to the middle and resized, FP32 ``[N, 3, H, W]`` in [-1, 1].

    Args:
        folder: searched with its subfolders.
        size: height and width.

    Raises:
        RecipeError: fewer than two pictures, or one that cannot be read.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _ENDINGS)
    if len(paths) < 2:
        raise RecipeError(f"{folder} holds {len(paths)} pictures ({', '.join(_ENDINGS)}); --real needs two at least")
    pictures = []
    for path in paths:
        try:
            with Image.open(path) as opened:
                pictures.append(_cut(opened.convert("RGB"), size))
        except OSError as error:
            raise RecipeError(f"{path} is no picture that can be read: {error}") from error
    array = np.stack(pictures).astype(np.float32) / 127.5 - 1
    return np.ascontiguousarray(np.moveaxis(array, -1, 1))


def measure_user(
    job: UserJob, settings: Settings, *, progress: ProgressSink, console: Console | None
) -> tuple[dict[str, Any], dict[str, RowStore], dict[str, str]]:
    """Samples FP and every recipe, and scores what can be scored.

    Returns:
        Figures as plain values (rows by name, and what is missing by metric), the stores of the rows, and the rows
        that failed with the reason.

    Raises:
        ModelError: FP itself could not be sampled.
    """
    _, folder = resolve_source(job.model, None)
    digest, source = model_digest(folder), source_digest()
    stores = {
        name: RowStore(
            settings.cache, _row_job(job, recipe, settings), model=digest, source=source, reuse=settings.reuse
        )
        for name, recipe in {"FP": None, **job.recipes}.items()
    }
    works = [Work(name=name, store=store) for name, store in stores.items() if not store.complete]
    before = machine()
    failed = run_rows(works, workers=settings.workers, threads=settings.threads, console=console)
    if "FP" in failed:
        raise ModelError(failed["FP"])
    images = {name: store.images() for name, store in stores.items() if name not in failed}
    real = None if job.real is None else read_real_images(job.real, images["FP"].shape[2:])
    rows = {name: _paired(name, batch, images["FP"], stores[name]) for name, batch in images.items()}
    references = ReferenceImages(floating_point=images["FP"], real=real, prompts=job.prompts)
    missing = network_scores(rows, images, references, job.networks, progress)
    figures = {
        "model": job.model,
        "images": len(job.prompts),
        "noise_seed": job.noise_seed,
        "machine": before,
        "rows": rows,
        "missing": missing,
    }
    return figures, stores, failed


def _row_job(job: UserJob, recipe: Recipe | None, settings: Settings) -> RowJob:
    return RowJob(
        model=job.model,
        recipe=recipe,
        prompts=job.prompts,
        noise_seed=job.noise_seed,
        steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        batch_size=settings.batch_size,
    )


def _paired(name: str, images: NDArray[np.float32], reference: NDArray[np.float32], store: RowStore) -> dict[str, Any]:
    scores: dict[str, Any] = {}
    if name != "FP":
        mse, ssim = score_images(images, reference)
        scored = Scored(mse=mse, ssim=ssim)
        found = {metric: estimate(scored, metric) for metric in _PAIRED}
        scores = {metric: asdict(value) for metric, value in found.items() if value is not None}
    return {"scores": scores, **(store.facts() or {})}


def _cut(picture: Image.Image, size: tuple[int, int]) -> NDArray[np.uint8]:
    height, width = size
    scale = max(height / picture.height, width / picture.width)
    resized = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)
    left, top = (resized.width - width) // 2, (resized.height - height) // 2
    return np.asarray(resized.crop((left, top, left + width, top + height)), dtype=np.uint8)


def shown_names(sources: Sequence[str]) -> list[str]:
    """Names for recipes: presets by name, files by their stem, made unique by a number."""
    names: list[str] = []
    for source in sources:
        stem = Path(source).stem if source.endswith((".yaml", ".yml")) else source
        name, number = stem, 2
        while name in names or name == "FP":
            name, number = f"{stem}-{number}", number + 1
        names.append(name)
    return names
