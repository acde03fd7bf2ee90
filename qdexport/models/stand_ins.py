"""Puts functions in the place of a pipeline's VAE decoder and text encoders, as long as it is sampled.

Only what they compute is replaced: configurations, types and devices stay those of the pipeline's own parts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from qdexport.core.companion_facts import CompanionFacts
from qdexport.errors import ModelError

__all__ = ["NamedFunction", "in_place_of_parts"]

NamedFunction = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@contextlib.contextmanager
def in_place_of_parts(pipeline: Any, functions: Mapping[str, tuple[CompanionFacts, NamedFunction]]) -> Iterator[None]:
    """Lets a diffusers pipeline call functions of named tensors instead of its own VAE decoder and text encoders.

    Args:
        pipeline: a pipeline that has the parts.
        functions: by name; each takes the inputs that its facts name, and gives the outputs.
    """
    with contextlib.ExitStack() as stack:
        for facts, function in functions.values():
            part = getattr(pipeline, facts.component)
            method, replacement = _replacement(facts, function, part)
            setattr(part, method, replacement)  # on the object: its class and other objects keep the method
            stack.callback(delattr, part, method)
        yield


def _replacement(facts: CompanionFacts, function: NamedFunction, part: Any) -> tuple[str, Callable[..., Any]]:
    if facts.network == "vae_decoder":
        return "decode", lambda z, **options: _decoded(function, z, **options)
    dtype = next(part.parameters()).dtype
    return "forward", lambda input_ids, **_: _Encoded(facts, function({"input_ids": input_ids}), dtype)


def _decoded(function: NamedFunction, z: Tensor, *, return_dict: bool = True, generator: Any = None) -> Any:
    del generator  # decoders of these classes draw nothing
    image = function({"latents": z})["image"].to(z.dtype)
    if not return_dict:
        return (image,)
    from diffusers.models.autoencoders.vae import DecoderOutput

    return DecoderOutput(sample=image)


class _Encoded:
    """What a text encoder's caller reads: the first output, and the hidden states that were compiled."""

    def __init__(self, facts: CompanionFacts, outputs: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        hidden, *pooled = (outputs[spec.name].to(dtype) for spec in facts.io.outputs)
        self.last_hidden_state = hidden
        self.hidden_states = _Layers(facts, hidden)
        self._first = pooled[0] if pooled else hidden

    def __getitem__(self, index: int) -> Tensor:
        if index != 0:
            raise ModelError(f"the compiled text encoder has no output {index}")
        return self._first


class _Layers:
    """The hidden states of all layers, of which one is there."""

    def __init__(self, facts: CompanionFacts, hidden: Tensor) -> None:
        self._facts, self._hidden = facts, hidden

    def __getitem__(self, layer: int) -> Tensor:
        if layer != self._facts.hidden_layer:
            raise ModelError(
                f"the compiled {self._facts.network} gives hidden states {self._facts.hidden_layer}, and the pipeline "
                f"reads {layer}: leave clip_skip out"
            )
        return self._hidden
