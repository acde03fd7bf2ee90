"""A shapes model whose text has what SDXL's has: a first token many times larger than the others.

The text gets one more channel, which holds a large number in the first token and 0 elsewhere; keys and values give it
no weight. In floating point nothing changes, so that every image is the plain model's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from qdexport.models.load import load_model
from qdexport.quant.attach import shared_copy

if TYPE_CHECKING:
    from qdexport.models.loaded import LoadedModel

__all__ = ["SUFFIX", "load_any", "with_bos_outlier"]

SUFFIX = "+bos-outlier"
_SIZE = 823.5  # the largest value of SDXL's first token that MixDQ reports


def load_any(name: str) -> LoadedModel:
    """A model by name; ``NAME+bos-outlier`` has an outlier in the text's first token."""
    if name.endswith(SUFFIX):
        return with_bos_outlier(load_model(name.removesuffix(SUFFIX)))
    return load_model(name)


class _OutlierEncoder(nn.Module):
    """A text encoder with one more channel."""

    def __init__(self, encoder: Any, size: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = encoder.config
        self.size = size

    @property
    def dtype(self) -> torch.dtype:
        """As the encoder's."""
        dtype: torch.dtype = self.encoder.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """As the encoder's."""
        device: torch.device = self.encoder.device
        return device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        text: Tensor = self.encoder(*args, **kwargs)[0]
        extra = torch.zeros_like(text[..., :1])
        extra[:, 0] = self.size
        return BaseModelOutputWithPooling(last_hidden_state=torch.cat([text, extra], dim=-1))


def with_bos_outlier(loaded: LoadedModel, size: float = _SIZE) -> LoadedModel:
    """The same model behind a text encoder with an outlier; ``loaded`` is used up (its pipeline is changed).

    Args:
        loaded: a Stable Diffusion pipeline with one text encoder.
        size: of the outlier.
    """
    pipeline = loaded.pipeline
    if pipeline is None:
        raise ValueError(f"{loaded.name} has no text encoder")
    denoiser: Any = shared_copy(loaded.denoiser)
    for name, layer in denoiser.named_modules():
        if name.endswith((".attn2.to_k", ".attn2.to_v")) and isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(torch.cat([layer.weight.detach(), torch.zeros(layer.out_features, 1)], dim=1))
            layer.in_features += 1
    denoiser.register_to_config(cross_attention_dim=denoiser.config.cross_attention_dim + 1)
    pipeline.unet = denoiser
    pipeline.text_encoder = _OutlierEncoder(pipeline.text_encoder, size)
    return replace(loaded, name=f"{loaded.name}{SUFFIX}", denoiser=denoiser.eval())
