"""Samples one row of the quality table: ``python -m benchmarks.quality_child SPEC.json``."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.children import answer
from benchmarks.quality_store import write_batch, write_facts
from qdexport.errors import INTERRUPTED_EXIT_CODE, QdExportError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from torch import Tensor

    from qdexport.core.progress import Advance
    from qdexport.models.loaded import LoadedModel

__all__ = ["FileProgress", "main"]

_SECONDS_BETWEEN_REPORTS = 0.5
_TRACED = 32  # images of the first batch whose latents are kept at every step


class FileProgress:
    """A ``ProgressSink`` that tells another process: what is being done, and how many images are."""

    def __init__(self, path: Path) -> None:
        self._path, self._last = path, 0.0
        self._state: dict[str, Any] = {"doing": "starting", "images": 0.0}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Says what the block does."""
        self.tell(doing=name)
        yield

    @contextlib.contextmanager
    def track(self, total: int, description: str) -> Iterator[Advance]:
        """Says what the block does and how much of it is done."""
        done = 0
        self.tell(doing=description)

        def advance(count: int, note: str = "") -> None:
            nonlocal done
            done += count
            self.tell(doing=f"{description} {done}/{total} {note}".strip(), hurried=False)

        yield advance

    def tell(self, *, doing: str | None = None, images: float | None = None, hurried: bool = True) -> None:
        """Reports at once, or (``hurried=False``) when the last report is some time ago."""
        if doing is not None:
            self._state["doing"] = doing
        if images is not None:
            self._state["images"] = images
        if not hurried and time.monotonic() - self._last < _SECONDS_BETWEEN_REPORTS:
            return
        self._last = time.monotonic()
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self._state), encoding="utf-8")
        partial.replace(self._path)


class _Trace:
    """The latents that enter each step, of the first images of a batch."""

    def __init__(self, images: int) -> None:
        self._images = min(images, _TRACED)
        self.latents: dict[int, np.ndarray] = {}
        self.timesteps: dict[int, float] = {}

    def __call__(self, step: int, timestep: float, inputs: dict[str, Tensor]) -> None:
        if step not in self.latents:
            # with guidance the batch comes twice; the first images are the same latents in both halves
            self.latents[step] = inputs["sample"][: self._images].float().cpu().numpy().copy()
            self.timesteps[step] = timestep


def main(spec_path: str) -> None:
    """Samples what is missing of a row, one file per batch.

    The specification holds ``model``, ``recipe`` (as JSON, or null), ``prompts`` (all of the row), ``batches``
    (pairs of start and path), ``noise_seed``, ``steps``, ``guidance_scale``, ``batch_size``, ``threads``,
    ``facts``, ``progress`` and ``state`` (paths).
    """
    spec: dict[str, Any] = json.loads(Path(spec_path).read_text(encoding="utf-8"))
    import torch

    torch.set_num_threads(int(spec["threads"]))
    progress, started = FileProgress(Path(spec["progress"])), time.perf_counter()
    loaded, denoiser, facts = _denoiser(spec, progress, Path(spec["state"]))
    facts["prepare_seconds"] = round(time.perf_counter() - started, 2)
    _sample_batches(spec, loaded, denoiser, progress)
    facts["seconds"] = round(time.perf_counter() - started, 2)
    facts["cpu_seconds"] = round(time.process_time(), 2)
    write_facts(Path(spec["facts"]), facts)
    for calibration in Path(spec["state"]).glob("*.safetensors"):
        calibration.unlink()  # large, and made again in seconds; sensitivities stay
    answer(spec, facts)


def _denoiser(
    spec: dict[str, Any], progress: FileProgress, state_dir: Path
) -> tuple[LoadedModel, Any | None, dict[str, Any]]:
    from benchmarks.bos_outlier import load_any
    from benchmarks.quality_model import average_widths, prepare
    from qdexport.core.recipe import Recipe

    if spec["recipe"] is None:
        progress.tell(doing="loading")
        return load_any(spec["model"]), None, {}
    model = prepare(spec["model"], Recipe.model_validate(spec["recipe"]), state_dir, progress)
    return model.loaded, model.denoiser, asdict(average_widths(model))


def _sample_batches(spec: dict[str, Any], loaded: LoadedModel, denoiser: Any | None, progress: FileProgress) -> None:
    import numpy as np

    from qdexport.models.sampling import SampleRequest, sample

    size, done = int(spec["batch_size"]), 0
    progress.tell(doing="sampling")
    for start, path in spec["batches"]:
        prompts = spec["prompts"][start : start + size]
        before, count = done, len(prompts)

        def report(calls: int, total: int, before: int = before, count: int = count) -> None:
            progress.tell(images=before + count * calls / total, hurried=False)

        request = SampleRequest(
            prompts=tuple(prompts),
            seed=spec["noise_seed"] + start,
            steps=spec["steps"],
            guidance_scale=spec["guidance_scale"],
            batch_size=size,
        )
        trace = _Trace(count) if start == 0 else None
        images = sample(loaded, request, denoiser=denoiser, on_call=trace, on_progress=report)
        arrays = {"images": images}
        if trace is not None:
            arrays["latents"] = np.stack([trace.latents[step] for step in sorted(trace.latents)])
            arrays["timesteps"] = np.array([trace.timesteps[step] for step in sorted(trace.latents)], np.float32)
        write_batch(Path(path), **arrays)
        done += count
        progress.tell(images=done)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except QdExportError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED_EXIT_CODE)
