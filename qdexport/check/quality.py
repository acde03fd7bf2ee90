"""Quality: images of the floating-point model against those of the fake-quant one and the ONNX file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from qdexport.check.calls import fake_quant_denoiser, sample_size
from qdexport.check.measure import sqnr_db
from qdexport.check.onnx_denoiser import OnnxDenoiser
from qdexport.check.pictures import Pictures
from qdexport.core.io_spec import IoSpec
from qdexport.core.results import Quality, QualityScores
from qdexport.models.sampling import SampleRequest, call_count, prompts_for, sample, schedule
from qdexport.models.shapes import IMAGE_SIZE
from qdexport.models.shapes_evaluator import ShapesEvaluator, frechet_distance, load_evaluator, real_features
from qdexport.models.similarity import structural_similarity
from qdexport.models.untrained import is_untrained
from qdexport.quant.attach import QuantizedModel

__all__ = ["OTHER_SEED", "compare_quality"]

OnProgress = Callable[[int, int], None]
Track = Callable[[str], AbstractContextManager[OnProgress]]
OTHER_SEED: Final = "other_seed"
_FP, _QUANTIZED, _ONNX = "fp", "quantized", "onnx"
_RANGE: Final = 2.0  # images lie in [-1, 1]
_REAL_IMAGES: Final = 4000  # renders behind the Frechet distance to real images
_TRACED_ROWS: Final = 8  # rows of the first batch whose latents are followed through the steps
_EQUAL_DB: Final = 999.0  # equal images have no finite PSNR, and JSON has no infinity
# far from the seeds of all other pictures, so that none is its own other one
_OTHER_NOISE: Final = 1_000_003
_FIRST_OTHERS: Final = 16  # pictures from other noise that are made at first: one batch decides where much is clear
_UNTRAINED: Final = (
    "The weights of {name} are those of an initializer: its pictures are noise before it is quantized, too."
)


@dataclass(slots=True)
class _Trace:
    """The latents that a denoiser saw, step by step, of a few rows of the first batch."""

    latents: dict[int, np.ndarray] = field(default_factory=dict)
    timesteps: dict[int, float] = field(default_factory=dict)

    def __call__(self, step: int, timestep: float, inputs: dict[str, Tensor]) -> None:
        if step not in self.latents:
            self.latents[step] = inputs["sample"][:_TRACED_ROWS].float().numpy().copy()
            self.timesteps[step] = timestep


@contextlib.contextmanager
def _untracked(_: str) -> Iterator[OnProgress]:
    yield lambda done, total: None


def compare_quality(
    model: QuantizedModel, onnx_path: Path | None, io: IoSpec, track: Track = _untracked
) -> tuple[Quality | None, dict[str, np.ndarray]]:
    """Samples the recipe's validation images with each denoiser, from the same prompts and noise, and scores them.

    What another seed makes of the same prompts is sampled beside them, as the scale of the error. Where the error is
    near its limit on that scale, or alignment near its own, more images are made, at most
    ``validation.pictures.extend`` times as many; they count in the scores and are not returned.

    Args:
        model: the fake-quant model beside its floating-point one.
        onnx_path: the emitted file, run by ONNX Runtime; None leaves its column out.
        io: its inputs and outputs.
        track: opens a progress bar of a title; what it gives is called with the denoiser calls done and their total.

    Returns:
        The scores, and the images ``[N, C, H, W]`` in [-1, 1] as ``fp``, ``quantized``, ``onnx`` and ``other_seed``
        (as many or fewer); None and no images for a model without a pipeline. The error per step is that of the
        latents on each denoiser's own trajectory, as it enters the step; all start from the same noise.
    """
    loaded, validation = model.loaded, model.recipe.validation
    if loaded.pipeline is None:
        return None, {}
    untrained = is_untrained(loaded.denoiser)
    sampler = _Sampler(model, onnx_path, io, track)
    count, most = validation.images, validation.images * validation.pictures.extend
    first = dict.fromkeys(sampler.denoisers, count)
    first[OTHER_SEED] = 0 if untrained else min(count, _FIRST_OTHERS)
    sampler.reach(first, "sampling images")
    evaluator = _evaluator(model, sampler.images[_FP].shape[-2:])
    while not untrained and sampler.pictures(evaluator).undecided():
        enough = len(sampler.images[OTHER_SEED])
        more = min(most, count if enough < count else 2 * enough)
        if more == enough:
            break
        title = f"up to {more} images: a verdict is near its limit"
        sampler.reach({_FP: more, _QUANTIZED: more, OTHER_SEED: more}, title)
    quality = _quality(sampler, evaluator)
    if untrained:
        quality.not_judged = _UNTRAINED.format(name=loaded.name)
    return quality, {column: images[:count] for column, images in sampler.images.items() if len(images)}


class _Sampler:
    """Images of every denoiser, of the same prompts and noise; more of them when more are asked for."""

    def __init__(self, model: QuantizedModel, onnx_path: Path | None, io: IoSpec, track: Track) -> None:
        loaded, validation = model.loaded, model.recipe.validation
        self.model, self._io, self._track = model, io, track
        # a longer list starts with the shorter one
        self.prompts = prompts_for(loaded, validation.images * validation.pictures.extend, validation.seed)
        self.denoisers: dict[str, Any] = {_FP: None, _QUANTIZED: fake_quant_denoiser(model)}
        if onnx_path is not None:
            self.denoisers[_ONNX] = OnnxDenoiser(onnx_path, io, loaded.denoiser)
        self.images: dict[str, np.ndarray] = {}
        self.traces = {column: _Trace() for column in self.denoisers}

    def reach(self, counts: Mapping[str, int], title: str) -> None:
        """Samples until each column has so many images."""
        requests = {column: self._request(column, count) for column, count in counts.items()}
        work = {column: request for column, request in requests.items() if request is not None}
        calls = [call_count(self.model.loaded, request) for request in work.values()]
        with self._track(title) as advance:
            for number, (column, request) in enumerate(work.items()):
                made = sample(
                    self.model.loaded,
                    request,
                    denoiser=self.denoisers.get(column),
                    on_call=self.traces.get(column),
                    on_progress=_shifted(advance, sum(calls[:number]), sum(calls)),
                )
                self.images[column] = np.concatenate([self.images[column], made]) if column in self.images else made

    def pictures(self, evaluator: ShapesEvaluator | None, column: str = _QUANTIZED) -> Pictures:
        """What the verdict on one column is made of."""
        own = self.images[column]
        fp = self.images[_FP][: len(own)]
        before, after = (_aligned(evaluator, batch, self.prompts) for batch in (fp, own))
        right = None if before is None or after is None else (before, after)
        return Pictures.of(own, fp, self.images.get(OTHER_SEED, fp[:0]), right, self.model.recipe.validation.pictures)

    def _request(self, column: str, count: int) -> SampleRequest | None:
        start, recipe = len(self.images.get(column, ())), self.model.recipe
        if start >= count:
            return None
        seed = recipe.validation.seed + start
        return SampleRequest(
            prompts=tuple(self.prompts[start:count]),
            seed=seed,
            noise_seed=seed + _OTHER_NOISE if column == OTHER_SEED else None,
            steps=recipe.calibration.steps,
            guidance_scale=recipe.calibration.guidance_scale,
            **sample_size(self._io),
        )


def _shifted(on_progress: OnProgress, before: int, total: int) -> OnProgress:
    return lambda done, _: on_progress(before + done, total)


def _evaluator(model: QuantizedModel, size: tuple[int, ...]) -> ShapesEvaluator | None:
    """The model's own judge, if it has one and its pictures are of the one size that it reads."""
    path = model.loaded.evaluator
    return None if path is None or size != (IMAGE_SIZE, IMAGE_SIZE) else load_evaluator(path.parent.parent)


