"""Samples with whatever denoisers an output folder, or a plain model, has to offer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from qdexport.check.companions import OnnxCompanion
from qdexport.check.onnx_denoiser import OnnxDenoiser
from qdexport.core.files import atomic_path
from qdexport.core.paths import below
from qdexport.core.results import Manifest
from qdexport.emit.facts import read_companion_facts, read_network_facts
from qdexport.errors import ModelError
from qdexport.models.conditions import check_guidance, check_prompts
from qdexport.models.load import load_model
from qdexport.models.sampling import sample, schedule
from qdexport.models.scheduler_choice import with_scheduler
from qdexport.models.stand_ins import in_place_of_parts
from qdexport.pipeline.lineage import check_checkpoint, check_made
from qdexport.quant.checkpoint import load_quantized
from qdexport.report.pictures import image_grid, to_uint8

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from qdexport.core.companion_facts import CompanionFacts
    from qdexport.core.network_facts import NetworkFacts
    from qdexport.models.loaded import LoadedModel
    from qdexport.models.sampling import SampleRequest

__all__ = ["Denoisers", "image_names", "open_denoisers", "save_image", "save_images"]

_GRID = "grid.png"


@dataclass(frozen=True, slots=True, kw_only=True)
class Denoisers:
    """What can be sampled with.

    Attributes:
        loaded: the floating-point model with its pipeline.
        by_kind: denoisers that stand in for the pipeline's own; ``fp`` is None, its own.
        steps: sampler steps that the recipe was calibrated with; None for the model's own.
        facts: what the compiled network says about itself.
        companions: the other compiled networks, with what they say about themselves; ``onnx`` samples with them, too.
    """

    loaded: LoadedModel
    by_kind: Mapping[str, Any]
    steps: int | None
    facts: NetworkFacts | None = None
    companions: Mapping[str, tuple[CompanionFacts, OnnxCompanion]] = field(default_factory=dict)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the denoisers."""
        return tuple(self.by_kind)

    def check(self, request: SampleRequest) -> None:
        """Refuses what one of the denoisers cannot sample, before any of them begins.

        Raises:
            ModelError: the scheduler cannot take so many steps, or has timesteps that the network's tables lack.
        """
        check_prompts(self.loaded, request.prompts)
        check_guidance(self.loaded, request.guidance_scale)
        timesteps = schedule(self.loaded, request.steps)
        if "onnx" in self.by_kind and self.facts is not None:
            self.facts.check_timesteps(timesteps)

    def sample(self, kind: str, request: SampleRequest) -> np.ndarray:
        """Images ``[N, 3, H, W]`` in [-1, 1]. Raises as :meth:`check`."""
        self.check(request)
        if kind == "onnx" and self.companions:
            with in_place_of_parts(self.loaded.pipeline, self.companions):
                return sample(self.loaded, request, denoiser=self.by_kind[kind])
        return sample(self.loaded, request, denoiser=self.by_kind[kind])


def open_denoisers(source: str, kinds: tuple[str, ...], scheduler: str | None = None) -> Denoisers:
    """Opens a model, or an output folder of ``qdexport compile``.

    Args:
        source: a name or folder.
        kinds: names of denoisers; none: those that are there.
        scheduler: instead of the model's own (:func:`qdexport.models.scheduler_choice.with_scheduler`).

    Raises:
        ModelError: a denoiser was asked for that is not there, or its ONNX file is of another checkpoint.
        DamagedError: a file is not what the folder's manifest says.
    """
    folder = Path(source)
    if not (folder / "manifest.json").is_file():
        others = [kind for kind in kinds if kind != "fp"]
        if others:
            raise ModelError(
                f"{source} is no output folder of qdexport, so it has no {others[0]} denoiser; compile it first"
            )
        return Denoisers(loaded=_with(scheduler, load_model(source)), by_kind={"fp": None}, steps=None)
    manifest = Manifest.load(folder / "manifest.json")
    wanted = kinds or ("quantized", "onnx")
    if "onnx" in wanted:
        _check_onnx(folder, manifest)
    check_checkpoint(folder, manifest)
    quantized = load_quantized(folder / "checkpoint")
    available: dict[str, Any] = {"fp": None, "quantized": quantized.denoiser}
    facts, companions = None, {}
    if "onnx" in wanted:
        path = _onnx(folder, manifest)
        facts = read_network_facts(path)
        available["onnx"] = OnnxDenoiser(path, facts.io, quantized.loaded.denoiser)
        companions = _open_companions(folder, manifest)
    return Denoisers(
        loaded=_with(scheduler, quantized.loaded),
        by_kind={kind: available[kind] for kind in wanted},
        steps=quantized.recipe.calibration.steps,
        facts=facts,
        companions=companions,
    )


def _with(scheduler: str | None, loaded: LoadedModel) -> LoadedModel:
    return loaded if scheduler is None else with_scheduler(loaded, scheduler)


def _check_onnx(folder: Path, manifest: Manifest) -> None:
    """Makes sure that the ONNX files are there, whole, and those of the checkpoint."""
    try:
        check_made(folder, manifest, "build")
        networks = {item.stage for item in manifest.artifacts if item.kind == "companion_onnx"}
        for stage in sorted(networks):
            check_made(folder, manifest, stage.replace("export:", "build:"))
    except ModelError as error:
        raise ModelError(f"{error}, or sample the checkpoint alone: --with quantized") from error


def _onnx(folder: Path, manifest: Manifest) -> Path:
    file = manifest.artifact("onnx")
    if file is None:
        raise ModelError(f"{folder} holds no ONNX file; run `qdexport export {folder}`")
    return below(folder, file.path, folder / "manifest.json")


def _open_companions(folder: Path, manifest: Manifest) -> dict[str, tuple[CompanionFacts, OnnxCompanion]]:
    found = {}
    for item in manifest.artifacts:
        if item.kind == "companion_onnx" and item.path.endswith(".onnx"):
            path = below(folder, item.path, folder / "manifest.json")
            facts = read_companion_facts(path)
            found[str(facts.network)] = (facts, OnnxCompanion(path, facts))
    return found


def image_names(kinds: Sequence[str], count: int) -> list[str]:
    """What :func:`save_images` writes for so many images of each kind, relative to its folder."""
    return [*(f"{kind}/{index:03d}.png" for kind in kinds for index in range(count)), _GRID]


def save_image(path: Path, image: np.ndarray) -> None:
    """Writes one image ``[3, H, W]`` in [-1, 1] as PNG."""
    with atomic_path(path) as partial:
        Image.fromarray(to_uint8(image)).save(partial, format="PNG")


def save_images(folder: Path, images: Mapping[str, np.ndarray], prompts: list[str]) -> list[Path]:
    """Writes ``kind/NNN.png`` for every image, and ``grid.png`` with all kinds side by side, which comes last."""
    paths = []
    for kind, batch in images.items():
        for index, image in enumerate(batch):
            path = folder / kind / f"{index:03d}.png"
            save_image(path, image)
            paths.append(path)
    grid = folder / _GRID
    image_grid({kind: list(batch) for kind, batch in images.items()}, prompts, grid)
    return [*paths, grid]
