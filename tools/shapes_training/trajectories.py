"""Where a guided teacher's deterministic sampling leads, from noise or from a student's own sampling."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qdexport.core.files import atomic_path
from qdexport.errors import ModelError
from qdexport.models.shapes import all_captions, captions
from shapes_training.networks import LATENT_SIZE, PROMPT_TOKENS

if TYPE_CHECKING:
    from diffusers import LCMScheduler
    from transformers import CLIPTextModel, CLIPTokenizer

    from qdexport.core.progress import ProgressSink
    from shapes_training.settings import DistilSettings

__all__ = ["CaptionTable", "Consistency", "PathCollector", "Paths", "Source", "Teacher", "join_paths"]


class CaptionTable:
    """Text embeddings of every caption of the grammar, computed once.

    Attributes:
        embeddings: float32 [5200, 16, width].
        empty: float32 [16, width]: the empty caption.
    """

    @torch.no_grad()
    def __init__(self, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> None:
        texts = [*all_captions(), ""]
        self._numbers = {text: number for number, text in enumerate(texts)}
        ids = tokenizer(texts, padding="max_length", max_length=PROMPT_TOKENS, return_tensors="pt").input_ids
        rows = torch.cat([text_encoder(part)[0] for part in torch.split(ids, 256)])
        self.embeddings, self.empty = rows[:-1], rows[-1]

    def numbers(self, texts: list[str]) -> Tensor:
        """Rows of captions, int64 [N]."""
        return torch.tensor([self._numbers[text] for text in texts])


class Teacher:
    """A latent diffusion UNet with classifier-free guidance and the DDIM solver on a fixed grid.

    Args:
        unet: Predicts epsilon.
        table: Text embeddings.
        alphas_cumprod: [1000].
        grid: Timesteps of the solver, falling.
    """

    def __init__(self, unet: nn.Module, table: CaptionTable, alphas_cumprod: Tensor, grid: tuple[int, ...]) -> None:
        self._unet, self._table, self._grid = unet, table, grid
        self._signal, self._noise = alphas_cumprod.sqrt(), (1.0 - alphas_cumprod).sqrt()

    @torch.no_grad()
    def finish(self, latents: Tensor, caption: Tensor, start: int, guidance: float) -> tuple[Tensor, Tensor]:
        """Solves the probability-flow equation from one timestep of the grid to the clean latents.

        DDIM (Song et al. 2020, eq. 12 with sigma = 0): x0 = (x - s_t e) / a_t, x' = a_t' x0 + s_t' e with
        e = e_empty + g (e_caption - e_empty).

        Args:
            latents: [N, 4, 8, 8] at `grid[start]`.
            caption: int64 [N], rows of the caption table.
            start: Index into the grid.
            guidance: g; 1 is the plain model.

        Returns:
            The latents at every timestep of the grid, [N, grid, 4, 8, 8], zero before `start`; the end
            [N, 4, 8, 8].
        """
        points = latents.new_zeros(len(latents), len(self._grid), *latents.shape[1:])
        clean = latents
        for index in range(start, len(self._grid)):
            time = self._grid[index]
            points[:, index] = latents
            epsilon = self._epsilon(latents, time, self._table.embeddings[caption], guidance)
            clean = (latents - self._noise[time] * epsilon) / self._signal[time]
            if index + 1 < len(self._grid):
                following = self._grid[index + 1]
                latents = self._signal[following] * clean + self._noise[following] * epsilon
        return points, clean

    def _epsilon(self, latents: Tensor, time: int, text: Tensor, guidance: float) -> Tensor:
        if guidance == 1.0:
            plain: Tensor = self._unet(latents, time, text).sample
            return plain
        empty = self._table.empty.expand(len(text), -1, -1)
        both = self._unet(torch.cat([latents, latents]), time, torch.cat([empty, text])).sample
        without, wanted = both.chunk(2)
        return torch.lerp(without, wanted, guidance)


class Consistency:
    """The consistency function of a UNet, exactly as diffusers' LCMScheduler evaluates it.

    f(x, t) = c_skip(t) x + c_out(t) x0 with x0 = (x - s_t e) / a_t (Luo et al. 2023, eq. 9).

    Args:
        scheduler: Gives noise levels, timesteps and boundary scalings.
        steps: Sampling steps.
    """

    def __init__(self, scheduler: LCMScheduler, steps: int) -> None:
        scheduler.set_timesteps(steps)
        self.timesteps: list[int] = scheduler.timesteps.tolist()
        self._signal, self._noise = scheduler.alphas_cumprod.sqrt(), (1.0 - scheduler.alphas_cumprod).sqrt()
        every = torch.arange(scheduler.config.num_train_timesteps)
        self._skip, self._out = scheduler.get_scalings_for_boundary_condition_discrete(every)

    def clean(self, unet: nn.Module, latents: Tensor, time: Tensor, text: Tensor) -> Tensor:
        """The student's estimate of the clean latents.

        Args:
            unet: Predicts epsilon; gets no guidance.
            latents: [N, 4, 8, 8].
            time: int64 [N].
            text: [N, 16, width].
        """
        signal, noise, skip, out = (
            row[time].reshape(-1, 1, 1, 1) for row in (self._signal, self._noise, self._skip, self._out)
        )
        epsilon = unet(latents, time, text).sample
        result: Tensor = skip * latents + out * (latents - noise * epsilon) / signal
        return result

    @torch.no_grad()
    def roll_out(self, unet: nn.Module, text: Tensor, steps: int, source: torch.Generator) -> Tensor:
        """Samples `steps` steps from pure noise and adds the noise of the next timestep, [N, 4, 8, 8]."""
        latents = torch.randn(len(text), 4, LATENT_SIZE, LATENT_SIZE, generator=source)
        for index in range(steps):
            time = torch.full((len(text),), self.timesteps[index])
            clean = self.clean(unet, latents, time, text)
            following = self.timesteps[index + 1]
            fresh = torch.randn(latents.shape, generator=source)
            latents = self._signal[following] * clean + self._noise[following] * fresh
        return latents


class Paths(NamedTuple):
    """Teacher paths: where they were at each timestep of the grid, and where they ended.

    Attributes:
        points: float32 [N, grid, 4, 8, 8].
        step: int64 [N]: the student's sampling step at whose timestep the path starts.
        caption: int64 [N].
        end: float32 [N, 4, 8, 8].
    """

    points: Tensor
    step: Tensor
    caption: Tensor
    end: Tensor


class Source(NamedTuple):
    """Where a set of paths starts.

    Attributes:
        name: Names the folder of the set.
        step: Index of the student's sampling step, 0 for pure noise.
        size: Number of paths.
        student: Whose sampling leads to the start; None for pure noise.
    """

    name: str
    step: int
    size: int
    student: nn.Module | None


class PathCollector:
    """Solves paths in batches; each batch is a file, so an interrupted collection goes on where it stopped.

    Args:
        teacher: Solves them.
        table: Captions to draw from.
        consistency: The student's sampling.
        settings: Batch size, grid, seed.
        folder: One sub-folder per set.
    """

    def __init__(
        self,
        teacher: Teacher,
        table: CaptionTable,
        consistency: Consistency,
        settings: DistilSettings,
        folder: Path,
    ) -> None:
        self._teacher, self._table, self._consistency = teacher, table, consistency
        self._settings, self._folder = settings, folder

    def collect(self, source: Source, progress: ProgressSink) -> Paths:
        """All paths of a set, from disk as far as they are there.

        Raises:
            ModelError: A file of the set is damaged.
        """
        batches = -(-source.size // self._settings.path_batch)
        parts = []
        with progress.track(batches, f"teacher paths, {source.name}") as advance:
            for batch in range(batches):
                path = self._folder / source.name / f"{batch:05d}.safetensors"
                if not path.exists():
                    with atomic_path(path) as partial:
                        save_file(self._solve(source, batch)._asdict(), partial)
                parts.append(_read_paths(path))
                advance(1)
        return join_paths(parts)

    def _solve(self, source: Source, batch: int) -> Paths:
        count = self._settings.path_batch
        seed = (self._settings.seed * 16 + source.step) * 1_000_003 + batch
        caption = self._table.numbers(captions(count, seed))
        noise = torch.Generator().manual_seed(seed)
        if source.student is None:
            latents = torch.randn(count, 4, LATENT_SIZE, LATENT_SIZE, generator=noise)
        else:
            text = self._table.embeddings[caption]
            latents = self._consistency.roll_out(source.student, text, source.step, noise)
        first = self._settings.grid.index(self._consistency.timesteps[source.step])
        points, end = self._teacher.finish(latents, caption, first, self._settings.guidance[source.step])
        step = torch.full((count,), source.step)
        return Paths(points=points, step=step, caption=caption, end=end)


def _read_paths(path: Path) -> Paths:
    try:
        return Paths(**load_file(path))
    except (SafetensorError, TypeError) as error:
        raise ModelError(f"{path} is damaged ({error}); delete it, and it is solved again") from error


def join_paths(parts: list[Paths]) -> Paths:
    """One set of several."""
    return Paths(*(torch.cat(field) for field in zip(*parts, strict=True)))
