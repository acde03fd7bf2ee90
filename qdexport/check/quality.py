"""Tier 1: images of the floating-point model against the fake-quant one and the ONNX file, same prompts and seeds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from qdexport.check.calls import fake_quant_denoiser
from qdexport.check.measure import sqnr_db
from qdexport.check.onnx_denoiser import OnnxDenoiser
from qdexport.core.results import Quality, QualityScores
from qdexport.models.sampling import SampleRequest, call_count, prompts_for, sample, schedule
from qdexport.models.shapes_evaluator import frechet_distance, load_evaluator, real_features

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from qdexport.core.io_spec import IoSpec
    from qdexport.models.shapes_evaluator import ShapesEvaluator
    from qdexport.quant.attach import QuantizedModel

__all__ = ["compare_quality"]

_RANGE = 2.0  # images lie in [-1, 1]
_REAL_IMAGES = 4000  # renders behind the Frechet distance to real images
_TRACED_ROWS = 8  # rows of the first batch whose latents are followed through the steps


@dataclass
class _Trace:
    """The latents that a denoiser saw, step by step, of a few rows of the first batch."""

    latents: dict[int, np.ndarray] = field(default_factory=dict)
    timesteps: dict[int, int] = field(default_factory=dict)

    def __call__(self, step: int, timestep: int, inputs: dict[str, Tensor]) -> None:
        if step not in self.latents:
            self.latents[step] = inputs["sample"][:_TRACED_ROWS].float().numpy().copy()
            self.timesteps[step] = timestep


def compare_quality(
    model: QuantizedModel, onnx_path: Path | None, io: IoSpec, on_progress: Callable[[int, int], None] | None = None
) -> tuple[Quality | None, dict[str, np.ndarray]]:
    """Samples the recipe's validation images three times and scores them.

    Args:
        model: the fake-quant model beside its floating-point one.
        onnx_path: the emitted file; None leaves its column out.
        io: its inputs and outputs.
        on_progress: called with the denoiser calls done and their total.

    Returns:
        The scores, and the images ``[N, 3, H, W]`` in [-1, 1] by column; None and nothing without a pipeline.
    """
    loaded, validation = model.loaded, model.recipe.validation
    if loaded.pipeline is None:
        return None, {}
    prompts = prompts_for(loaded, validation.images, validation.seed) or [""] * validation.images
    request = SampleRequest(
        prompts=tuple(prompts), seed=validation.seed, steps=model.recipe.calibration.steps,
        guidance_scale=model.recipe.calibration.guidance_scale,
        height=io.inputs[0].shape()[2], width=io.inputs[0].shape()[3],
    )
    denoisers: dict[str, Any] = {"fp": None, "quantized": fake_quant_denoiser(model)}
    if onnx_path is not None:
        denoisers["onnx"] = OnnxDenoiser(onnx_path, io, loaded.denoiser)
    images, traces = {}, {column: _Trace() for column in denoisers}
    calls = call_count(loaded, request)
    for index, (column, denoiser) in enumerate(denoisers.items()):
        before = index * calls

        def count(done: int, _: int, before: int = before) -> None:
            if on_progress is not None:
                on_progress(before + done, calls * len(denoisers))

        images[column] = sample(loaded, request, denoiser=denoiser, on_call=traces[column], on_progress=count)
    scores = _scores(images, prompts, _evaluator(model))
    quality = Quality(
        images=len(prompts), steps=len(schedule(loaded, request.steps)), seed=validation.seed,
        fp=scores["fp"], quantized=scores["quantized"], onnx=scores.get("onnx"),
        error_per_step=_error_per_step(traces),
    )
    return quality, images


def _evaluator(model: QuantizedModel) -> ShapesEvaluator | None:
    path = model.loaded.evaluator
    return None if path is None else load_evaluator(path.parent.parent)


def _scores(
    images: dict[str, np.ndarray], prompts: list[str], evaluator: ShapesEvaluator | None
) -> dict[str, QualityScores]:
    scores = {column: _against(images["fp"], batch) if column != "fp" else {} for column, batch in images.items()}
    if evaluator is not None:
        real = real_features(_REAL_IMAGES, seed=0, evaluator=evaluator)
        tensors = {column: torch.from_numpy(batch) for column, batch in images.items()}
        features = {column: evaluator.features(batch).numpy() for column, batch in tensors.items()}
        for column, batch in tensors.items():
            scores[column]["alignment"] = evaluator.alignment(batch, prompts)
            if len(batch) > 1:
                scores[column]["frechet"] = frechet_distance(features[column], real)
            if column != "fp" and len(batch) > 1:
                scores[column]["frechet_fp"] = frechet_distance(features[column], features["fp"])
    return {column: QualityScores(**values) for column, values in scores.items()}


def _against(reference: np.ndarray, other: np.ndarray) -> dict[str, float]:
    a, b = torch.from_numpy(other), torch.from_numpy(reference)
    mse = float(((a - b) ** 2).mean())
    ssim = structural_similarity_index_measure(a, b, data_range=_RANGE)
    if isinstance(ssim, tuple):
        ssim = ssim[0]
    # equal images have no finite PSNR; JSON has no infinity
    psnr = float(peak_signal_noise_ratio(a, b, data_range=_RANGE)) if mse > 0 else 999.0
    return {"mse": mse, "psnr_db": psnr, "ssim": float(ssim)}


def _error_per_step(traces: dict[str, _Trace]) -> list[dict[str, float]]:
    """How far the latents of each denoiser's own trajectory are from the floating-point one's."""
    reference = traces["fp"]
    rows = []
    for step, latent in sorted(reference.latents.items()):
        row: dict[str, float] = {"step": step, "timestep": reference.timesteps[step]}
        for column, trace in traces.items():
            if column == "fp" or step not in trace.latents or step == 0:
                continue  # all start from the same noise
            row[f"{column}_mse"] = float(((trace.latents[step] - latent) ** 2).mean())
            row[f"{column}_sqnr_db"] = min(float(sqnr_db(latent, trace.latents[step])), 999.0)
        rows.append(row)
    return rows
