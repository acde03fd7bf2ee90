"""Metrics that need networks of others: FID, sFID, CLIP score, LPIPS.

Nothing is downloaded; what is missing is said.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.quality_scores import Moments, frechet, moments
from qdexport.errors import MissingDependencyError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qdexport.core.progress import ProgressSink

    Images = NDArray[np.float32]

__all__ = ["Networks", "ReferenceImages", "network_scores", "spatial_features"]

_BATCH: Final = 16
_INCEPTION_FILE: Final = "weights-inception-2015-12-05-6726825d.pth"
_INCEPTION_URL: Final = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/" + _INCEPTION_FILE
_ALEX_FILE: Final = "alexnet-owt-7be5be79.pth"
_ALEX_URL: Final = "https://download.pytorch.org/models/" + _ALEX_FILE
# sFID (Nash et al. 2021): the first 7 channels of mixed_6/conv of the 2015 Inception graph, 17 x 17 x 7 numbers
_SPATIAL_LAYER: Final = "Mixed_6d.branch1x1.conv"
_SPATIAL_CHANNELS: Final = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Networks:
    """Where weights lie.

    Attributes:
        inception: torch-fidelity's Inception weights; None for torch.hub's folder.
        clip: name of a CLIP model in the Hugging Face cache that torchmetrics knows.
        hub: torch.hub's folder of checkpoints.
    """

    inception: Path | None = None
    clip: str = "openai/clip-vit-base-patch16"
    hub: Path | None = None

    def file(self, name: str) -> Path:
        """A file in torch.hub's folder of checkpoints."""
        return (self.hub or Path(torch.hub.get_dir()) / "checkpoints") / name


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceImages:
    """What rows are compared with.

    Attributes:
        floating_point: images of FP, ``[N, 3, H, W]`` in [-1, 1].
        real: real images, or None.
        prompts: one per image of FP.
    """

    floating_point: Images
    real: Images | None
    prompts: tuple[str, ...]


def network_scores(
    rows: dict[str, dict[str, Any]],
    images: Mapping[str, Images],
    references: ReferenceImages,
    networks: Networks,
    progress: ProgressSink,
) -> dict[str, str]:
    """Adds to the scores of each row what can be computed here.

    Returns:
        For each metric that could not, what is missing and how to get it.
    """
    parts: Mapping[str, Callable[[], Callable[[str, Images], dict[str, float]]]] = {
        "FID, sFID": lambda: _fid(references, networks),
        "CLIP score": lambda: _clip(references, networks),
        "LPIPS": lambda: _lpips(references, networks),
    }
    missing = {}
    for title, make in parts.items():
        try:
            score = make()
        except MissingDependencyError as error:
            missing[title] = str(error)
            continue
        with progress.stage(title):
            for name, batch in images.items():
                rows[name]["scores"] |= {metric: {"value": value} for metric, value in score(name, batch).items()}
    if references.real is None:
        missing["FID, sFID to real images"] = "no real images: give a folder of them with --real"
    return missing


def spatial_features(extractor: nn.Module, run: Callable[[Tensor], Tensor], batches: list[Tensor]) -> tuple[Any, Any]:
    """Pool features ``[N, F]`` and spatial features ``[N, 7 h w]`` (sFID) of batches of images, float64.

    Args:
        extractor: an Inception network with the module ``Mixed_6d.branch1x1.conv``.
        run: calls it on a batch, and returns its pool features.
        batches: as ``run`` takes them.

    Raises:
        MissingDependencyError: the network has no such module.
    """
    maps: list[Tensor] = []
    try:
        layer = extractor.get_submodule(_SPATIAL_LAYER)
    except AttributeError as error:
        raise MissingDependencyError(f"the Inception network has no {_SPATIAL_LAYER}, which sFID reads") from error
    handle = layer.register_forward_hook(lambda _m, _i, out: maps.append(out[:, :_SPATIAL_CHANNELS].flatten(1)))
    try:
        with torch.no_grad():
            pooled = torch.cat([run(batch) for batch in batches])
    finally:
        handle.remove()
    return pooled.double().numpy(), torch.cat(maps).double().numpy()


def _fid(references: ReferenceImages, networks: Networks) -> Callable[[str, Images], dict[str, float]]:
    weights = networks.inception or networks.file(_INCEPTION_FILE)
    _need_package("torch_fidelity", "torch-fidelity")
    _need_file(weights, _INCEPTION_URL, "--inception FILE names another place")
    from torchmetrics.image.fid import FrechetInceptionDistance

    extractor = FrechetInceptionDistance(feature_extractor_weights_path=str(weights)).inception

    def both(images: Images) -> tuple[Moments, Moments]:
        pooled, spatial = spatial_features(extractor, extractor, list(torch.split(_bytes(images), _BATCH)))
        return moments(pooled), moments(spatial)

    against = {"fp": both(references.floating_point)}
    if references.real is not None:
        against["real"] = both(references.real)

    def score(name: str, images: Images) -> dict[str, float]:
        own, scores = both(images), dict[str, float]()
        for key, other in against.items():
            if key != "fp" or name != "FP":
                scores |= {f"fid_{key}": frechet(own[0], other[0]), f"sfid_{key}": frechet(own[1], other[1])}
        return scores

    return score


def _clip(references: ReferenceImages, networks: Networks) -> Callable[[str, Images], dict[str, float]]:
    from huggingface_hub import try_to_load_from_cache

    names = ("config.json", "preprocessor_config.json")
    found = [try_to_load_from_cache(networks.clip, name) for name in names]
    weights = [try_to_load_from_cache(networks.clip, name) for name in ("model.safetensors", "pytorch_model.bin")]
    if not all(isinstance(path, str) for path in found) or not any(isinstance(path, str) for path in weights):
        raise MissingDependencyError(
            f"the weights of {networks.clip} are not in the Hugging Face cache; get them with `hf download "
            f"{networks.clip}`, or name a model that is there with --clip"
        )
    from torchmetrics.multimodal.clip_score import CLIPScore

    metric = CLIPScore(model_name_or_path=networks.clip)

    def score(name: str, images: Images) -> dict[str, float]:
        metric.reset()
        for start in range(0, len(images), _BATCH):
            batch = _bytes(images[start : start + _BATCH])
            metric.update(list(batch), list(references.prompts[start : start + _BATCH]))
        return {"clip_score": float(metric.compute())}

    return score


def _lpips(references: ReferenceImages, networks: Networks) -> Callable[[str, Images], dict[str, float]]:
    _need_package("torchvision", "torchvision")
    _need_file(networks.file(_ALEX_FILE), _ALEX_URL, "torch.hub keeps it there")
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    metric = LearnedPerceptualImagePatchSimilarity(net_type="alex")

    def score(name: str, images: Images) -> dict[str, float]:
        if name == "FP":
            return {}
        metric.reset()
        for start in range(0, len(images), _BATCH):
            pair = (images[start : start + _BATCH], references.floating_point[start : start + _BATCH])
            metric.update(*(torch.from_numpy(part).clamp(-1, 1) for part in pair))
        return {"lpips": float(metric.compute())}

    return score


def _need_package(module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise MissingDependencyError(f"the package {package} is not installed: pip install {package}")


def _need_file(path: Path, url: str, where: str) -> None:
    if not path.is_file():
        raise MissingDependencyError(f"there is no {path}; get it from {url} ({where})")


def _bytes(images: Images) -> Tensor:
    """Images in [-1, 1] as uint8, which Inception and CLIP take."""
    return torch.from_numpy(np.rint((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8))
