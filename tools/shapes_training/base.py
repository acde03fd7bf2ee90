"""Trains the shapes model from random weights: evaluator, autoencoder, UNet with text encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from qdexport.core.files import atomic_dir
from qdexport.errors import ModelError
from qdexport.models.shapes import captions, real_images
from qdexport.models.shapes_evaluator import ShapesEvaluator, label_tensor, to_network_range
from shapes_training.fitting import fit
from shapes_training.networks import (
    PROMPT_TOKENS,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
    write_pipeline,
)

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from qdexport.core.progress import ProgressSink
    from shapes_training.settings import BaseSettings, FitSettings

__all__ = [
    "Denoiser",
    "DenoiserLoss",
    "EvaluatorLoss",
    "VaeLoss",
    "draw_training_set",
    "encode",
    "train_base",
]

_DRAW_BATCH = 1000
_ENCODE_BATCH = 256
_TIMESTEPS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSet:
    """Drawn pictures and their captions.

    Attributes:
        texts: N captions.
        pictures: uint8 [N, 32, 32, 3].
    """

    texts: list[str]
    pictures: NDArray[np.uint8]

    def batch(self, size: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random rows, int64 [size], and their pictures as the networks see them."""
        rows = torch.randint(len(self.texts), (size,), generator=source)
        return rows, to_network_range(self.pictures[rows.numpy()])


def draw_training_set(count: int, seed: int, progress: ProgressSink) -> TrainingSet:
    """Draws `count` pictures of random captions."""
    texts = captions(count, seed)
    parts = []
    with progress.track(count, "drawing") as advance:
        for first in range(0, count, _DRAW_BATCH):
            part = texts[first : first + _DRAW_BATCH]
            parts.append(real_images(part, seed + first))
            advance(len(part))
    return TrainingSet(texts=texts, pictures=np.concatenate(parts))


class EvaluatorLoss:
    """Cross-entropy of the heads that count, summed over the heads."""

    def __init__(self, data: TrainingSet, settings: FitSettings) -> None:
        self._data, self._batch = data, settings.batch
        self._labels = label_tensor(data.texts)

    def __call__(self, module: nn.Module, step: int, source: torch.Generator) -> Tensor:
        """The loss of one batch."""
        del step
        rows, pictures = self._data.batch(self._batch, source)
        # a sum over rows, divided by all of them: a batch without a pair is 0 for the last heads, not NaN
        losses = [
            F.cross_entropy(logits, wanted, ignore_index=-1, reduction="sum")
            for logits, wanted in zip(module(pictures), self._labels[rows].T, strict=True)
        ]
        return torch.stack(losses).sum() / self._batch


class VaeLoss:
    """L1 + L2 error of the reconstruction, plus a small pull of the latents towards a normal distribution."""

    def __init__(self, data: TrainingSet, settings: FitSettings, kl_weight: float) -> None:
        self._data, self._batch, self._kl_weight = data, settings.batch, kl_weight

    def __call__(self, module: nn.Module, step: int, source: torch.Generator) -> Tensor:
        """The loss of one batch."""
        del step
        pictures = self._data.batch(self._batch, source)[1]
        vae: Any = module  # a diffusers AutoencoderKL, which has no types
        posterior = vae.encode(pictures).latent_dist
        error: Tensor = vae.decode(posterior.sample(generator=source)).sample - pictures
        # kl() sums over a picture's latents
        kl: Tensor = posterior.kl().mean() / posterior.mean[0].numel()
        return error.abs().mean() + error.square().mean() + self._kl_weight * kl


