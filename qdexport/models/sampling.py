"""Runs a model's own diffusers pipeline: images, the denoiser's inputs at every step, timesteps, prompts.

The noise of image i, and its class where the pipeline passes none, come from `seed + i` alone, so images do not
depend on the batch size (up to the rounding of batched kernels). Prompts of a pipeline without text encoders stand for
random embeddings. Another denoiser (fake-quantized, ONNX Runtime, an engine) can stand in for
the pipeline's own; it needs the same call signature only. A pipeline is not thread-safe: one sampling at a
time.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qdexport.core.reading import reading
from qdexport.core.timesteps import equal_reach
from qdexport.errors import ModelError
from qdexport.models import shapes
from qdexport.models.conditions import check_guidance, class_labels, lacks_text_encoder, text_arguments
from qdexport.models.denoiser_classes import config_of
from qdexport.models.denoiser_io import named_inputs
from qdexport.models.extra_inputs import sequence_length
from qdexport.models.limits import check_memory
from qdexport.models.loaded import LoadedModel, SamplingDefaults
from qdexport.models.schedules import scheduler_timesteps

__all__ = [
    "DenoiserCall",
    "NamedDenoiser",
    "OnCall",
    "OnProgress",
    "SampleRequest",
    "SamplingDefaults",
    "call_count",
    "prompts_for",
    "record_calls",
    "sample",
    "schedule",
]

OnCall = Callable[[int, float, dict[str, Tensor]], None]
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """What to sample.

    Attributes:
        prompts: One per image; of an unconditional model only their number counts.
        seed: The noise of image i comes from `seed + i`, and so does its class.
        noise_seed: Of the noise alone: the same prompts and classes from other noise. None for `seed`.
        steps: Sampler steps; None for the model's usual number.
        guidance_scale: Classifier-free guidance; None for the model's usual scale.
        batch_size: Images sampled at once.
        height: Latent rows; None for the model's own.
        width: Latent columns; None for the model's own.
    """

    prompts: tuple[str, ...]
    seed: int = 0
    noise_seed: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    batch_size: int = 16
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(self.prompts))
        if not self.prompts or self.batch_size < 1:
            raise ModelError("nothing to sample: give one prompt at least, and a batch_size from 1 up")


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoiserCall:
    """One call of the denoiser.

    Attributes:
        step: 0 for the first (noisiest) timestep of a run; calls at the same timestep have the same step.
        timestep: The scheduler's timestep.
        inputs: Named as those of the exported network.
        batch: Which pipeline run the call belongs to.
    """

    step: int
    timestep: float
    inputs: dict[str, Tensor]
    batch: int


class NamedDenoiser(nn.Module):
    """Gives a function of named inputs (an ONNX session, an engine) the call signature of a diffusers UNet.

    Args:
        function: Takes the named inputs of the exported network, returns the prediction.
        like: The UNet whose signature and config it takes over.
    """

    def __init__(self, function: Callable[[dict[str, Tensor]], Tensor], like: nn.Module) -> None:
        super().__init__()
        self._function = function
        self._like = (like,)  # in a tuple, so that its weights are not listed as this module's

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The prediction, as the tuple or the output object that the caller asks for."""
        prediction = self._function(named_inputs(self._like[0], args, kwargs))
        if kwargs.get("return_dict", True):
            from diffusers.models.unets.unet_2d import UNet2DOutput

            return UNet2DOutput(sample=prediction)
        return (prediction,)


def schedule(loaded: LoadedModel, steps: int | None = None) -> list[int | float]:
    """The timesteps at which the denoiser is called, from the noisiest on, each named once.

    Args:
        loaded: A model with a scheduler.
        steps: Sampler steps; None for the model's usual number.

    Raises:
        ModelError: The model has no scheduler, or the scheduler refuses the number of steps.
    """
    timesteps = scheduler_timesteps(loaded, steps)
    reach = equal_reach(timesteps)
    before = [math.inf, *timesteps]
    return [step for last, step in zip(before, timesteps, strict=False) if abs(step - last) > reach]


