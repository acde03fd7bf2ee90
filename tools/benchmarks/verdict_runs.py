"""Runs the recipes of the verdict table in processes of their own, and gathers what they found."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.children import ChildError, run_module
from benchmarks.quality_store import model_digest, source_digest
from benchmarks.verdict_rows import VerdictRow
from qdexport.check.verdict import FLOOR_MARGIN_DB, LAYER_SQNR_DB
from qdexport.core.digests import digest_of
from qdexport.core.files import write_text
from qdexport.errors import OutputError
from qdexport.models.source import resolve_source

__all__ = ["KINDS", "Settings", "gather", "run", "sheet_path"]

KINDS: Final = ("pictures", "compiled")
# the noise of picture i comes from seed + i, and a validation makes 256 at most: no two seeds share one
_BETWEEN_SEEDS: Final = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is measured, and how.

    Attributes:
        cache: where pictures and verdicts are kept.
        models: as `load_model` takes them.
        rows: the recipes.
        sources: recipes that only the benchmarks have, by name.
        seeds: how many seeds of validation.
        compiled: whether the network is lowered and compared, or pictures alone.
        build: whether an engine is built, too.
        target: where the network will run.
        workers: processes at once.
        threads: of PyTorch, in each.
        reuse: take what older code made.
        again: judge again what has been judged.
    """

    cache: Path
    models: tuple[str, ...]
    rows: tuple[VerdictRow, ...]
    sources: Mapping[str, dict[str, Any]]
    seeds: int
    compiled: bool
    build: bool
    target: str
    workers: int
    threads: int
    reuse: bool
    again: bool

    @property
    def seed_list(self) -> list[int]:
        """The seeds of validation."""
        return [number * _BETWEEN_SEEDS for number in range(self.seeds)]


def run(settings: Settings, say: Callable[[str], None]) -> dict[str, str]:
    """Measures what is missing; returns the recipes that failed, and why.

    Raises:
        OutputError: the cache holds what other code made.
    """
    _check_source(settings)
    works = {
        f"{Path(model).name} {row.name}": _spec(settings, model, row)
        for model in settings.models
        for row in settings.rows
    }
    works = {name: spec for name, spec in works.items() if spec["seeds"]}
    failed: dict[str, str] = {}
    started, total = time.monotonic(), sum(len(spec["seeds"]) for spec in works.values())
    done = 0
    with ThreadPoolExecutor(settings.workers) as pool:
        waiting = {
            pool.submit(run_module, "benchmarks.verdict_child", spec, Path(spec["folder"]).parent): name
            for name, spec in works.items()
        }
        for future in as_completed(waiting):
            name = waiting[future]
            done += len(works[name]["seeds"])
            try:
                future.result()
            except ChildError as error:
                failed[name] = f"{name}: {error}"
            left = (time.monotonic() - started) / done * (total - done) / 60
            say(f"{name}: {'FAILED' if name in failed else 'done'}; {done} of {total}, about {left:.0f} min left")
    return failed


def gather(settings: Settings) -> dict[str, Any]:
    """What is known by model, row and kind of verdict: one entry per seed, and a summary."""
    return {
        "seeds": settings.seed_list,
        "models": {
            Path(model).name: {
                row.name: {"must": row.kept if model == "shapes" else None, **_known(settings, model, row)}
                for row in settings.rows
            }
            for model in settings.models
        },
    }


def sheet_path(settings: Settings, model: str, row: VerdictRow) -> Path:
    """The first pictures of a recipe, a file of arrays."""
    return _folder(settings, model, row) / "sheet.npz"


def _known(settings: Settings, model: str, row: VerdictRow) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in KINDS:
        paths = [_result_path(settings, model, row, kind, seed) for seed in settings.seed_list]
        results = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
        if results:
            found[kind] = {"verdicts": [item[kind] for item in results], "results": results, **_summary(kind, results)}
    return found


def _summary(kind: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """How far the verdicts were from the other one: of pictures as a factor, of the network in decibels."""
    if kind == "pictures":
        margins = [_picture_margin(item) for item in results]
        shares = [item["share"]["value"] for item in results if item.get("share")]
        return {
            "margins": margins,
            "least_margin": min((margin for margin in margins if margin is not None), default=None),
            "share": sum(shares) / len(shares) if shares else None,
            "mse": sum(item["mse"] or 0.0 for item in results) / len(results),
            "most_images": max(item["images"] for item in results),
        }
    decibels = [
        min(
            item["parity"]["layer_db"] - LAYER_SQNR_DB["fp32"],
            item["parity"]["whole_db"] - item["parity"]["floor_db"] + FLOOR_MARGIN_DB,
        )
        for item in results
    ]
    return {"margins": decibels, "least_margin": min(decibels, default=None)}


def _picture_margin(result: Mapping[str, Any]) -> float | None:
    """By which factor a number lies off its limit: of what is kept the least of share, texture and contrast, of
    what is not the greatest. Of the share the deciding end of the interval counts. Below 1 where alignment
    decided, None where nothing did.
    """
    share = result.get("share")
    if not share or result["pictures"] == "not judged":
        return None
    factors: list[float] = [share["limit"] / share["high"]]
    # how often the change fits into the allowed one, both as logarithms: on either side of 1, as the verdict takes it
    changes = filter(None, (result.get("texture"), result.get("contrast")))
    factors += [math.log(found["limit"]) / max(abs(math.log(found["value"])), 1e-3) for found in changes]
    return min(factors) if result["pictures"] == "kept" else max(1 / factor for factor in factors)


def _check_source(settings: Settings) -> None:
    path, source = settings.cache / "source.txt", source_digest()
    if path.is_file() and path.read_text(encoding="utf-8").strip() != source and not settings.reuse:
        raise OutputError(
            f"{settings.cache} holds what other code of qdexport made: --reuse takes it, --cache names another folder"
        )
    settings.cache.mkdir(parents=True, exist_ok=True)
    if not settings.reuse or not path.is_file():
        write_text(path, source)


def _spec(settings: Settings, model: str, row: VerdictRow) -> dict[str, Any]:
    folder, kind = _folder(settings, model, row), KINDS[settings.compiled]
    paths = {seed: _result_path(settings, model, row, kind, seed) for seed in settings.seed_list}
    return {
        "model": model,
        "recipe": row.recipe(settings.sources).model_dump(mode="json"),
        "seeds": [(seed, str(path)) for seed, path in paths.items() if settings.again or not path.is_file()],
        "compiled": settings.compiled,
        "build": settings.build,
        "target": settings.target,
        "threads": settings.threads,
        "folder": str(folder / "out"),
        "pictures": str(_model_folder(settings, model) / "pictures"),
        "sheet": str(folder / "sheet.npz"),
        "progress": str(folder / "progress.json"),
    }


def _model_folder(settings: Settings, model: str) -> Path:
    _, folder = resolve_source(model, None)
    return settings.cache / f"{Path(model).name}-{model_digest(folder)[:8]}"


def _folder(settings: Settings, model: str, row: VerdictRow) -> Path:
    recipe = row.recipe(settings.sources)
    digest = digest_of(recipe.model_dump(mode="json", exclude={"validation"}))
    return _model_folder(settings, model) / f"{row.name}-{digest[:8]}"


def _result_path(settings: Settings, model: str, row: VerdictRow, kind: str, seed: int) -> Path:
    named = kind if kind == "pictures" else f"{kind}-{settings.target}"
    return _folder(settings, model, row) / f"{named}-{seed}.json"
