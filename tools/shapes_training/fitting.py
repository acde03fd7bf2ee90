"""One training loop for every stage: AdamW, averaged weights, resumable from a file without code."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qdexport.core.files import atomic_path
from qdexport.errors import ModelError

if TYPE_CHECKING:
    from qdexport.core.progress import ProgressSink
    from shapes_training.settings import FitSettings

__all__ = ["LossFunction", "fit"]

LossFunction = Callable[[nn.Module, int, torch.Generator], Tensor]
"""(module in training, step from 0, random source of this step) -> scalar loss."""

_Module = TypeVar("_Module", bound=nn.Module)
_GRADIENT_NORM = 1.0
_FINAL_SHARE = 0.05


def fit(
    module: _Module, loss: LossFunction, settings: FitSettings, checkpoint: Path, progress: ProgressSink
) -> _Module:
    """Trains a module and returns the exponential average of its weights.

    The random source of each step is seeded with (seed, step), so a run that was interrupted and resumed
    draws what an uninterrupted one draws.

    Args:
        module: Trained in place.
        loss: Called once per step.
        settings: Steps, learning rate, seed.
        checkpoint: State of the loop; written every `save_every` steps and at the end, read if it exists.
        progress: Shown as one bar, named after the checkpoint.

    Returns:
        A copy of the module with averaged weights, in eval mode without gradients.

    Raises:
        ModelError: The loss is not finite, or the checkpoint belongs to other settings or another module.
    """
    state = _LoopState(module, settings, checkpoint)
    start = state.load()
    module.train()
    with progress.track(settings.steps - start, f"training {checkpoint.stem}") as advance:
        for step in range(start, settings.steps):
            source = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
            value = loss(module, step, source)
            if not bool(torch.isfinite(value)):
                raise ModelError(
                    f"the loss of {checkpoint.stem} is {value.item()} at step {step}; lower its learning "
                    f"rate ({settings.learning_rate}) and start again from an empty work folder"
                )
            state.update(value, step)
            if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
                state.save(step + 1)
            advance(1)
    return state.average


class _LoopState(Generic[_Module]):
    """Module, averaged copy and optimizer, and their one file."""

    def __init__(self, module: _Module, settings: FitSettings, path: Path) -> None:
        self.module = module
        self.average = copy.deepcopy(module).requires_grad_(False).eval()
        self._settings = settings
        self._path = path
        self._optimizer = torch.optim.AdamW(
            module.parameters(),
            lr=settings.learning_rate,
            betas=(0.9, settings.beta2),
            weight_decay=settings.weight_decay,
        )

    def update(self, loss: Tensor, step: int) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.learning_rate * _rate_share(step, self._settings)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.module.parameters(), _GRADIENT_NORM)
        self._optimizer.step()
        # the first weights are random or another model's: early on the average has to follow quickly
        keep = min(self._settings.ema_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, value in zip(self.average.parameters(), self.module.parameters(), strict=True):
                mean.lerp_(value, 1.0 - keep)

    def save(self, step: int) -> None:
        tensors = {f"module.{name}": value for name, value in self.module.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        for index, moments in self._optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": value for name, value in moments.items()}
        with atomic_path(self._path) as partial:
            save_file(
                {name: value.detach().contiguous().clone() for name, value in tensors.items()},
                partial,
                metadata={"step": str(step), "settings": _settings_key(self._settings)},
            )

    def load(self) -> int:
        """Restores the file, if there is one; returns the number of finished steps."""
        if not self._path.exists():
            return 0
        try:
            with safe_open(self._path, "pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except SafetensorError as error:
            raise ModelError(f"{self._path} is damaged ({error}); delete it to train this stage again") from error
        if metadata.get("settings") != _settings_key(self._settings):
            raise ModelError(
                f"{self._path} was written with other settings ({metadata.get('settings')}); "
                "use an empty work folder or the same options"
            )
        self._restore(tensors)
        return int(metadata["step"])

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        try:
            self.module.load_state_dict(_under("module.", tensors))
            self.average.load_state_dict(_under("average.", tensors))
        except RuntimeError as error:
            raise ModelError(f"{self._path} belongs to another network: {error}") from error
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in _under("adam.", tensors).items():
            index, name = key.split(".", 1)
            moments.setdefault(int(index), {})[name] = value
        blank = self._optimizer.state_dict()
        self._optimizer.load_state_dict({"state": moments, "param_groups": blank["param_groups"]})


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _settings_key(settings: FitSettings) -> str:
    return json.dumps(dataclasses.asdict(settings), sort_keys=True)


def _rate_share(step: int, settings: FitSettings) -> float:
    """Learning rate as a share of the highest: a linear rise times a cosine down to a twentieth."""
    rise = min(1.0, (step + 1) / settings.warmup)
    cosine = 0.5 * (1.0 + math.cos(math.pi * (step + 1) / settings.steps))
    return rise * (cosine * (1.0 - _FINAL_SHARE) + _FINAL_SHARE)
