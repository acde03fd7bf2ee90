"""Quantized layers: ordinary Conv2d and Linear with a quantizer on the input and one on the weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdexport.core.precision import LayerKind
from qdexport.core.spec import QuantSpec
from qdexport.errors import ModelError
from qdexport.quant.ops import NO_AXIS, fake_quantize

__all__ = [
    "ActivationQuantizer",
    "ChannelScale",
    "FirstToken",
    "QuantConv2d",
    "QuantLinear",
    "QuantSplitConv2d",
    "StepContext",
    "StepRows",
    "WeightQuantizer",
    "install_step_rows",
    "quantizer_pairs",
    "selected_row",
]

# by the rank of its scales: along which axis of a weight they lie (blocks along the input dimension)
_WEIGHT_AXES = {1: NO_AXIS, 2: 0, 3: 1}


@dataclass
class StepContext:
    """The table row of the running denoiser call; one object shared by all step tables of a model.

    ``row`` is INT64 ``[1]`` or ``[N]``, set from the raw timestep before each call, never by counting calls.
    """

    row: Tensor | None = None


class StepRows(nn.Module):
    """Looks the table row of a raw scheduler timestep up: the nearest calibrated step.

    Args:
        timesteps: the calibrated steps, one per row, in any order; fractions make the lookup a search.
        training_steps: number of training timesteps of the scheduler; calibrated steps may lie outside (EDM).
        context: where the row is put.
        unit: what the denoiser's timestep is multiplied by to be the scheduler's (FLUX: 1000).
    """

    row_of_timestep: Tensor
    steps: Tensor
    first: Tensor
    last: Tensor

    def __init__(
        self, timesteps: Sequence[float], training_steps: int, context: StepContext, unit: float = 1.0
    ) -> None:
        super().__init__()
        self.timesteps = list(timesteps)
        self.context = context
        self.unit = unit
        self.fractions = unit != 1.0 or any(
            not float(step).is_integer() or not 0 <= step < training_steps for step in timesteps
        )
        # flow matching starts at the end of the range
        last = training_steps if self.fractions else training_steps - 1
        self.bounds = (min((0.0, *timesteps)), max((last, *timesteps)))
        if self.fractions:
            self.register_buffer("steps", torch.tensor(timesteps, dtype=torch.float32), persistent=False)
            return
        # a row more than there are timesteps: what lies outside reads the last one, in whose place a Gather of the
        # exported network would count from the end, or stop
        distance = (torch.arange(training_steps + 1)[:, None] - torch.tensor(timesteps)[None, :]).abs()
        self.register_buffer("row_of_timestep", distance.argmin(dim=1), persistent=False)
        self.register_buffer("first", torch.tensor([-1]), persistent=False)
        self.register_buffer("last", torch.tensor([training_steps]), persistent=False)

    def forward(self, timestep: Tensor) -> None:
        """Selects the row of ``timestep`` (any numeric dtype, scalar, ``[1]`` or ``[N]``).

        Raises:
            ModelError: a timestep outside the training range.
        """
        flat = timestep.reshape(-1)
        if flat.shape[0] > 1 and flat.stride(0) == 0:  # one timestep, expanded to the batch
            flat = flat[:1]
        if self.fractions:
            flat = flat.float() * self.unit
            self._check(flat)
            self.context.row = (flat[:, None] - self.steps[None, :]).abs().argmin(dim=1)
            return
        index = (flat.round() if flat.is_floating_point() else flat).to(torch.int64)
        self._check(index)
        # as two operators: the ONNX parser of TensorRT takes no Clip of integers
        self.context.row = self.row_of_timestep[torch.minimum(torch.maximum(index, self.first), self.last)]

    def _check(self, timestep: Tensor) -> None:
        low, high = self.bounds
        if not torch.compiler.is_compiling() and bool(((timestep < low) | (timestep > high)).any()):
            raise ModelError(
                f"timestep {timestep.tolist()} is outside the training range {low:g}..{high:g}; "
                "use a scheduler with the model's own number of training steps"
            )


def install_step_rows(denoiser: nn.Module, rows: StepRows) -> None:
    """Registers the lookup so that every call of ``denoiser(sample, timestep, ...)`` selects its rows
    first.
    """
    denoiser.step_rows = rows
    denoiser.register_forward_pre_hook(_select_row, with_kwargs=True)


def _select_row(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
    device = next(module.parameters()).device
    step_rows = module.get_submodule("step_rows")
    step_rows(timestep if isinstance(timestep, Tensor) else torch.tensor([timestep], device=device))


def selected_row(context: StepContext | None, rows: int) -> Tensor | None:
    """The table row of the running call, INT64 ``[1]`` or ``[N]``; None for a static quantizer.

    Raises:
        ModelError: a table has several rows and none is selected.
    """
    if context is None or rows == 1:
        return None
    if context.row is None:
        raise ModelError(
            "no row of the step tables is selected: call the denoiser itself with its timestep, "
            "or set StepContext.row before calling a part of it"
        )
    return context.row


class ActivationQuantizer(nn.Module):
    """Fake quantization of a layer's input, one scale per tensor, one row per step (R = 1 is static)."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, spec: QuantSpec, scale: Tensor, zero_point: Tensor, context: StepContext | None = None) -> None:
        super().__init__()
        if scale.dim() != 1 or scale.shape != zero_point.shape:
            raise ValueError(
                f"activation scale {tuple(scale.shape)} and zero point {tuple(zero_point.shape)} must be [R]"
            )
        if scale.shape[0] > 1 and context is None:
            raise ValueError(f"a step table of {scale.shape[0]} rows needs the context that selects a row")
        self.spec = spec
        self.context = context
        # not persistent: the state dict of a quantized denoiser is that of the original, so its folder is too
        self.register_buffer("scale", scale.float(), persistent=False)
        self.register_buffer("zero_point", zero_point.float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        row = selected_row(self.context, self.scale.shape[0])
        qmin, qmax = self.spec.qmin, self.spec.qmax
        y: Tensor = fake_quantize(x, self.scale, self.zero_point, row, qmin, qmax, NO_AXIS, None, self.spec.format)
        return y


class WeightQuantizer(nn.Module):
    """Fake quantization of a weight: ``scale`` is ``[1, C]`` (per output channel, axis 0), ``[1]``, or ``[1, C, B]`` (B
    blocks of the input dimension); zero point 0.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, spec: QuantSpec, scale: Tensor) -> None:
        super().__init__()
        if scale.shape[0] != 1 or scale.dim() > 3:
            raise ValueError(f"a weight scale must be [1], [1, C] or [1, C, B], not {list(scale.shape)}")
        self.spec = spec
        self.register_buffer("scale", scale.float(), persistent=False)
        self.register_buffer("zero_point", torch.zeros_like(self.scale), persistent=False)

    def forward(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        axis = _WEIGHT_AXES[self.scale.dim()]
        qmin, qmax = self.spec.qmin, self.spec.qmax
        y: Tensor = fake_quantize(weight, self.scale, self.zero_point, None, qmin, qmax, axis, None, self.spec.format)
        return y if dtype is None else y.to(dtype)


class ChannelScale(nn.Module):
    """Divides the channels of an input by ``r``, whose product with the weight's columns takes it back.

    ``op(W, x) = op(W r, x / r)`` (TCAQ-DM's reparameterization, SmoothQuant's migration). Both products are FP32 and
    rounded once; the quotient has the type of ``x`` again.

    Args:
        ratio: ``r``, FP32 ``[C]``, positive.
        kind: channels are axis 1 of a convolution's input, the last axis of a linear layer's.
    """

    ratio: Tensor
    inverse: Tensor

    def __init__(self, ratio: Tensor, kind: LayerKind) -> None:
        super().__init__()
        shape = (1, -1, 1, 1) if kind == "conv" else (-1,)
        self.register_buffer("ratio", ratio.float().reshape(shape), persistent=False)
        inverse = ratio.double().reciprocal().float().reshape(shape)
        self.register_buffer("inverse", inverse, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.inverse).to(x.dtype)

    def weight(self, weight: Tensor) -> Tensor:
        """``W r``, FP32."""
        return weight.float() * self.ratio


class FirstToken(nn.Module):
    """The first token of the text, which no quantizer touches (MixDQ's BOS-aware quantization).

    The causal text encoder gives the first token the same embedding for every prompt, with values many times those of
    the others; its projection becomes a constant when the model is compiled (pass ``precompute-bos``).
    """

    def forward(self, x: Tensor, rest: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``[N, T, D]`` and the layer's output for tokens 1 and on, ``[N, T - 1, C]``; returns ``[N, T, C]``."""
        return torch.cat([F.linear(x[:, :1], weight, bias), rest], dim=1)


class QuantConv2d(nn.Conv2d):
    """``y = conv(Q_x(x / r), Q_w(W r)) + b``; shares the weight and bias of the layer it replaces.

    Without an input quantizer it is weight-only: ``Q_x`` is left out.
    """

    input_quantizer: ActivationQuantizer | None
    weight_quantizer: WeightQuantizer
    channel_scale: ChannelScale | None

    @classmethod
    def wrap(
        cls,
        conv: nn.Conv2d,
        inputs: ActivationQuantizer | None,
        weights: WeightQuantizer,
        channel_scale: ChannelScale | None = None,
    ) -> QuantConv2d:
        """Replaces ``conv``; nothing is copied."""
        layer = _twin(cls, conv, channel_scale)
        layer.register_module("input_quantizer", inputs)
        layer.weight_quantizer = weights
        return layer

    def forward(self, x: Tensor) -> Tensor:
        (operand,), (kernel,) = self.operands(x), self.kernels()
        return self.product(0, operand, kernel)

    def operands(self, x: Tensor) -> tuple[Tensor, ...]:
        """What the input quantizer of each part reads."""
        return (x if self.channel_scale is None else self.channel_scale(x),)

    def kernels(self) -> tuple[Tensor, ...]:
        """What the weight quantizer of each part reads."""
        return (self.weight if self.channel_scale is None else self.channel_scale.weight(self.weight),)

    def product(self, part: int, operand: Tensor, kernel: Tensor) -> Tensor:
        """One part's output (the bias is the first part's)."""
        del part
        weight = self.weight_quantizer(kernel, self.weight.dtype)
        x = operand if self.input_quantizer is None else self.input_quantizer(operand)
        y: Tensor = self._conv_forward(x, weight, self.bias)
        return y


class QuantSplitConv2d(nn.Conv2d):
    """A convolution over ``concat(hidden, skip)`` whose input-channel groups have quantizers of their own.

    ``y = sum_i conv(Q_i(x_i), Q_i(W_i)) + b`` with ``x_i``, ``W_i`` the channel groups (Q-Diffusion, MixDQ).
    """

    splits: tuple[int, ...]
    input_quantizers: nn.ModuleList
    weight_quantizers: nn.ModuleList
    channel_scale: ChannelScale | None

    @classmethod
    def wrap(
        cls,
        conv: nn.Conv2d,
        splits: tuple[int, ...],
        inputs: list[ActivationQuantizer],
        weights: list[WeightQuantizer],
        channel_scale: ChannelScale | None = None,
    ) -> QuantSplitConv2d:
        """Replaces ``conv``; nothing is copied. Raises ``ValueError`` when the splits do not cover the
        channels.
        """
        if sum(splits) != conv.in_channels or conv.groups != 1:
            raise ValueError(f"splits {splits} do not cover {conv.in_channels} input channels in one group")
        layer = _twin(cls, conv, channel_scale)
        layer.splits = splits
        layer.input_quantizers = nn.ModuleList(inputs)
        layer.weight_quantizers = nn.ModuleList(weights)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor | None = None
        for part, (operand, kernel) in enumerate(zip(self.operands(x), self.kernels(), strict=True)):
            y = self.product(part, operand, kernel)
            total = y if total is None else total + y
        if total is None:
            raise ValueError("a split convolution has at least one group")
        return total

    def operands(self, x: Tensor) -> tuple[Tensor, ...]:
        """What the input quantizer of each part reads."""
        scaled = x if self.channel_scale is None else self.channel_scale(x)
        return torch.split_with_sizes(scaled, self.splits, dim=1)

    def kernels(self) -> tuple[Tensor, ...]:
        """What the weight quantizer of each part reads."""
        weight = self.weight if self.channel_scale is None else self.channel_scale.weight(self.weight)
        return torch.split_with_sizes(weight, self.splits, dim=1)

    def product(self, part: int, operand: Tensor, kernel: Tensor) -> Tensor:
        """One part's output (the bias is the first part's)."""
        weight = self.weight_quantizers[part](kernel, self.weight.dtype)
        bias = self.bias if part == 0 else None
        y: Tensor = self._conv_forward(self.input_quantizers[part](operand), weight, bias)
        return y


class QuantLinear(nn.Linear):
    """``y = Q_x(x / r) Q_w(W r)^T + b``; shares the weight and bias of the layer it replaces.

    With ``first_token``, the first token of ``x`` ``[N, T, D]`` bypasses the quantizers. Without an input quantizer it
    is weight-only.
    """

    input_quantizer: ActivationQuantizer | None
    weight_quantizer: WeightQuantizer
    channel_scale: ChannelScale | None
    first_token: FirstToken | None

    @classmethod
    def wrap(
        cls,
        linear: nn.Linear,
        inputs: ActivationQuantizer | None,
        weights: WeightQuantizer,
        channel_scale: ChannelScale | None = None,
        *,
        bos: bool = False,
    ) -> QuantLinear:
        """Replaces ``linear``; nothing is copied."""
        layer = _twin(cls, linear, channel_scale)
        layer.register_module("input_quantizer", inputs)
        layer.weight_quantizer = weights
        layer.register_module("first_token", FirstToken() if bos else None)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        (operand,), (kernel,) = self.operands(x), self.kernels()
        y = self.product(0, operand, kernel)
        if self.first_token is None:
            return y
        joined: Tensor = self.first_token(x, y, self.weight, self.bias)
        return joined

    def operands(self, x: Tensor) -> tuple[Tensor, ...]:
        """What the input quantizer of each part reads."""
        rest = x if self.first_token is None else x[:, 1:]
        return (rest if self.channel_scale is None else self.channel_scale(rest),)

    def kernels(self) -> tuple[Tensor, ...]:
        """What the weight quantizer of each part reads."""
        return (self.weight if self.channel_scale is None else self.channel_scale.weight(self.weight),)

    def product(self, part: int, operand: Tensor, kernel: Tensor) -> Tensor:
        """The output for the quantized tokens."""
        del part
        x = operand if self.input_quantizer is None else self.input_quantizer(operand)
        return F.linear(x, self.weight_quantizer(kernel, self.weight.dtype), self.bias)


_Layer = TypeVar("_Layer", bound=nn.Module)


def _twin(cls: type[_Layer], layer: nn.Module, channel_scale: ChannelScale | None) -> _Layer:
    """An object of ``cls`` with the parameters and settings of ``layer``, and no submodules but the channel scale."""
    twin = cls.__new__(cls)
    twin.__dict__ = {**layer.__dict__, "_modules": {}, "_parameters": dict(layer._parameters)}
    twin.register_module("channel_scale", channel_scale)
    return twin


def quantizer_pairs(layer: nn.Module) -> list[tuple[ActivationQuantizer | None, WeightQuantizer]]:
    """Input quantizer (None when the weight alone is quantized) and weight quantizer of a layer, one pair per part.

    Raises:
        TypeError: the layer is not quantized.
    """
    if isinstance(layer, QuantConv2d | QuantLinear):
        return [(layer.input_quantizer, layer.weight_quantizer)]
    if isinstance(layer, QuantSplitConv2d):
        pairs = zip(layer.input_quantizers, layer.weight_quantizers, strict=True)
        return [(a, w) for a, w in pairs if isinstance(a, ActivationQuantizer) and isinstance(w, WeightQuantizer)]
    raise TypeError(f"{type(layer).__name__} is not quantized")
