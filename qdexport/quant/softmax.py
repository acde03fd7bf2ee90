"""Quantizers behind the softmax of attention: log2 or uniform, chosen per layer and row (TCAQ-DM's DAQ)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from qdexport.core.recipe import SoftmaxQuant
from qdexport.core.spec import QuantSpec
from qdexport.errors import ModelError, RecipeError
from qdexport.quant.modules import StepContext, selected_row
from qdexport.quant.ops import NO_AXIS, fake_quantize
from qdexport.quant.search import Histogram

__all__ = [
    "ExplicitAttention",
    "SoftmaxParameters",
    "SoftmaxQuantizer",
    "attention_names",
    "install_softmax",
    "likelihood_ratio",
    "softmax_parameters",
    "watched_softmax",
]

# probabilities below take no part in the test: softmax has huge mass near 0, and a code of 4 bits ends here
SMALLEST_PROBABILITY = 2.0**-15


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftmaxParameters:
    """The quantizer behind one softmax.

    Attributes:
        bits: width; codes are 0 to ``2^bits - 1``.
        scale: FP32 ``[R]``: the step of a uniform row, the largest value of a logarithmic one.
        mode: FP32 ``[R]``: 0 uniform, 1 log2.
    """

    bits: int
    scale: Tensor
    mode: Tensor


class SoftmaxQuantizer(nn.Module):
    """Fake quantization of attention probabilities ``[N, heads, T, S]``; one row, or one per step."""

    scale: Tensor
    zero_point: Tensor
    mode: Tensor

    def __init__(self, parameters: SoftmaxParameters, context: StepContext) -> None:
        super().__init__()
        self.spec = QuantSpec(bits=parameters.bits, signed=False)
        self.context = context
        self.register_buffer("scale", parameters.scale.float(), persistent=False)
        self.register_buffer("zero_point", torch.zeros_like(self.scale), persistent=False)
        self.register_buffer("mode", parameters.mode.float(), persistent=False)

    def forward(self, probabilities: Tensor) -> Tensor:
        row = selected_row(self.context, self.scale.shape[0])
        y: Tensor = fake_quantize(
            probabilities, self.scale, self.zero_point, row, self.spec.qmin, self.spec.qmax, NO_AXIS, self.mode
        )
        return y


class ExplicitAttention:
    """An attention processor of diffusers that shows its probabilities to ``quantize`` before it uses them."""

    def __init__(self, quantize: Callable[[Tensor], Tensor] | None = None) -> None:
        self._quantize = quantize

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        residual, shape = hidden_states, hidden_states.shape
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            text = attn.norm_encoder_hidden_states(text)
        query, key, value = (
            layer(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, x in ((attn.to_q, hidden_states), (attn.to_k, text), (attn.to_v, text))
        )
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        probabilities = _probabilities(attn, query, key, attention_mask)
        quantize = attn.softmax_quantizer if self._quantize is None else self._quantize
        attended = torch.matmul(quantize(probabilities), value).transpose(1, 2).flatten(2)
        output: Tensor = attn.to_out[1](attn.to_out[0](attended))
        if len(shape) == 4:
            output = output.transpose(-1, -2).reshape(shape)
        output = output + residual if attn.residual_connection else output
        factor = float(attn.rescale_output_factor)
        return output if factor == 1.0 else output / factor


def _probabilities(attn: Any, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    dtype = query.dtype
    if attn.upcast_attention:
        query, key = query.float(), key.float()
    scores = torch.matmul(query, key.transpose(-1, -2)) * attn.scale
    if mask is not None:
        mask = attn.prepare_attention_mask(mask, key.shape[2], query.shape[0])
        scores = scores + mask.view(query.shape[0], attn.heads, -1, mask.shape[-1])
    scores = scores.float() if attn.upcast_softmax else scores
    probabilities: Tensor = scores.softmax(dim=-1).to(dtype)
    return probabilities


def attention_names(denoiser: nn.Module, softmax: SoftmaxQuant | None) -> list[str]:
    """Paths of the attention blocks whose probabilities a recipe quantizes.

    Raises:
        RecipeError: the pattern matches no attention block, or one that joins two streams of tokens (SD3).
    """
    if softmax is None:
        return []
    blocks = [name for name, module in denoiser.named_modules() if isinstance(module, Attention)]
    chosen = [name for name in blocks if softmax.chooses(name)]
    if not chosen:
        raise RecipeError(
            f"softmax.match {', '.join(softmax.patterns)!r} matches no attention block; they are named like "
            f"{', '.join(blocks[:3]) or '(the model has none)'}"
        )
    modules: dict[str, Any] = dict(denoiser.named_modules())
    joint = next((name for name in chosen if modules[name].added_kv_proj_dim is not None), None)
    if joint is not None:
        raise RecipeError(
            f"softmax.match {', '.join(softmax.patterns)!r} matches {joint}, which attends to picture and text "
            "at once; quantizers behind its softmax are not supported: choose other blocks, or leave softmax out"
        )
    return chosen


@contextlib.contextmanager
def watched_softmax(denoiser: nn.Module, names: list[str], watch: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Shows the probabilities of the named attention blocks to ``watch`` while the denoiser runs."""
    processors = {}
    for name in names:
        block: Any = denoiser.get_submodule(name)
        processors[name] = block.processor
        block.set_processor(ExplicitAttention(_Show(name, watch)))
    try:
        yield
    finally:
        for name, processor in processors.items():
            block = denoiser.get_submodule(name)
            block.set_processor(processor)