def _aligned(evaluator: ShapesEvaluator | None, images: np.ndarray, prompts: list[str]) -> np.ndarray | None:
    """Whether each image shows its prompt; None without an evaluator, or where it could not read an image."""
    if evaluator is None or not np.isfinite(images).all():
        return None
    return evaluator.aligned(torch.from_numpy(images), prompts[: len(images)]).numpy()


def _quality(sampler: _Sampler, evaluator: ShapesEvaluator | None) -> Quality:
    model = sampler.model
    real = None if evaluator is None else real_features(_REAL_IMAGES, seed=0, evaluator=evaluator)
    scores = {column: _scores(sampler, column, evaluator, real) for column in sampler.images}
    judged = sampler.pictures(evaluator)
    for column in sampler.denoisers:
        if column != _FP:
            found = sampler.pictures(evaluator, column)
            scores[column].share, scores[column].alignment_fall = found.share, found.fall
            scores[column].texture, scores[column].contrast = found.texture, found.contrast
    return Quality(
        images=len(sampler.images[_FP]),
        steps=len(schedule(model.loaded, model.recipe.calibration.steps)),
        seed=model.recipe.validation.seed,
        fp=scores[_FP],
        quantized=scores[_QUANTIZED],
        onnx=scores.get(_ONNX),
        other_seed=scores.get(OTHER_SEED),
        not_judged=judged.not_judged,
        error_per_step=_error_per_step(sampler.traces),
    )


def _scores(
    sampler: _Sampler, column: str, evaluator: ShapesEvaluator | None, real: np.ndarray | None
) -> QualityScores:
    batch, prompts = sampler.images[column], sampler.prompts
    fp = sampler.images[_FP][: len(batch)]
    bad = int((~np.isfinite(batch)).reshape(len(batch), -1).any(axis=1).sum())
    scores = QualityScores(images=len(batch), not_finite=bad)
    if bad or not np.isfinite(fp).all():
        return scores
    values = {} if column == _FP else _against(fp, batch)
    right = _aligned(evaluator, batch, prompts)
    if right is not None:
        values["alignment"] = float(right.mean())
    if evaluator is not None and real is not None and column != OTHER_SEED and len(batch) > 1:  # one has no covariance
        features = evaluator.features(torch.from_numpy(batch)).numpy()
        values["frechet"] = frechet_distance(features, real)
        if column != _FP:
            values["frechet_fp"] = frechet_distance(features, evaluator.features(torch.from_numpy(fp)).numpy())
    return scores.model_copy(update=values)


def _against(reference: np.ndarray, other: np.ndarray) -> dict[str, float | None]:
    a, b = torch.from_numpy(other), torch.from_numpy(reference)
    mse = float(((a.double() - b.double()) ** 2).mean())
    psnr = float(peak_signal_noise_ratio(a, b, data_range=_RANGE)) if mse > 0 else _EQUAL_DB
    return {"mse": mse, "psnr_db": psnr, "ssim": structural_similarity(other, reference)}


def _error_per_step(traces: dict[str, _Trace]) -> list[dict[str, float]]:
    reference = traces[_FP]
    rows = []
    for step, latent in sorted(reference.latents.items()):
        row: dict[str, float] = {"step": step, "timestep": reference.timesteps[step]}
        for column, trace in traces.items():
            if column != _FP and step in trace.latents and step > 0:
                other = trace.latents[step]
                row[f"{column}_mse"] = float(((other - latent) ** 2).mean())
                row[f"{column}_sqnr_db"] = min(sqnr_db(latent, other), _EQUAL_DB)
        rows.append(row)
    return rows
