"""Quality: images of the floating-point model against those of the fake-quant one and the ONNX file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from qdexport.check.calls import fake_quant_denoiser, sample_size
from qdexport.check.measure import sqnr_db
from qdexport.check.onnx_denoiser import OnnxDenoiser
from qdexport.core.io_spec import IoSpec
from qdexport.core.results import Quality, QualityScores
from qdexport.models.sampling import SampleRequest, call_count, prompts_for, sample, schedule
from qdexport.models.shapes import IMAGE_SIZE
from qdexport.models.shapes_evaluator import ShapesEvaluator, frechet_distance, load_evaluator, real_features
from qdexport.quant.attach import QuantizedModel

__all__ = ["compare_quality"]

OnProgress = Callable[[int, int], None]
_RANGE: Final = 2.0  # images lie in [-1, 1]
_REAL_IMAGES: Final = 4000  # renders behind the Frechet distance to real images
_TRACED_ROWS: Final = 8  # rows of the first batch whose latents are followed through the steps
_EQUAL_DB: Final = 999.0  # equal images have no finite PSNR, and JSON has no infinity
_FP: Final = "fp"


@dataclass(slots=True)
class _Trace:
    """The latents that a denoiser saw, step by step, of a few rows of the first batch."""

    latents: dict[int, np.ndarray] = field(default_factory=dict)
    timesteps: dict[int, float] = field(default_factory=dict)

    def __call__(self, step: int, timestep: float, inputs: dict[str, Tensor]) -> None:
        if step not in self.latents:
            self.latents[step] = inputs["sample"][:_TRACED_ROWS].float().numpy().copy()
            self.timesteps[step] = timestep


def compare_quality(
    model: QuantizedModel, onnx_path: Path | None, io: IoSpec, on_progress: OnProgress | None = None
) -> tuple[Quality | None, dict[str, np.ndarray]]:
    """Samples the recipe's validation images with each denoiser, from the same prompts and noise, and scores them.

    Args:
        model: the fake-quant model beside its floating-point one.
        onnx_path: the emitted file, run by ONNX Runtime; None leaves its column out.
        io: its inputs and outputs.
        on_progress: called with the denoiser calls done and their total.

    Returns:
        The scores, and the images ``[N, 3, H, W]`` in [-1, 1] as ``fp``, ``quantized`` and ``onnx``; None and no
        images for a model without a pipeline. The error per step is that of the latents on each denoiser's own
        trajectory, as it enters the step; all start from the same noise.
    """
    loaded, validation = model.loaded, model.recipe.validation
    if loaded.pipeline is None:
        return None, {}
    request = SampleRequest(
        prompts=tuple(prompts_for(loaded, validation.images, validation.seed)),
        seed=validation.seed,
        steps=model.recipe.calibration.steps,
        guidance_scale=model.recipe.calibration.guidance_scale,
        **sample_size(io),
    )
    denoisers: dict[str, Any] = {_FP: None, "quantized": fake_quant_denoiser(model)}
    if onnx_path is not None:
        denoisers["onnx"] = OnnxDenoiser(onnx_path, io, loaded.denoiser)
    calls = call_count(loaded, request)
    images: dict[str, np.ndarray] = {}
    traces = {column: _Trace() for column in denoisers}
    for column, denoiser in denoisers.items():
        advance = _shifted(on_progress, len(images) * calls, len(denoisers) * calls)
        images[column] = sample(
            loaded, request, denoiser=denoiser, on_call=traces[column], on_progress=advance
        )
    scores = _scores(images, list(request.prompts), _evaluator(model, images[_FP].shape[-2:]))
    quality = Quality(
        images=len(request.prompts),
        steps=len(schedule(loaded, request.steps)),
        seed=validation.seed,
        fp=scores[_FP],
        quantized=scores["quantized"],
        onnx=scores.get("onnx"),
        error_per_step=_error_per_step(traces),
    )
    return quality, images


def _shifted(on_progress: OnProgress | None, before: int, total: int) -> OnProgress | None:
    if on_progress is None:
        return None
    return lambda done, _: on_progress(before + done, total)


def _evaluator(model: QuantizedModel, size: tuple[int, ...]) -> ShapesEvaluator | None:
    """The model's own judge, if it has one and its pictures are of the one size that it reads."""
    path = model.loaded.evaluator
    return None if path is None or size != (IMAGE_SIZE, IMAGE_SIZE) else load_evaluator(path.parent.parent)


def _scores(
    images: dict[str, np.ndarray], prompts: list[str], evaluator: ShapesEvaluator | None
) -> dict[str, QualityScores]:
    scores: dict[str, dict[str, float]] = {
        column: {} if column == _FP else _against(images[_FP], batch) for column, batch in images.items()
    }
    if evaluator is not None:
        real = real_features(_REAL_IMAGES, seed=0, evaluator=evaluator)
        tensors = {column: torch.from_numpy(batch) for column, batch in images.items()}
        features = {column: evaluator.features(batch).numpy() for column, batch in tensors.items()}
        for column, batch in tensors.items():
            scores[column]["alignment"] = evaluator.alignment(batch, prompts)
            if len(batch) > 1:  # one image has no covariance
                scores[column]["frechet"] = frechet_distance(features[column], real)
            if column != _FP and len(batch) > 1:
                scores[column]["frechet_fp"] = frechet_distance(features[column], features[_FP])
    return {column: QualityScores(**values) for column, values in scores.items()}


def _against(reference: np.ndarray, other: np.ndarray) -> dict[str, float]:
    a, b = torch.from_numpy(other), torch.from_numpy(reference)
    mse = float(((a.double() - b.double()) ** 2).mean())
    ssim = structural_similarity_index_measure(a, b, data_range=_RANGE)
    psnr = float(peak_signal_noise_ratio(a, b, data_range=_RANGE)) if mse > 0 else _EQUAL_DB
    return {"mse": mse, "psnr_db": psnr, "ssim": float(ssim)}


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