class _Show:
    def __init__(self, name: str, watch: Callable[[str, Tensor], None]) -> None:
        self._name, self._watch = name, watch

    def __call__(self, probabilities: Tensor) -> Tensor:
        self._watch(self._name, probabilities)
        return probabilities


def install_softmax(denoiser: nn.Module, parameters: Mapping[str, SoftmaxParameters], context: StepContext) -> None:
    """Puts quantizers behind the softmax of the named attention blocks, in place.

    Raises:
        ModelError: the denoiser has no such block.
    """
    blocks = dict(denoiser.named_modules())
    for name, values in parameters.items():
        block: Any = blocks.get(name)
        if not isinstance(block, Attention):
            raise ModelError(f"the denoiser has no attention block {name}; the parameters are of another model")
        quantizer = SoftmaxQuantizer(values, context)
        block.softmax_quantizer = quantizer.to(block.to_q.weight.device)
        block.set_processor(ExplicitAttention())


def softmax_parameters(seen: list[Histogram], highs: list[float], settings: SoftmaxQuant) -> SoftmaxParameters:
    """Chooses mode and scale for every row.

    Args:
        seen: the probabilities of every row.
        highs: the largest probability per row.
        settings: of the recipe.

    Returns:
        One row when all rows agree.
    """
    modes, scales = [], []
    for values, high in zip(seen, highs, strict=True):
        logarithmic = settings.mode == "log2" or (
            settings.mode == "adaptive" and likelihood_ratio(values.middle, values.count) > 0
        )
        modes.append(float(logarithmic))
        largest = min(max(high, SMALLEST_PROBABILITY), 1.0)
        # log2 reaches from 1 downwards whatever was seen; a uniform step is worth drawing in
        scales.append(1.0 if logarithmic else largest / (2**settings.bits - 1))
    mode, scale = torch.tensor(modes), torch.tensor(scales)
    if bool((mode == mode[0]).all()) and bool((scale == scale[0]).all()):
        mode, scale = mode[:1], scale[:1]
    return SoftmaxParameters(bits=settings.bits, scale=scale, mode=mode)


def likelihood_ratio(values: Tensor, counts: Tensor | None = None) -> float:
    """Log-likelihood of a power law less that of an exponential, both fitted by maximum likelihood (Clauset, Shalizi
    and Newman 2009; methods.md 4.1 b).

    ``alpha = 1 + n / sum ln(x / m)``, ``ln p = ln((alpha - 1) / m) - alpha ln(x / m)``; ``lambda = 1 / (mean(x) - m)``,
    ``ln p = ln lambda - lambda (x - m)``, over ``x >= m = 2^-15``.

    Args:
        values: probabilities, any shape.
        counts: how often each occurs; once when None.

    Returns:
        Positive where the power law is likelier, which asks for log2; minus infinity where a fit does not exist.
    """
    x = values.double().flatten()
    weight = torch.ones_like(x) if counts is None else counts.double().flatten()
    x, weight = x[values.flatten() >= SMALLEST_PROBABILITY], weight[values.flatten() >= SMALLEST_PROBABILITY]
    number = float(weight.sum())
    if number < 2:
        return -torch.inf
    logs = torch.log(x / SMALLEST_PROBABILITY)
    sum_of_logs = float(logs @ weight)
    spread = float(x @ weight) / number - SMALLEST_PROBABILITY
    if sum_of_logs <= 0 or spread <= 0:
        return -torch.inf
    alpha, rate = 1 + number / sum_of_logs, 1 / spread
    power = math.log((alpha - 1) / SMALLEST_PROBABILITY) - alpha * logs
    exponential = math.log(rate) - rate * (x - SMALLEST_PROBABILITY)
    ratio = float((power - exponential) @ weight)
    return -torch.inf if math.isnan(ratio) else ratio  # a tie stays uniform
