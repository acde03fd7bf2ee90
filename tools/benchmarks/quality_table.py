"""Measures the rows of the quality table and gathers their figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from benchmarks.bos_outlier import SUFFIX, load_any
from benchmarks.costs import machine
from benchmarks.quality_pool import Work, run_rows
from benchmarks.quality_rows import METRICS, Comparison, Metric, Row
from benchmarks.quality_scores import (
    Moments,
    Readings,
    Scored,
    estimate,
    moments,
    paired_difference,
    paired_ratio,
    read_images,
    score_images,
)
from benchmarks.quality_store import RowJob, RowStore, model_digest, source_digest
from qdexport.core.digests import digest_of
from qdexport.core.files import atomic_path
from qdexport.errors import RecipeError
from qdexport.models.sampling import prompts_for, schedule
from qdexport.models.shapes_evaluator import load_evaluator, real_features
from qdexport.quant.calibrate import calibration_prompts

if TYPE_CHECKING:
    from rich.console import Console

    from qdexport.core.progress import ProgressSink
    from qdexport.models.loaded import LoadedModel
    from qdexport.models.shapes_evaluator import ShapesEvaluator

__all__ = ["PAIRED_IMAGES", "Settings", "Table", "error_per_step", "evaluation_prompts", "measure"]

PAIRED_IMAGES: Final = 256  # images behind the figures that every row has
_PROMPT_SEED: Final = 0
_SPARE: Final = 8  # times as many prompts are drawn as needed, to replace those that are kept out
_LARGE: Final[tuple[Metric, ...]] = ("alignment", "frechet_real")  # over all images of a row
_RATIOS: Final[tuple[Metric, ...]] = ("mse", "frechet_fp")  # distances, which are compared as ratios too


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How rows are measured.

    Attributes:
        cache: where images are kept.
        reuse: take images that older code made.
        workers: rows at once.
        threads: of PyTorch, in each.
        images: at most so many images per row; None for what the rows ask for.
        steps: sampler steps; None for the model's usual number.
        guidance_scale: None for the model's usual one.
        batch_size: images sampled at once.
        real_images: renders behind the Frechet distance to real images.
    """

    cache: Path
    reuse: bool = False
    workers: int = 1
    threads: int = 1
    images: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    batch_size: int = 64
    real_images: int = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """What was measured.

    Attributes:
        figures: everything as plain values, for JSON: settings, machine, rows by name, comparisons.
        stores: the images of the rows that succeeded.
        failed: rows that could not be measured, and why.
    """

    figures: dict[str, Any]
    stores: Mapping[str, RowStore]
    failed: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """What is shared by the rows of one model."""

    loaded: LoadedModel
    digest: str
    evaluator: ShapesEvaluator
    real: Moments
    prompts: tuple[str, ...]


def measure(
    rows: Sequence[Row],
    comparisons: Sequence[Comparison],
    settings: Settings,
    *,
    kept_out: Sequence[Row],
    progress: ProgressSink,
    console: Console | None,
) -> Table:
    """Samples what is missing, scores all rows and compares those that are to be compared.

    Args:
        rows: each model's reference among them.
        comparisons: those whose rows are both there are made.
        settings: how.
        kept_out: rows whose calibration prompts are not measured with (all rows of the table, so that the prompts do
            not depend on the choice of rows).
        progress: stages.
        console: for the rows that run; None shows nothing.

    Raises:
        RecipeError: a model without an evaluator.
        QdExportError: a model cannot be loaded.
    """
    source = source_digest()
    models = {name: _model(name, rows, kept_out, settings, progress) for name in dict.fromkeys(r.model for r in rows)}
    stores = {row.name: _store(row, models[row.model], settings, source) for row in rows}
    works = [Work(name=name, store=store) for name, store in stores.items() if not store.complete]
    before = machine()
    failed = run_rows(works, workers=settings.workers, threads=settings.threads, console=console)
    with progress.stage(f"scoring {len(rows) - len(failed)} rows"):
        figures, scored = _score(rows, models, stores, failed)
    made = [_compare(pair, scored) for pair in comparisons if pair.row in scored and pair.against in scored]
    first = models[rows[0].model]
    return Table(
        figures={
            "settings": {
                "steps": {name: len(schedule(model.loaded, settings.steps)) for name, model in models.items()},
                "guidance_scale": {name: _guidance(model, settings) for name, model in models.items()},
                "prompt_seed": _PROMPT_SEED,
                "prompts_kept_out": len(_calibration_prompts(first.loaded, kept_out)),
                "real_images": settings.real_images,
                "batch_size": settings.batch_size,
            },
            "machine": before,
            "rows": figures,
            "comparisons": made,
        },
        stores={name: store for name, store in stores.items() if name in scored},
        failed=failed,
    )


