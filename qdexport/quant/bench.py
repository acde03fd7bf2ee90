"""The measuring bench of a sweep: a floating-point run, and how far another denoiser is from it.

Numbers are computed in FP32 with one thread, whatever the model's type, so that they are the same on every process.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from qdexport import __version__
from qdexport.core.digests import digest_of
from qdexport.errors import ModelError
from qdexport.models.denoiser_io import call_denoiser
from qdexport.models.load import load_model
from qdexport.models.loaded import LoadedModel
from qdexport.models.sampling import DenoiserCall, SampleRequest, record_calls, sample
from qdexport.models.similarity import structural_similarity
from qdexport.quant.attach import training_steps_of
from qdexport.quant.resume import weights_sha256
from qdexport.quant.tasks import one_thread

__all__ = ["BEST_DB", "Bench", "ModelSource", "RecordedCall", "Reference", "bench_digest", "open_model", "record"]

BEST_DB: Final = 150.0  # FP32 itself rounds at some 140 dB: beyond this, outputs are equal
_WORST_DB: Final = -100.0  # an output that is not finite
_WORST_SSIM: Final = -1.0
_SHARED: Final = ("timestep", "img_ids", "txt_ids")  # inputs without a row per sample

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where a worker loads the model from.

    Attributes:
        folder: of the model, or its name; every machine of a cluster must have it at this path.
        variant: of the weight files.
        sha256: of the denoiser's weights in FP32.
    """

    folder: str
    variant: str | None
    sha256: str

    def load(self) -> LoadedModel:
        """Loads the model in FP32.

        Raises:
            ModelError: it is not there, or is another one.
        """
        loaded = load_model(self.folder, variant=self.variant, torch_dtype="fp32")
        if weights_sha256(loaded.denoiser) != self.sha256:
            raise ModelError(f"the weights in {self.folder} are not those that the sweep was started with")
        return loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedCall:
    """Rows of one denoiser call of the floating-point run, and what it returned."""

    inputs: Arrays
    output: NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The floating-point run that everything is compared with.

    Attributes:
        request: prompts, noise and sampler settings of the images.
        images: ``[N, C, H, W]`` in [-1, 1]; empty when no image is needed.
        calls: denoiser calls spread over steps and prompts.
    """

    request: SampleRequest
    images: NDArray[np.float32]
    calls: tuple[RecordedCall, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Compares denoisers with the floating-point run.

    Attributes:
        loaded: the model in FP32.
        reference: its run.
    """

    loaded: LoadedModel
    reference: Reference

    @property
    def training_steps(self) -> int:
        """Of the model's scheduler."""
        return training_steps_of(self.loaded)

    def sqnr_db(self, denoiser: nn.Module) -> float:
        """``10 log10(sum y^2 / sum (y - y_q)^2)`` in dB over the outputs of all recorded calls."""
        signal = noise = 0.0
        with torch.no_grad():
            for call in self.reference.calls:
                inputs = {name: torch.from_numpy(array) for name, array in call.inputs.items()}
                output = call_denoiser(denoiser, inputs).double().numpy()
                wanted = call.output.astype(np.float64)
                signal += float(np.vdot(wanted, wanted))
                noise += float(np.square(wanted - output).sum())
        if not math.isfinite(noise) or signal == 0.0:
            return _WORST_DB
        if noise == 0.0:
            return BEST_DB
        return float(np.clip(10 * math.log10(signal / noise), _WORST_DB, BEST_DB))

    def ssim(self, denoiser: nn.Module) -> float:
        """Mean structural similarity of sampled images to the floating-point ones.

        Raises:
            ModelError: the images are too small to have one.
        """
        images = self.sample(denoiser)
        if not np.isfinite(images).all():
            return _WORST_SSIM
        value = structural_similarity(images, self.reference.images)
        if value is None:
            raise ModelError(
                f"images of {images.shape[3]} x {images.shape[2]} pixels have no structural similarity, by which "
                "bit_allocation judges the layers of `content`; set bit_allocation.content: []"
            )
        return value

    def mse(self, denoiser: nn.Module) -> float:
        """Mean squared difference of sampled pixels to the floating-point images; infinity when one is not finite."""
        images = self.sample(denoiser)
        if not np.isfinite(images).all():
            return math.inf
        return float(np.square(images.astype(np.float64) - self.reference.images).mean())

    def sample(self, denoiser: nn.Module) -> NDArray[np.float32]:
        """The images of the reference's request, made with ``denoiser``."""
        return sample(self.loaded, self.reference.request, denoiser=denoiser)