class Denoiser(nn.Module):
    """UNet and text encoder, trained as one."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = build_unet()
        self.text_encoder = build_text_encoder()

    def forward(self, latents: Tensor, time: Tensor, ids: Tensor) -> Tensor:
        """Epsilon of noisy latents [N, 4, 8, 8] at timesteps [N] for token ids [N, 16]."""
        epsilon: Tensor = self.unet(latents, time, self.text_encoder(ids)[0]).sample
        return epsilon


class DenoiserLoss:
    """Mean square error of epsilon (Ho et al. 2020, eq. 14), with captions dropped now and then.

    Args:
        latents: Clean latents of unit variance, [N, 4, 8, 8].
        ids: Tokens of the captions, [N, 16].
        empty: Tokens of the empty caption, [16].
        settings: Batch, dropout, and when the layout's timesteps come more often.
    """

    def __init__(self, latents: Tensor, ids: Tensor, empty: Tensor, settings: BaseSettings) -> None:
        self._latents, self._ids, self._empty, self._settings = latents, ids, empty, settings
        levels = build_scheduler().alphas_cumprod
        self._signal, self._noise = levels.sqrt(), (1.0 - levels).sqrt()

    def __call__(self, module: nn.Module, step: int, source: torch.Generator) -> Tensor:
        """The loss of one batch."""
        size = self._settings.denoiser.batch
        rows = torch.randint(len(self._latents), (size,), generator=source)
        time = self.timesteps(step, source)
        noise = torch.randn(size, *self._latents.shape[1:], generator=source)
        signal_share, noise_share = (level[time].reshape(-1, 1, 1, 1) for level in (self._signal, self._noise))
        dropped = torch.rand(size, 1, generator=source) < self._settings.caption_dropout
        ids = torch.where(dropped, self._empty, self._ids[rows])
        epsilon = module(signal_share * self._latents[rows] + noise_share * noise, time, ids)
        return F.mse_loss(epsilon, noise)

    def timesteps(self, step: int, source: torch.Generator) -> Tensor:
        """Timesteps of one batch: uniform, and in the layout part half of them from the upper half only."""
        size, steps = self._settings.denoiser.batch, self._settings.denoiser.steps
        time = torch.randint(_TIMESTEPS, (size,), generator=source)
        upper = torch.randint(_TIMESTEPS // 2, _TIMESTEPS, (size,), generator=source)
        if step < steps * (1.0 - self._settings.layout_part):
            return time
        return torch.where(torch.rand(size, generator=source) < 0.5, upper, time)


def train_base(folder: Path, work: Path, settings: BaseSettings, progress: ProgressSink) -> None:
    """Trains all networks and writes the diffusers folder with its evaluator.

    Args:
        folder: Replaced when everything else is done.
        work: Checkpoints; an interrupted run goes on from here.
        settings: Sizes and seeds.
        progress: Shows bars.

    Raises:
        ModelError: A loss became infinite, or a checkpoint is damaged or of other settings.
    """
    torch.manual_seed(settings.seed)  # initial weights
    evaluator, vae, denoiser = ShapesEvaluator(), build_vae(), Denoiser()
    data = draw_training_set(settings.pictures, settings.seed, progress)

    loss = EvaluatorLoss(data, settings.evaluator)
    evaluator = fit(evaluator, loss, settings.evaluator, work / "evaluator.safetensors", progress)
    vae_loss = VaeLoss(data, settings.vae, settings.kl_weight)
    vae = fit(vae, vae_loss, settings.vae, work / "vae.safetensors", progress)

    latents = encode(vae, data, progress)
    scale = 1.0 / float(latents.std())
    if not np.isfinite(scale):
        raise ModelError("the autoencoder maps every picture to the same latents; train it longer")
    vae.register_to_config(scaling_factor=scale)
    tokenizer = build_tokenizer()
    ids = tokenizer([*data.texts, ""], padding="max_length", max_length=PROMPT_TOKENS, return_tensors="pt").input_ids
    denoiser_loss = DenoiserLoss(latents * scale, ids[:-1], ids[-1], settings)
    denoiser = fit(denoiser, denoiser_loss, settings.denoiser, work / "denoiser.safetensors", progress)

    with atomic_dir(folder) as partial:
        (partial / "evaluator").mkdir()
        save_file(evaluator.state_dict(), partial / "evaluator" / "model.safetensors")
        parts = {"unet": denoiser.unet, "text_encoder": denoiser.text_encoder, "vae": vae}
        write_pipeline(partial, parts | {"tokenizer": tokenizer, "scheduler": build_scheduler()})


@torch.no_grad()
def encode(vae: Any, data: TrainingSet, progress: ProgressSink) -> Tensor:
    """Means of the latents of the whole training set, [N, 4, 8, 8]."""
    parts = []
    with progress.track(len(data.texts), "encoding") as advance:
        for first in range(0, len(data.texts), _ENCODE_BATCH):
            pictures = to_network_range(data.pictures[first : first + _ENCODE_BATCH])
            parts.append(vae.encode(pictures).latent_dist.mean)
            advance(len(pictures))
    return torch.cat(parts)