def evaluation_prompts(loaded: LoadedModel, count: int, kept_out: set[str]) -> tuple[str, ...]:
    """The model's own prompts; those that a calibration has seen give way to others of as many words.

    All others keep their place, and with it their noise, whatever is kept out.

    Raises:
        RecipeError: there are not enough others.
    """
    drawn = prompts_for(loaded, _SPARE * count, _PROMPT_SEED)
    spare = [prompt for prompt in drawn[count:] if prompt not in kept_out]
    prompts = drawn[:count]
    for index, prompt in enumerate(prompts):
        if prompt in kept_out:
            other = next((found for found in spare if len(found.split()) == len(prompt.split())), None)
            if other is None:
                raise RecipeError(f"calibration uses too many prompts of {loaded.name}; calibrate with fewer prompts")
            spare.remove(other)
            prompts[index] = other
    return tuple(prompts)


def error_per_step(store: RowStore, reference: RowStore) -> list[dict[str, float]]:
    """Squared error of the latents that enter each step, on each model's own trajectory; 0 at the first step."""
    ours, theirs = store.latents(), reference.latents()
    images = min(ours.shape[1], theirs.shape[1])
    errors = ((ours[:, :images].astype(np.float64) - theirs[:, :images]) ** 2).mean(axis=(1, 2, 3, 4))
    return [
        {"step": step, "timestep": int(timestep), "mse": float(error)}
        for step, (timestep, error) in enumerate(zip(store.timesteps(), errors, strict=True))
    ]


def _model(
    name: str, rows: Sequence[Row], kept_out: Sequence[Row], settings: Settings, progress: ProgressSink
) -> _Model:
    loaded = load_any(name)
    if loaded.evaluator is None or loaded.folder is None:
        raise RecipeError(
            f"the rows of {name!r} need a model with an evaluator (shapes, shapes-turbo); "
            "use --model, --prompts and --recipe for a model of your own"
        )
    evaluator = load_evaluator(loaded.folder)
    count = max(_image_count(row, settings) for row in rows if row.model == name)
    known = _calibration_prompts(loaded, kept_out)
    return _Model(
        loaded=loaded,
        # the outlier is made in memory: both models have one folder
        digest=model_digest(loaded.folder) + (SUFFIX if name.endswith(SUFFIX) else ""),
        evaluator=evaluator,
        real=_real(evaluator, settings, progress),
        prompts=evaluation_prompts(loaded, count, known),
    )


def _calibration_prompts(loaded: LoadedModel, rows: Sequence[Row]) -> set[str]:
    prompts: set[str] = set()
    for row in rows:
        if row.recipe is not None:
            prompts |= set(calibration_prompts(loaded, row.recipe.calibration))
            if row.recipe.bit_allocation is not None:
                settings = row.recipe.bit_allocation
                count = max(settings.images, settings.candidate_images)
                prompts |= set(prompts_for(loaded, count, settings.seed))
    return prompts


def _image_count(row: Row, settings: Settings) -> int:
    return row.images if settings.images is None else min(row.images, settings.images)


def _guidance(model: _Model, settings: Settings) -> float:
    default = model.loaded.defaults.guidance_scale
    return default if settings.guidance_scale is None else settings.guidance_scale


