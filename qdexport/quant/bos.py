"""The first token of the text: its embedding, and the layers whose quantizers it bypasses (MixDQ).

A causal text encoder gives the first token (BOS) the same embedding for every prompt, because it sees nothing but
itself; its values can be a hundred times those of the others. Keys and values computed from it are constants.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qdexport.core.digests import digest_of
from qdexport.core.recipe import Recipe
from qdexport.errors import ModelError, RecipeError
from qdexport.models.denoiser import Trace
from qdexport.models.loaded import LoadedModel
from qdexport.models.sampling import NamedDenoiser, SampleRequest, prompts_for, sample

__all__ = ["Bos", "bos_layers", "decided_bos", "encoder_digest", "find_bos"]

logger = logging.getLogger(__name__)

_PROMPTS = 4
_SEED = 11
# the same token in batches of other prompts: FP32 sums in another order differ by some 1e-6, FP16 ones by 1e-3
_SAME = 1e-2
_LEAVES = ("to_k", "to_v")
_SETTINGS = ("num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bos:
    """The first token of a model's text.

    Attributes:
        embedding: as the denoiser reads it, FP32 ``[D]``.
        encoder: a digest of text encoders, their settings and which of their layers is read; empty when the
            embedding was given.
    """

    embedding: Tensor
    encoder: str = ""


def bos_layers(denoiser: nn.Module, trace: Trace) -> frozenset[str]:
    """Keys and values of every cross-attention that reads the text as it is.

    Raises:
        RecipeError: there are none.
    """
    found = frozenset(
        name
        for name, layer in trace.items()
        if layer.input_name == "encoder_hidden_states" and name.rpartition(".")[2] in _LEAVES
    )
    if not found:
        raise RecipeError(
            f"`bos: constant` needs cross-attention that reads the text as it is, and {type(denoiser).__name__} has "
            "none; set `bos: off`"
        )
    return found


def decided_bos(loaded: LoadedModel, recipe: Recipe, trace: Trace) -> Recipe:
    """The recipe with ``constant`` or ``off`` in the place of ``bos: auto``: constant where cross-attention reads the
    text as it is, and the pipeline's text encoder gives every prompt the same first token.
    """
    if recipe.bos != "auto":
        return recipe
    try:
        bos_layers(loaded.denoiser, trace)
        find_bos(loaded)
    except (ModelError, RecipeError) as reason:
        logger.info("bos: auto is off: %s", reason)
        return recipe.model_copy(update={"bos": "off"})
    return recipe.model_copy(update={"bos": "constant"})


def encoder_digest(loaded: LoadedModel) -> str:
    """A SHA-256 over all text encoders (weights and settings) and what the pipeline says about their use."""
    pipeline = loaded.pipeline
    if pipeline is None:
        return ""
    parts: list[Any] = [type(pipeline).__name__, str(getattr(pipeline.config, "force_zeros_for_empty_prompt", ""))]
    for name, component in sorted(pipeline.components.items()):
        if name.startswith("text_encoder") and component is not None:
            # the layer that is read follows from the class, the pipeline and these settings
            settings = {key: getattr(component.config, key, None) for key in _SETTINGS}
            parts += [name, type(component).__name__, repr(settings), _weights(component)]
    return digest_of(*parts)


def _weights(component: nn.Module) -> str:
    """A SHA-256 of the weights rounded to FP16, so that it is the same whatever type they were loaded in."""
    digest = hashlib.sha256()
    for name, tensor in component.named_parameters():
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().half().contiguous().numpy().tobytes())
    return digest.hexdigest()


def find_bos(loaded: LoadedModel) -> Bos:
    """Encodes some prompts and takes the embedding of their first token.

    Raises:
        ModelError: there is no text encoder, or its first token depends on the prompt.
    """
    if loaded.pipeline is None:
        raise ModelError(
            f"{loaded.name} came without a text encoder, whose first token `bos: constant` needs; give the whole "
            "pipeline's folder, or set `bos: off`"
        )
    first = _text(loaded)[:, 0].float()
    rows = first[first.abs().amax(dim=1) > 0]  # a zeroed negative prompt has no first token
    if len(rows) < 2:
        raise ModelError(f"the text of {loaded.name} is zero for every prompt; set `bos: off`")
    distance = float((rows - rows[0]).norm(dim=1).max() / rows[0].norm())
    if distance > _SAME:
        raise ModelError(
            f"the text encoder of {loaded.name} has no causal first token: its embedding differs by {distance:.1%} "
            "between prompts, so that it is no constant; set `bos: off`"
        )
    return Bos(embedding=rows[-1].clone(), encoder=encoder_digest(loaded))


class _Enough(Exception):  # noqa: N818  no error: it ends a sampling run early
    """The text has been seen."""


def _text(loaded: LoadedModel) -> Tensor:
    """``encoder_hidden_states`` of the first denoiser call for some prompts, ``[N, T, D]``."""
    seen: list[Tensor] = []

    def stop(inputs: dict[str, Tensor]) -> Tensor:
        seen.append(inputs["encoder_hidden_states"])
        raise _Enough

    prompts = tuple(dict.fromkeys(prompts_for(loaded, _PROMPTS, _SEED)))
    try:
        request = SampleRequest(prompts=prompts, seed=_SEED, batch_size=_PROMPTS)
        sample(loaded, request, denoiser=NamedDenoiser(stop, loaded.denoiser))
    except _Enough:
        pass
    except KeyError as error:
        raise ModelError(f"the denoiser of {loaded.name} reads no text; set `bos: off`") from error
    return seen[0].detach().cpu().clone() if seen else torch.zeros(0, 1, 1)
