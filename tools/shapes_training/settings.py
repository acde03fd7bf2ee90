"""How long and how hard each stage trains: the values behind the shipped models, and tiny ones for a test."""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["BaseSettings", "DistilSettings", "FitSettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FitSettings:
    """One training loop: AdamW, linear warm-up, cosine decay to a twentieth, averaged weights.

    Attributes:
        steps: Optimizer steps.
        batch: Samples per step.
        learning_rate: Highest learning rate.
        seed: Chooses initial values, batches and noise.
        warmup: Steps of linear warm-up.
        ema_decay: Weight of the past in the averaged weights.
        weight_decay: AdamW's.
        beta2: AdamW's second decay.
        save_every: Steps between checkpoints.
    """

    steps: int
    batch: int
    learning_rate: float
    seed: int = 0
    warmup: int = 100
    ema_decay: float = 0.999
    weight_decay: float = 0.01
    beta2: float = 0.999
    save_every: int = 250


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseSettings:
    """Everything that decides the `shapes` model.

    Attributes:
        pictures: Size of the drawn training set.
        seed: Chooses the training set.
        evaluator: Loop of the attribute reader.
        vae: Loop of the autoencoder.
        denoiser: Loop of UNet and text encoder together.
        caption_dropout: Share of empty captions, for classifier-free guidance.
        layout_part: Last share of the denoiser's steps in which half of the timesteps come from the upper
            half, where the layout of a picture is settled; without it alignment stood still at 0.64, with it
            it rose to 0.99.
        kl_weight: Weight of the autoencoder's KL term against its L1 + L2 error.
    """

    pictures: int
    seed: int
    evaluator: FitSettings
    vae: FitSettings
    denoiser: FitSettings
    caption_dropout: float = 0.1
    layout_part: float = 0.25
    kl_weight: float = 1e-4

    @classmethod
    def full(cls, seed: int) -> BaseSettings:
        """About four hours on two CPU cores."""
        return cls(
            pictures=40_000,
            seed=seed,
            evaluator=FitSettings(steps=3_000, batch=128, learning_rate=2e-3, seed=seed),
            vae=FitSettings(steps=6_000, batch=32, learning_rate=1e-3, seed=seed),
            denoiser=FitSettings(steps=36_000, batch=48, learning_rate=1.2e-3, seed=seed, ema_decay=0.9995),
        )

    @classmethod
    def smoke(cls, seed: int) -> BaseSettings:
        """Every stage for a few steps; the result runs and paints noise."""
        tiny = FitSettings(steps=4, batch=4, learning_rate=1e-3, seed=seed, warmup=2, save_every=2)
        return cls(pictures=16, seed=seed, evaluator=tiny, vae=tiny, denoiser=tiny)


@dataclass(frozen=True, slots=True, kw_only=True)
class DistilSettings:
    """Everything that decides the `shapes-turbo` model.

    Attributes:
        guidance: Classifier-free guidance of the teacher on the paths that start at each of the student's
            sampling steps; their number is the number of steps the student is made for. Guidance chooses
            the layout; used again after every renewal of the noise it drives pictures away from real ones.
        grid: Timesteps of the teacher's DDIM solver, falling; holds every timestep of the student's schedule.
        trajectories: Teacher paths from pure noise.
        rollouts: Teacher paths that start where the student's own sampling leads.
        path_batch: Paths solved together and written as one file.
        first_fit: Loop on the paths from noise alone.
        second_fit: Loop on all paths.
        step_shares: Shares of the student's sampling steps among training points.
        other_share: Share of training points at solver timesteps outside the student's schedule, so that
            other numbers of steps work too.
        seed: Chooses captions and noise.
    """

    guidance: tuple[float, ...] = (4.0, 2.0, 1.0, 1.0)
    grid: tuple[int, ...] = (999, 919, 839, 759, 672, 585, 499, 419, 339, 259, 170, 85)
    trajectories: int
    rollouts: int
    path_batch: int
    first_fit: FitSettings
    second_fit: FitSettings
    step_shares: tuple[float, ...] = (0.35, 0.25, 0.2, 0.2)
    other_share: float = 0.15
    seed: int

    @classmethod
    def full(cls, seed: int) -> DistilSettings:
        """About an hour on two CPU cores."""
        fit = FitSettings(
            steps=600,
            batch=64,
            learning_rate=4e-4,
            seed=seed,
            warmup=50,
            ema_decay=0.995,
            weight_decay=0.0,
            beta2=0.99,
            save_every=50,
        )
        return cls(
            trajectories=8_192,
            rollouts=4_608,
            path_batch=128,
            first_fit=fit,
            second_fit=replace(fit, steps=700, seed=seed + 1),
            seed=seed,
        )

    @classmethod
    def smoke(cls, seed: int) -> DistilSettings:
        """Every stage for a few steps; the result runs and is no better than the teacher in four steps."""
        tiny = FitSettings(steps=4, batch=4, learning_rate=1e-5, seed=seed, warmup=2, save_every=2)
        return cls(trajectories=8, rollouts=8, path_batch=4, first_fit=tiny, second_fit=tiny, seed=seed)