def call_count(loaded: LoadedModel, request: SampleRequest) -> int:
    """How many denoiser calls a request takes, batches and second calls of higher-order samplers included."""
    batches = -(-len(request.prompts) // request.batch_size)
    return batches * len(scheduler_timesteps(loaded, request.steps))


def sample(
    loaded: LoadedModel,
    request: SampleRequest,
    *,
    denoiser: Any | None = None,
    on_call: OnCall | None = None,
    on_progress: OnProgress | None = None,
) -> NDArray[np.float32]:
    """Samples images through the model's own pipeline.

    Args:
        loaded: A whole pipeline.
        request: Prompts, seed and sampler settings.
        denoiser: Stands in for the pipeline's denoiser during this call; any module or callable object with
            the call signature of a diffusers UNet (`NamedDenoiser` makes one).
        on_call: Called before each denoiser call with the step (0 is the noisiest; counted by changes of
            the timestep in each pipeline run), the timestep and the named inputs.
        on_progress: Called after each denoiser call with the calls done and their total.

    Returns:
        Images in the order of the prompts, [N, C, H, W], in [-1, 1].

    Raises:
        ModelError: There is no pipeline, or it makes something else than images from prompts or noise.
    """

    def without_batch(batch: int, step: int, timestep: float, inputs: dict[str, Tensor]) -> None:
        if on_call is not None:
            on_call(step, timestep, inputs)

    before = None if on_call is None else without_batch
    return np.concatenate(list(_batches(loaded, request, denoiser, before, on_progress)))


def record_calls(
    loaded: LoadedModel,
    request: SampleRequest,
    *,
    denoiser: Any | None = None,
    on_progress: OnProgress | None = None,
) -> list[DenoiserCall]:
    """Samples and keeps the inputs of every denoiser call; the images are dropped.

    The latents are copied; what a run passes unchanged to every call (the text) is kept once per batch.
    """
    calls: list[DenoiserCall] = []

    def keep(batch: int, step: int, timestep: float, inputs: dict[str, Tensor]) -> None:
        inputs = {**inputs, "sample": inputs["sample"].clone()}
        calls.append(DenoiserCall(step=step, timestep=timestep, inputs=inputs, batch=batch))

    for _ in _batches(loaded, request, denoiser, keep, on_progress):
        pass
    return calls


def prompts_for(loaded: LoadedModel, count: int, seed: int) -> list[str]:
    """Prompts that suit a model: captions of the shapes grammar, everyday sentences, or empty strings.

    Args:
        loaded: The model.
        count: How many.
        seed: Equal seeds give equal prompts. Everyday sentences repeat only after all have been drawn.
    """
    if not _takes_prompts(loaded):
        return [""] * count
    if loaded.evaluator is not None:
        return shapes.captions(count, seed)
    text = (resources.files("qdexport.models") / "prompts.txt").read_text(encoding="utf-8")
    known = [line for line in text.splitlines() if line.strip()]
    source, prompts = random.Random(seed), list[str]()
    while len(prompts) < count:
        prompts += source.sample(known, len(known))
    return prompts[:count]


_OnBatchCall = Callable[[int, int, float, dict[str, Tensor]], None]


class _Tap(nn.Module):
    """Sits where the pipeline has its denoiser: counts steps, reports calls, passes them on.

    Whatever else a pipeline asks of its denoiser (config, dtype, widths) comes from the denoiser it had.
    """

    def __init__(
        self,
        own: nn.Module,
        target: Any,
        before: OnCall | None,
        after: Callable[[], None],
        labels: Tensor | None,
        reach: float,
    ) -> None:
        super().__init__()
        # not as submodules: to() or save_pretrained() must not reach them through the tap
        self.__dict__.update(_own=own, _target=target, _before=before, _after=after, _labels=labels, _reach=reach)
        self._step, self._timestep = -1, math.inf
        self.failed: Exception | None = None  # what the caller's functions raised

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_own"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._labels is not None:
            kwargs["class_labels"] = self._labels_for(args[0] if args else kwargs["sample"])
        if self._before is not None:
            inputs = named_inputs(self._own, args, kwargs)
            timestep = inputs["timestep"].item()
            if abs(timestep - self._timestep) > self._reach:
                self._step, self._timestep = self._step + 1, timestep
            with self._callers():
                self._before(self._step, timestep, inputs)
        with contextlib.nullcontext() if self._target is self._own else self._callers():
            output = self._target(*args, **kwargs)
        with self._callers():
            self._after()
        return output

    @contextlib.contextmanager
    def _callers(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.failed = error
            raise

    def _labels_for(self, sample: Tensor) -> Tensor:
        """The labels of the batch, once more for each half of a guided call."""
        labels: Tensor = self._labels
        labels = labels.to(sample.dtype) if labels.is_floating_point() else labels
        return labels.repeat(sample.shape[0] // labels.shape[0], *([1] * (labels.dim() - 1)))


def _batches(
    loaded: LoadedModel,
    request: SampleRequest,
    denoiser: Any | None,
    before: _OnBatchCall | None,
    on_progress: OnProgress | None,
) -> Iterator[NDArray[np.float32]]:
    pipeline, done = _pipeline(loaded), 0
    check_guidance(loaded, request.guidance_scale)
    total, reach = call_count(loaded, request), equal_reach(scheduler_timesteps(loaded, request.steps))

    def after() -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(done, total)

    _check_memory(loaded, request)
    own = getattr(pipeline, loaded.component)
    target = loaded.denoiser if denoiser is None else denoiser
    for batch, start in enumerate(range(0, len(request.prompts), request.batch_size)):
        labels = _missing_labels(loaded, request, start)
        tap = _Tap(own, target, None if before is None else partial(before, batch), after, labels, reach)
        with _in_place_of(pipeline, loaded.component, tap):
            arguments = _arguments(loaded, request, start)
            with _of_the_pipeline(loaded, tap):
                images = _to_array(pipeline(**arguments).images)
        yield images


def _check_memory(loaded: LoadedModel, request: SampleRequest) -> None:
    """Refuses a batch whose first activation alone, in and out, is more than the memory that is free."""
    height, width = request.height or loaded.defaults.height, request.width or loaded.defaults.width
    if height is None or width is None:
        return
    config = config_of(loaded.denoiser)
    widths = config.get("block_out_channels") or [config.get("in_channels") or 1]
    rows = min(request.batch_size, len(request.prompts)) * (2 if loaded.defaults.cfg else 1)
    check_memory(
        f"sampling {rows} latents of {height} x {width} at once",
        2 * 4 * rows * height * width * max(int(widths[0]), 1),
        "use a smaller batch_size, or smaller sizes (sample_size in the config, shapes in the recipe)",
    )


@contextlib.contextmanager
def _of_the_pipeline(loaded: LoadedModel, tap: _Tap) -> Iterator[None]:
    """Turns what a pipeline raises while it samples into one message: its components do not fit each other, or their
    settings are no numbers that it can work with. What the caller's functions raise passes through.
    """
    remedy = "check that its components belong together (model_index.json, sizes in config.json, the scheduler)"
    name = f"{type(loaded.pipeline).__name__} of {loaded.folder or loaded.name}"
    try:
        with reading(name, ModelError, remedy, what="cannot be sampled"):
            yield
    except ModelError as error:
        if tap.failed is not None and tap.failed is error.__cause__:
            raise tap.failed from None
        raise


@contextlib.contextmanager
def _in_place_of(pipeline: Any, component: str, stand_in: nn.Module) -> Iterator[None]:
    own = getattr(pipeline, component)
    setattr(pipeline, component, stand_in)
    try:
        yield
    finally:
        setattr(pipeline, component, own)


def _arguments(loaded: LoadedModel, request: SampleRequest, start: int) -> dict[str, Any]:
    """The pipeline's keyword arguments for the images from `start` on, as far as its signature has them."""
    prompts = list(request.prompts[start : start + request.batch_size])
    known = _parameters(loaded)
    seeds, noise = (
        range(first + start, first + start + len(prompts))
        for first in (request.seed, request.seed if request.noise_seed is None else request.noise_seed)
    )
    arguments: dict[str, Any] = {
        "num_inference_steps": request.steps or loaded.defaults.steps,
        "generator": [torch.Generator().manual_seed(seed) for seed in noise],
        "output_type": "pt",
    }
    scale = loaded.defaults.guidance_scale if request.guidance_scale is None else request.guidance_scale
    if "prompt" not in known:
        _refuse_other_size(loaded, request)
        labels = class_labels(loaded.denoiser, seeds) if "class_labels" in known else None
        if labels is None:
            return {**arguments, "batch_size": len(prompts)}
        return {**arguments, "class_labels": labels.tolist(), "guidance_scale": scale}
    height, width = _pixel_size(loaded, request)
    arguments |= {"guidance_scale": scale, "height": height, "width": width}
    arguments |= {name: False for name in ("use_resolution_binning", "clean_caption") if name in known}  # PixArt's
    if loaded.defaults.tokens is not None and "max_sequence_length" in known:
        length = sequence_length(loaded.denoiser, loaded.pipeline, loaded.defaults.tokens)
        arguments["max_sequence_length"] = length
    if lacks_text_encoder(loaded):
        guided = scale > 1 and loaded.defaults.cfg
        return arguments | text_arguments(loaded, prompts, known, guided=guided)
    return {**arguments, "prompt": prompts}


def _missing_labels(loaded: LoadedModel, request: SampleRequest, start: int) -> Tensor | None:
    """The classes of the images from `start` on, for a pipeline that passes none to a denoiser that reads them."""
    if "class_labels" in _parameters(loaded):
        return None
    count = min(request.batch_size, len(request.prompts) - start)
    return class_labels(loaded.denoiser, range(request.seed + start, request.seed + start + count))


def _refuse_other_size(loaded: LoadedModel, request: SampleRequest) -> None:
    own = (loaded.defaults.height, loaded.defaults.width)
    if request.height not in (None, own[0]) or request.width not in (None, own[1]):
        raise ModelError(
            f"{type(loaded.pipeline).__name__} makes images of its own size only ({own[0]} x {own[1]}); "
            "leave height and width out"
        )


def _pixel_size(loaded: LoadedModel, request: SampleRequest) -> tuple[int, int]:
    height, width = request.height or loaded.defaults.height, request.width or loaded.defaults.width
    if height is None or width is None:
        raise ModelError(
            f"the config of {loaded.name} has no sample_size; give height and width of the latent"
        )
    scale = int(getattr(loaded.pipeline, "vae_scale_factor", 1))
    if height * scale % 8 or width * scale % 8:
        raise ModelError(
            f"a latent of {height} x {width} makes images of {height * scale} x {width * scale} pixels; "
            "diffusers' pipelines need multiples of 8"
        )
    return height * scale, width * scale


def _pipeline(loaded: LoadedModel) -> Any:
    if loaded.pipeline is None:
        raise ModelError(
            f"{loaded.name} is a denoiser alone, and sampling needs its pipeline; give the folder with "
            "model_index.json"
        )
    name, known = type(loaded.pipeline).__name__, _parameters(loaded)
    images = [key for key in known if key in ("image", "mask_image", "control_image")]
    if images:
        raise ModelError(
            f"{name} starts from a picture ({images[0]}); qdexport samples from prompts or noise only"
        )
    if not {"prompt", "batch_size", "class_labels"} & set(known):
        raise ModelError(f"{name} takes no prompts, no class labels and no batch_size; qdexport cannot sample it")
    return loaded.pipeline


def _parameters(loaded: LoadedModel) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(type(loaded.pipeline).__call__).parameters


def _takes_prompts(loaded: LoadedModel) -> bool:
    return "encoder_hidden_states" in inspect.signature(type(loaded.denoiser).forward).parameters


def _to_array(images: Any) -> NDArray[np.float32]:
    """Pictures in [0, 1], a tensor [N, C, H, W] or an array [N, H, W, C], as float32 in [-1, 1]."""
    if isinstance(images, Tensor):
        array = images.detach().cpu().float().numpy()
    else:
        array = np.moveaxis(np.asarray(images, dtype=np.float32), -1, 1)
    return np.ascontiguousarray(array * 2 - 1, dtype=np.float32)
