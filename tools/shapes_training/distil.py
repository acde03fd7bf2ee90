"""Makes the four-step model: consistency distillation on whole teacher paths.

A latent consistency model (Luo et al. 2023) learns f(x_t, t, caption), the end of the guided teacher's
path through x_t. The usual loss bootstraps that end from the student's own average one solver step
further, because solving every path is dear. On 8x8 latents it is cheap: here each path is solved to its
end once, and f is fitted to it directly. The target has neither the noise nor the bias of a moving
average, so a few thousand small batches are enough.

Two rounds: first on paths from pure noise; then also on paths that start where the first student's own
sampling leads (its estimate with renewed noise), which is what it meets in use and the teacher's paths
never show it.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qdexport.core.files import atomic_dir
from qdexport.errors import ModelError
from shapes_training.fitting import fit
from shapes_training.networks import build_turbo_scheduler, write_pipeline
from shapes_training.trajectories import (
    CaptionTable,
    Consistency,
    PathCollector,
    Paths,
    Source,
    Teacher,
    join_paths,
)

if TYPE_CHECKING:
    from qdexport.core.progress import ProgressSink
    from shapes_training.settings import DistilSettings

__all__ = ["PathLoss", "distil"]


# keeps the gradient of the root finite where an estimate is perfect; latents have unit variance
_ROOT_FLOOR = 1e-4


class PathLoss:
    """Distance between the student's estimate and the end of the path, at random points of random paths.

    Per sample the root of the mean square: errors at high noise are ten times those at low noise, and a plain
    square would train only the first sampling step.

    Args:
        paths: Where points come from.
        whole: Use a path from its start to its end; else only up to the student's next timestep, where the
            guidance changes and other paths begin.
        table: Text embeddings.
        consistency: The student's parameterisation and timesteps.
        settings: Grid, and the shares of its timesteps.

    Raises:
        ModelError: A timestep of the grid has no path.
    """

    def __init__(
        self,
        paths: Paths,
        *,
        whole: bool,
        table: CaptionTable,
        consistency: Consistency,
        settings: DistilSettings,
    ) -> None:
        self._paths, self._table, self._consistency = paths, table, consistency
        self._batch = (settings.first_fit if whole else settings.second_fit).batch
        self._grid = torch.tensor(settings.grid)
        step_of = [sum(t >= time for t in consistency.timesteps) - 1 for time in settings.grid]
        rows = [paths.step <= step if whole else paths.step == step for step in step_of]
        usable = [torch.nonzero(row)[:, 0] for row in rows]
        if not all(len(row) for row in usable):
            raise ModelError("no path crosses some timesteps of the grid; collect paths for every sampling step")
        self._rows = torch.cat(usable)
        self._counts = torch.tensor([len(row) for row in usable])
        self._offsets = self._counts.cumsum(0) - self._counts
        self._shares = _column_shares(settings, consistency.timesteps)

    def __call__(self, module: nn.Module, step: int, source: torch.Generator) -> Tensor:
        """The loss of one batch."""
        del step
        column = torch.multinomial(self._shares, self._batch, replacement=True, generator=source)
        place = (torch.rand(self._batch, generator=source) * self._counts[column]).long()
        path = self._rows[self._offsets[column] + place]
        text = self._table.embeddings[self._paths.caption[path]]
        clean = self._consistency.clean(module, self._paths.points[path, column], self._grid[column], text)
        squares = (clean - self._paths.end[path]).square().mean(dim=(1, 2, 3))
        return (squares + _ROOT_FLOOR).sqrt().mean()


def _column_shares(settings: DistilSettings, timesteps: list[int]) -> Tensor:
    others = len(settings.grid) - len(timesteps)
    shares = torch.full((len(settings.grid),), settings.other_share / max(others, 1))
    for time, share in zip(timesteps, settings.step_shares, strict=True):
        shares[settings.grid.index(time)] = share * (1.0 - settings.other_share)
    return shares


def distil(teacher_folder: Path, folder: Path, work: Path, settings: DistilSettings, progress: ProgressSink) -> None:
    """Distils a shapes model and writes the student as a complete diffusers folder.

    Args:
        teacher_folder: A folder of `tools/train_shapes.py base`, or the bundled `shapes`.
        folder: The student's folder; replaced when everything else is done.
        work: Paths and checkpoints; an interrupted run goes on from here.
        settings: Sizes, guidance, seed.
        progress: Shows bars.

    Raises:
        ModelError: The teacher cannot be read, or files in the work folder are damaged or of other settings.
    """
    from diffusers import StableDiffusionPipeline

    try:
        pipeline = StableDiffusionPipeline.from_pretrained(teacher_folder, safety_checker=None)
    except OSError as error:
        raise ModelError(f"{teacher_folder} is not a shapes model: {error}") from error
    unet = pipeline.unet.requires_grad_(False).eval()
    table = CaptionTable(pipeline.tokenizer, pipeline.text_encoder)
    scheduler = build_turbo_scheduler()
    consistency = Consistency(scheduler, len(settings.guidance))
    teacher = Teacher(unet, table, scheduler.alphas_cumprod, settings.grid)
    collector = PathCollector(teacher, table, consistency, settings, work / "paths")

    student = copy.deepcopy(unet).requires_grad_(True)
    sets = [collector.collect(Source("from-noise", 0, settings.trajectories, None), progress)]
    loss = PathLoss(sets[0], whole=True, table=table, consistency=consistency, settings=settings)
    first = fit(student, loss, settings.first_fit, work / "first-fit.safetensors", progress)

    later = len(settings.guidance) - 1
    for step in range(1, len(settings.guidance)):
        source = Source(f"from-step-{step}", step, settings.rollouts // later, first)
        sets.append(collector.collect(source, progress))
    student.load_state_dict(first.state_dict())
    loss = PathLoss(join_paths(sets), whole=False, table=table, consistency=consistency, settings=settings)
    final = fit(student, loss, settings.second_fit, work / "second-fit.safetensors", progress)

    with atomic_dir(folder) as partial:
        shutil.copytree(teacher_folder / "evaluator", partial / "evaluator")
        parts = {name: getattr(pipeline, name) for name in ("vae", "text_encoder", "tokenizer")}
        write_pipeline(partial, parts | {"unet": final, "scheduler": build_turbo_scheduler()})