def open_model(loaded: LoadedModel) -> tuple[LoadedModel, ModelSource | None]:
    """The model in FP32, and where other processes find it (None for one that exists in memory only).

    Raises:
        ModelError: the model has no pipeline, or is in memory only and not FP32.
    """
    if loaded.pipeline is None:
        raise ModelError(
            f"{loaded.name} is a denoiser alone; sensitivities are measured on sampled images: give the folder of the "
            "whole pipeline"
        )
    if loaded.weights_dtype != "fp32":
        if loaded.folder is None:
            raise ModelError(f"{loaded.name} is in memory only, in {loaded.weights_dtype}; sensitivities need FP32")
        single = load_model(loaded.folder, variant=loaded.variant, torch_dtype="fp32")
        loaded = replace(single, defaults=loaded.defaults)
    if loaded.folder is None:
        return loaded, None
    sha256 = weights_sha256(loaded.denoiser)
    return loaded, ModelSource(folder=str(loaded.folder), variant=loaded.variant, sha256=sha256)


def bench_digest(loaded: LoadedModel, request: SampleRequest, calls: int) -> str:
    """Of everything that a measurement depends on beside what is quantized: weights of all parts, sampler, prompts."""
    parts = loaded.pipeline.components if loaded.pipeline is not None else {}
    modules = {name: weights_sha256(part) for name, part in sorted(parts.items()) if isinstance(part, nn.Module)}
    scheduler = dict(loaded.scheduler.config) if loaded.scheduler is not None else {}
    kind = type(loaded.scheduler).__name__
    versions = [__version__, torch.__version__]
    return digest_of(versions, modules, kind, scheduler, asdict(loaded.defaults), asdict(request), calls)


def record(loaded: LoadedModel, request: SampleRequest, calls: int, *, images: bool) -> Reference:
    """Runs the floating-point model.

    Args:
        loaded: in FP32.
        request: prompts, noise and sampler settings.
        calls: how many single-image calls to keep; 0 keeps none.
        images: whether images are needed.
    """
    with one_thread():
        kept: tuple[RecordedCall, ...] = ()
        if calls:
            chosen = _chosen(record_calls(loaded, request), request, calls)
            kept = tuple(map(partial(_with_output, loaded.denoiser), chosen))
        made = sample(loaded, request) if images else np.zeros((0, 0, 0, 0), np.float32)
    return Reference(request=request, images=made, calls=kept)


def _chosen(recorded: list[DenoiserCall], request: SampleRequest, calls: int) -> list[dict[str, torch.Tensor]]:
    """Single-image calls spread over the steps, other prompts at each; those of one step are one call of rows."""
    by_place: dict[tuple[int, int], DenoiserCall] = {}
    for call in recorded:
        by_place.setdefault((call.step, call.batch), call)
    steps, prompts = max(call.step for call in recorded) + 1, len(request.prompts)
    # about twice as many steps as prompts per step
    used = min(steps, max(1, round(math.sqrt(2 * calls))))
    per_step = min(prompts, math.ceil(calls / used))
    joined = []
    for index in range(used):
        step = round(index * (steps - 1) / max(used - 1, 1))
        numbers = [(index * per_step + offset) % prompts for offset in range(per_step)]
        numbers = numbers[: max(calls - index * per_step, 0)]
        rows = [_rows(by_place, step, number, request) for number in numbers]
        if rows:
            joined.append({name: _joined(name, [row[name] for row in rows]) for name in rows[0]})
    return joined


def _rows(
    by_place: Mapping[tuple[int, int], DenoiserCall], step: int, number: int, request: SampleRequest
) -> dict[str, torch.Tensor]:
    """The rows of one image in a recorded call: one, or one per guidance branch."""
    batch, place = divmod(number, request.batch_size)
    inputs = by_place[step, batch].inputs
    together = min(request.batch_size, len(request.prompts) - batch * request.batch_size)
    return {name: tensor if name in _SHARED else tensor[place::together] for name, tensor in inputs.items()}


def _joined(name: str, tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if name in _SHARED else torch.cat(tensors)


def _with_output(denoiser: nn.Module, inputs: dict[str, torch.Tensor]) -> RecordedCall:
    with torch.no_grad():
        output = call_denoiser(denoiser, inputs)
    arrays = {name: tensor.detach().cpu().numpy().copy() for name, tensor in inputs.items()}
    return RecordedCall(inputs=arrays, output=output.float().numpy().copy())
