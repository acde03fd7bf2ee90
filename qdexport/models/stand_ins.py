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
    masked = any(spec.role == "text_mask" for spec in facts.io.inputs)

    def encode(input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> _Encoded:
        inputs = {"input_ids": input_ids}
        if masked:
            inputs["attention_mask"] = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return _Encoded(facts, function(inputs), dtype)

    return "forward", encode


def _decoded(function: NamedFunction, z: Tensor, *, return_dict: bool = True, generator: Any = None) -> Any:
    del generator  # decoders of these classes draw nothing
    image = function({"latents": z})["image"].to(z.dtype)
    if not return_dict:
        return (image,)
    from diffusers.models.autoencoders.vae import DecoderOutput

    return DecoderOutput(sample=image)


class _Encoded:
    """What the caller of a text encoder reads: output 0, and the hidden states and pooled text that were compiled."""

    def __init__(self, facts: CompanionFacts, outputs: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        values = [outputs[spec.name].to(dtype) for spec in facts.io.outputs]
        self._network = facts.network
        self._values: dict[str, Any] = {} if facts.pooled is None else {facts.pooled: values[-1]}
        if facts.hidden_layer is not None:
            self._values["hidden_states"] = _Layers(facts, values[0])
        if facts.hidden_layer == -1:
            self._values["last_hidden_state"] = values[0]
        # [0] of a model with a projection is the projected pooled text; of another SDXL only counts the axes
        self._first = None if facts.pooled == "pooler_output" else values[-1]

    def __getattr__(self, name: str) -> Any:
        values = self.__dict__.get("_values", {})
        if name not in values:
            raise ModelError(f"the compiled {self.__dict__.get('_network')} has no {name}, only {', '.join(values)}")
        return values[name]

    def __getitem__(self, index: int) -> Tensor:
        if index != 0 or self._first is None:
            raise ModelError(f"the compiled {self._network} has no output {index}")
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
