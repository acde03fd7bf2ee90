"""Two small models beside the bundled ones, for what those are not: classes instead of text, and v-prediction."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from qdexport.core.files import atomic_dir, write_json
from qdexport.models.shapes import COLOURS, SHAPES, bundled_model_path, captions, parse_caption, real_images
from qdexport.models.shapes_evaluator import to_network_range
from shapes_training.base import draw_training_set, encode
from shapes_training.fitting import fit
from shapes_training.networks import build_class_unet, build_scheduler, write_pipeline
from shapes_training.settings import FitSettings
from shapes_training.trajectories import CaptionTable

if TYPE_CHECKING:
    from pathlib import Path

    from qdexport.core.progress import ProgressSink

__all__ = ["CLASS_PICTURE_SIZE", "ClassLoss", "SmallSettings", "VelocityLoss", "train_classes", "train_velocity"]

CLASS_PICTURE_SIZE: Final = 16
_TIMESTEPS: Final = 1000
_SPARE_CAPTIONS: Final = 4  # a third of all captions is about one thing


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallSettings:
    """How one of the small models is trained.

    Attributes:
        pictures: Size of the drawn training set.
        fit: The loop.
        caption_dropout: Share of empty captions, for classifier-free guidance.
    """

    pictures: int
    fit: FitSettings
    caption_dropout: float = 0.1

    @classmethod
    def classes(cls, seed: int) -> SmallSettings:
        """About four minutes of one core."""
        fit = FitSettings(steps=1_000, batch=32, learning_rate=2e-3, seed=seed, ema_decay=0.995)
        return cls(pictures=4_000, fit=fit)

    @classmethod
    def velocity(cls, seed: int) -> SmallSettings:
        """About five minutes of one core."""
        fit = FitSettings(steps=700, batch=32, learning_rate=6e-4, seed=seed, warmup=50, ema_decay=0.99)
        return cls(pictures=4_000, fit=fit)

    @classmethod
    def smoke(cls, seed: int) -> SmallSettings:
        """A few steps; the result runs and paints noise."""
        tiny = FitSettings(steps=4, batch=4, learning_rate=1e-4, seed=seed, warmup=2, save_every=2)
        return cls(pictures=16, fit=tiny)


class ClassLoss:
    """Mean square error of epsilon for pictures and their classes.

    Args:
        pictures: In [-1, 1], [N, 3, H, W].
        labels: INT64 [N].
        batch: Pictures per step.
    """

    def __init__(self, pictures: Tensor, labels: Tensor, batch: int) -> None:
        self._pictures, self._labels, self._batch = pictures, labels, batch
        self._signal, self._noise = _levels()

    def __call__(self, module: nn.Module, step: int, source: torch.Generator) -> Tensor:
        """The loss of one batch."""
        del step
        rows = torch.randint(len(self._pictures), (self._batch,), generator=source)
        time, noise = _draw(self._batch, self._pictures, source)
        noisy = self._signal[time] * self._pictures[rows] + self._noise[time] * noise
        return F.mse_loss(module(noisy, time, self._labels[rows]).sample, noise)


class VelocityLoss:
    """Mean square error of v against a teacher that predicts epsilon.

    With ``x = a x0 + s e``, ``a^2 + s^2 = 1`` (Salimans and Ho 2022): ``v = a e - s x0 = (e - s x) / a``.

    Args:
        teacher: Predicts epsilon.
        latents: Clean, of unit variance, [N, 4, 8, 8].
        table: Text embeddings.
        captions: INT64 [N], rows of the table.
        settings: Batch and dropout.
    """

    def __init__(
        self, teacher: nn.Module, latents: Tensor, table: CaptionTable, captions: Tensor, settings: SmallSettings
    ) -> None:
        self._teacher, self._latents, self._table, self._captions = teacher, latents, table, captions
        self._batch, self._dropout = settings.fit.batch, settings.caption_dropout
        self._signal, self._noise = _levels()

    def __call__(self, module: nn.Module, step: int, source: torch.Generator) -> Tensor:
        """The loss of one batch."""
        del step
        rows = torch.randint(len(self._latents), (self._batch,), generator=source)
        time, noise = _draw(self._batch, self._latents, source)
        signal, share = self._signal[time], self._noise[time]
        noisy = signal * self._latents[rows] + share * noise
        dropped = torch.rand(self._batch, 1, 1, generator=source) < self._dropout
        text = torch.where(dropped, self._table.empty, self._table.embeddings[self._captions[rows]])
        with torch.no_grad():
            velocity = (self._teacher(noisy, time, text).sample - share * noisy) / signal
        return F.mse_loss(module(noisy, time, text).sample, velocity)


def train_classes(folder: Path, work: Path, settings: SmallSettings, progress: ProgressSink) -> None:
    """Trains a class-conditional `UNet2DModel` on pictures of one thing and writes a `DDIMPipeline`.

    Class `4 * colour + shape`, in the order of `COLOURS` and `SHAPES`; backgrounds are any.

    Args:
        folder: Replaced when everything else is done.
        work: Checkpoint; an interrupted run goes on from here.
        settings: Sizes and seed.
        progress: Shows bars.

    Raises:
        ModelError: The loss became infinite, or the checkpoint is damaged or of other settings.
    """
    from diffusers import DDIMPipeline

    torch.manual_seed(settings.fit.seed)  # initial weights
    with progress.stage("drawing"):
        pictures, labels = _single_things(settings)
    loss = ClassLoss(pictures, labels, settings.fit.batch)
    unet = fit(build_class_unet(CLASS_PICTURE_SIZE), loss, settings.fit, work / "classes.safetensors", progress)
    scheduler = build_scheduler(clip_sample=True)
    with atomic_dir(folder) as partial:
        DDIMPipeline(unet=unet, scheduler=scheduler).save_pretrained(partial)
        _forget_origin(partial / "unet" / "config.json")


def train_velocity(folder: Path, work: Path, settings: SmallSettings, progress: ProgressSink) -> None:
    """Turns the bundled `shapes` into a model of the same networks that predicts v; arguments and errors as above."""
    from diffusers import StableDiffusionPipeline

    source = bundled_model_path("shapes")
    teacher: Any = StableDiffusionPipeline.from_pretrained(source, safety_checker=None)
    for part in (teacher.unet, teacher.vae, teacher.text_encoder):
        part.requires_grad_(False)
    data = draw_training_set(settings.pictures, settings.fit.seed, progress)
    latents = encode(teacher.vae, data, progress) * teacher.vae.config.scaling_factor
    with progress.stage("reading captions"):
        table = CaptionTable(teacher.tokenizer, teacher.text_encoder)
    student = type(teacher.unet).from_pretrained(source, subfolder="unet")
    loss = VelocityLoss(teacher.unet, latents, table, table.numbers(data.texts), settings)
    unet = fit(student, loss, settings.fit, work / "velocity.safetensors", progress)
    parts = {
        "unet": unet,
        "text_encoder": teacher.text_encoder,
        "vae": teacher.vae,
        "tokenizer": teacher.tokenizer,
        "scheduler": build_scheduler(prediction_type="v_prediction"),
    }
    with atomic_dir(folder) as partial:
        write_pipeline(partial, parts)
        shutil.copytree(source / "evaluator", partial / "evaluator")


def _single_things(settings: SmallSettings) -> tuple[Tensor, Tensor]:
    """Pictures of one thing, ``[N, 3, 16, 16]`` in [-1, 1], and their classes."""
    drawn = captions(_SPARE_CAPTIONS * settings.pictures, settings.fit.seed)
    texts = [text for text in drawn if parse_caption(text).second is None][: settings.pictures]
    edge = CLASS_PICTURE_SIZE
    large = real_images(texts, settings.fit.seed)
    small = [np.asarray(Image.fromarray(item).resize((edge, edge), Image.Resampling.BOX)) for item in large]
    things = [parse_caption(text).first for text in texts]
    numbers = [len(SHAPES) * list(COLOURS).index(thing.colour) + SHAPES.index(thing.shape) for thing in things]
    return to_network_range(np.stack(small)), torch.tensor(numbers)


def _levels() -> tuple[Tensor, Tensor]:
    """Shares of signal and noise at every timestep, ``[1000, 1, 1, 1]`` each."""
    kept = build_scheduler().alphas_cumprod.reshape(-1, 1, 1, 1)
    return kept.sqrt(), (1.0 - kept).sqrt()


def _draw(batch: int, like: Tensor, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Timesteps, INT64 ``[batch]``, and noise of the shape of a batch."""
    time = torch.randint(_TIMESTEPS, (batch,), generator=source)
    return time, torch.randn(batch, *like.shape[1:], generator=source)


def _forget_origin(path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    write_json(path, config)