def _real(evaluator: ShapesEvaluator, settings: Settings, progress: ProgressSink) -> Moments:
    weights = [(name, value.double().sum().item()) for name, value in evaluator.state_dict().items()]
    path = settings.cache / f"real-{settings.real_images}-{digest_of(weights)[:12]}.npz"
    if not path.is_file():
        with progress.stage(f"features of {settings.real_images:,} real images"):
            features = real_features(settings.real_images, seed=0, evaluator=evaluator)
        with atomic_path(path) as partial, partial.open("wb") as stream:
            np.savez(stream, allow_pickle=False, features=features)
    with np.load(path, allow_pickle=False) as arrays:
        return moments(arrays["features"].astype(np.float64))


def _store(row: Row, model: _Model, settings: Settings, source: str) -> RowStore:
    job = RowJob(
        model=row.model,
        recipe=row.recipe,
        prompts=model.prompts[: _image_count(row, settings)],
        noise_seed=row.noise_seed,
        steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        batch_size=settings.batch_size,
    )
    return RowStore(settings.cache, job, model=model.digest, source=source, reuse=settings.reuse)


def _score(
    rows: Sequence[Row], models: Mapping[str, _Model], stores: Mapping[str, RowStore], failed: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Scored]]:
    figures: dict[str, Any] = {}
    scored: dict[str, Scored] = {}
    references = {row.model: row.name for row in rows if row.is_reference}
    images = {model: stores[name].images() for model, name in references.items() if name not in failed}
    readings: dict[str, Readings] = {}
    for model, batch in images.items():
        readings[model] = read_images(batch, models[model].prompts[: len(batch)], models[model].evaluator)
    for row in rows:
        if row.name in failed or row.model not in images:
            continue
        own, count = stores[row.name].images(), min(len(stores[row.name].job.prompts), len(images[row.model]))
        mse, ssim = score_images(own[:count], images[row.model][:count])
        scored[row.name] = Scored(
            mse=mse,
            ssim=ssim,
            readings=read_images(own[:count], models[row.model].prompts[:count], models[row.model].evaluator),
            reference=None if row.is_reference else readings[row.model],
            real=models[row.model].real,
        )
        figures[row.name] = _figures(row, scored[row.name], stores, references)
    return figures, scored


def _figures(row: Row, scored: Scored, stores: Mapping[str, RowStore], references: Mapping[str, str]) -> dict[str, Any]:
    store = stores[row.name]
    chosen = [metric for metric in METRICS if not (row.is_reference and metric in ("mse", "psnr_db", "ssim"))]
    return {
        "title": row.title,
        "group": row.group,
        "model": row.model,
        "recipe": row.source,
        "recipe_digest": None if row.recipe is None else row.recipe.digest(),
        "noise_seed": row.noise_seed,
        "images": len(scored),
        "scores": _estimates(scored, chosen, PAIRED_IMAGES),
        "psnr_image_db": _mean_psnr(scored, PAIRED_IMAGES) if not row.is_reference else None,
        "large": _estimates(scored, _LARGE, len(scored)) if len(scored) > PAIRED_IMAGES else None,
        "error_per_step": None if row.is_reference else error_per_step(store, stores[references[row.model]]),
        "first": dict(row.first),
        **(store.facts() or {}),
    }


def _estimates(scored: Scored, metrics: Sequence[Metric], images: int) -> dict[str, dict[str, float]]:
    found = {metric: estimate(scored, metric, images) for metric in metrics}
    return {metric: asdict(value) for metric, value in found.items() if value is not None}


def _mean_psnr(scored: Scored, images: int) -> float | None:
    """The mean of the images' own PSNR in dB; None when an image is equal to its reference."""
    mse = scored.mse[:images]
    return float((10 * np.log10(4.0 / mse)).mean()) if bool((mse > 0).all()) else None


def _compare(pair: Comparison, scored: Mapping[str, Scored]) -> dict[str, Any]:
    differences = {}
    first, second = scored[pair.row], scored[pair.against]
    for metric in pair.metrics:
        images = None if metric in _LARGE else PAIRED_IMAGES
        value = paired_difference(first, second, metric, images)
        if value is not None:
            ratio = paired_ratio(first, second, metric, images) if metric in _RATIOS else None
            differences[metric] = {
                **asdict(value),
                "measurable": not value.holds_zero,
                "ratio": None if ratio is None else asdict(ratio),
            }
    return {"row": pair.row, "against": pair.against, "differences": differences}
