"""What a model is told beside noise and timestep, where no part of its pipeline says it: class labels, and text of a
pipeline without text encoders. Drawn from seeds and prompts, so that runs repeat.
"""

from __future__ import annotations

import functools
import inspect
import logging
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qdexport.core.recipe import Shapes
from qdexport.errors import ModelError
from qdexport.models.denoiser_classes import DIT, FLUX, config_of, family_of
from qdexport.models.denoiser_io import io_spec
from qdexport.models.loaded import LoadedModel

__all__ = ["check_guidance", "check_prompts", "class_labels", "lacks_text_encoder", "text_arguments"]

logger = logging.getLogger(__name__)

_EMPTY = ""  # the prompt of the unguided half


def check_prompts(loaded: LoadedModel, prompts: Sequence[str]) -> None:
    """Refuses prompts of the user's for a model that reads no text. Raises ``ModelError``."""
    known = inspect.signature(type(loaded.pipeline).__call__).parameters
    if loaded.pipeline is not None and "prompt" not in known and any(prompts):
        kind = "classes" if "class_labels" in known else "noise alone"
        raise ModelError(
            f"{type(loaded.pipeline).__name__} makes pictures from {kind} and takes no prompts; leave them out "
            "(--prompt, calibration.prompts_file)"
        )


def check_guidance(loaded: LoadedModel, guidance_scale: float | None) -> None:
    """Refuses a guidance scale, other than the model's usual one, where it would change nothing; warns once where the
    model usually samples without.

    Raises:
        ModelError: the pipeline has no guidance, or FLUX was distilled to sample without.
    """
    if loaded.pipeline is None or guidance_scale in (None, loaded.defaults.guidance_scale, 0, 1):
        return
    name = type(loaded.pipeline).__name__
    unguided = "guidance_scale" not in inspect.signature(type(loaded.pipeline).__call__).parameters
    if unguided or (family_of(loaded.denoiser) == FLUX and not config_of(loaded.denoiser).get("guidance_embeds")):
        why = "has no guidance" if unguided else "is distilled to sample without guidance"
        raise ModelError(f"a guidance scale of {guidance_scale:g} would change nothing: {name} {why}; leave it out")
    if guidance_scale is not None and guidance_scale > 1 and loaded.defaults.guidance_scale == 1:
        _say_once(
            f"{loaded.name} samples in few steps without guidance; a guidance scale of {guidance_scale:g} doubles each "
            "call, and such models seldom make better pictures with it"
        )


@functools.cache
def _say_once(message: str) -> None:
    """A sampling is checked before it begins, and again by each denoiser."""
    logger.warning("%s", message)


def class_labels(denoiser: nn.Module, seeds: Sequence[int]) -> Tensor | None:
    """The class of every image, drawn from its seed; None for a denoiser without classes.

    Returns:
        INT64 ``[N]``; FP32 ``[N, D]`` where the denoiser reads vectors instead of numbers.
    """
    io = io_spec(denoiser, Shapes(height=_edge(denoiser), width=_edge(denoiser)), "fp32")
    spec = io.by_role("class_labels")
    if spec is None:
        return None
    sources = [torch.Generator().manual_seed(seed) for seed in seeds]
    if spec.dtype != "int64":
        return torch.stack([torch.randn(spec.shape()[1], generator=source) for source in sources])
    count = _class_count(denoiser)
    return torch.stack([torch.randint(count, (), generator=source) for source in sources])


def lacks_text_encoder(loaded: LoadedModel) -> bool:
    """Whether the denoiser reads text and the pipeline came without any text encoder."""
    parts = getattr(loaded.pipeline, "components", {})
    encoders = [part for name, part in parts.items() if name.startswith("text_encoder")]
    return bool(encoders) and all(part is None for part in encoders)


def text_arguments(
    loaded: LoadedModel, prompts: Sequence[str], known: Mapping[str, Any], *, guided: bool
) -> dict[str, Any]:
    """Embeddings for a pipeline without text encoders: normal numbers, the same for the same prompt.

    Args:
        loaded: the model with its pipeline.
        prompts: one per image.
        known: parameters of the pipeline's call.
        guided: whether the call has an unguided half.

    Returns:
        The pipeline's arguments, as far as it has them.
    """
    io = io_spec(loaded, Shapes(tokens=loaded.defaults.tokens), "fp32")
    text, pooled = io.by_role("text"), io.by_role("text_pooled")
    arguments: dict[str, Any] = {"prompt": None}
    if text is None:
        return arguments
    halves = {"": list(prompts)} | ({"negative_": [_EMPTY] * len(prompts)} if guided else {})
    dtype = next(loaded.denoiser.parameters()).dtype
    for prefix, texts in halves.items():
        drawn = {
            f"{prefix}prompt_embeds": torch.stack([_normal(item, text.shape()[1:]) for item in texts]).to(dtype),
            f"{prefix}prompt_attention_mask": torch.stack([_mask(item, text.shape()[1]) for item in texts]),
        }
        if pooled is not None:
            rows = [_normal(item, pooled.shape()[1:], "pooled") for item in texts]
            drawn[f"{prefix}pooled_prompt_embeds"] = torch.stack(rows).to(dtype)
        arguments |= {name: tensor for name, tensor in drawn.items() if name in known}
    if guided and "negative_prompt" in known:
        arguments["negative_prompt"] = None  # PixArt's default is an empty one, which its embedding replaces
    return arguments


def _source(prompt: str, kind: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{kind}:{prompt}".encode()))


def _normal(prompt: str, shape: tuple[int, ...], kind: str = "tokens") -> Tensor:
    return torch.randn(shape, generator=_source(prompt, kind))


def _mask(prompt: str, tokens: int) -> Tensor:
    """1 for the tokens of a text of some length, 0 for the padding behind."""
    length = int(torch.randint(1, tokens + 1, (), generator=_source(prompt, "length")))
    return (torch.arange(tokens) < length).to(torch.int64)


def _class_count(denoiser: nn.Module) -> int:
    config = config_of(denoiser)
    if family_of(denoiser) == DIT:
        return int(config["num_embeds_ada_norm"])
    count = config.get("num_class_embeds")
    return int(count) if count is not None else 1000  # labels that are embedded like timesteps


def _edge(denoiser: nn.Module) -> int:
    size = config_of(denoiser).get("sample_size")
    return int(size) if isinstance(size, int) else 64
