"""Quantized layers and step tables."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from qdexport.core.spec import QuantSpec
from qdexport.errors import ModelError
from qdexport.quant.affine import fake_quantize_reference
from qdexport.quant.attach import weight_scale
from qdexport.quant.modules import (
    ActivationQuantizer,
    QuantConv2d,
    QuantLinear,
    QuantSplitConv2d,
    StepContext,
    StepRows,
    WeightQuantizer,
    install_step_rows,
    quantizer_pairs,
)

A8 = QuantSpec(bits=8)
W8 = QuantSpec(bits=8, granularity="per_channel")


def _activation(scale: float = 0.05, spec: QuantSpec = A8, zero_point: float = 0.0) -> ActivationQuantizer:
    return ActivationQuantizer(spec, torch.tensor([scale]), torch.tensor([zero_point]))


def _weights(layer: nn.Conv2d | nn.Linear, spec: QuantSpec = W8) -> WeightQuantizer:
    return WeightQuantizer(spec, weight_scale(layer.weight, spec))


def _fake_weight(layer: nn.Conv2d | nn.Linear, spec: QuantSpec = W8) -> Tensor:
    scale = weight_scale(layer.weight, spec).reshape(-1, *[1] * (layer.weight.dim() - 1))
    return fake_quantize_reference(layer.weight.detach(), scale, torch.zeros(1), spec.qmin, spec.qmax)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, 1, bias=False),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.Conv2d(4, 6, 3, padding=2, dilation=2, padding_mode="reflect"),
    ],
    ids=["3x3", "1x1 without bias", "groups and stride", "depthwise", "dilation and reflection"],
)
@torch.no_grad()
def test_conv_is_the_plain_conv_on_quantized_operands(conv: nn.Conv2d) -> None:
    x = torch.randn(2, 4, 8, 8)
    spec = QuantSpec(bits=8, symmetric=False, signed=False)
    layer = QuantConv2d.wrap(conv, _activation(0.03, spec, 100.0), _weights(conv))
    plain = copy.deepcopy(conv)
    plain.weight.copy_(_fake_weight(conv))
    x_hat = fake_quantize_reference(x, torch.tensor(0.03), torch.tensor(100.0), 0, 255)
    assert torch.equal(layer(x), plain(x_hat))
    assert layer.weight is conv.weight


@torch.no_grad()
def test_linear_is_the_plain_linear_on_quantized_operands() -> None:
    linear = nn.Linear(5, 7)
    layer = QuantLinear.wrap(linear, _activation(), _weights(linear))
    x = torch.randn(3, 2, 5)
    x_hat = fake_quantize_reference(x, torch.tensor(0.05), torch.tensor(0.0), -128, 127)
    assert torch.equal(layer(x), nn.functional.linear(x_hat, _fake_weight(linear), linear.bias))


@torch.no_grad()
def test_split_conv_equals_its_parts() -> None:
    conv = nn.Conv2d(6, 5, 1)
    kernels = conv.weight.split([4, 2], dim=1)
    weights = [WeightQuantizer(W8, weight_scale(kernel, W8)) for kernel in kernels]
    inputs = [_activation(0.02), _activation(0.3)]
    layer = QuantSplitConv2d.wrap(conv, (4, 2), inputs, weights)
    x = torch.randn(2, 6, 4, 4) * torch.tensor([1.0] * 4 + [20.0] * 2)[:, None, None]
    expected = nn.functional.conv2d(inputs[0](x[:, :4]), weights[0](kernels[0]), conv.bias)
    expected = expected + nn.functional.conv2d(inputs[1](x[:, 4:]), weights[1](kernels[1]))
    assert torch.equal(layer(x), expected)
    assert weights[0].scale.shape == (1, 5)


def test_split_must_cover_the_channels() -> None:
    conv = nn.Conv2d(6, 5, 1)
    with pytest.raises(ValueError, match="do not cover 6"):
        QuantSplitConv2d.wrap(conv, (4, 1), [_activation()] * 2, [_weights(conv)] * 2)


def test_state_dict_is_that_of_the_original() -> None:
    linear = nn.Linear(5, 7)
    layer = QuantLinear.wrap(linear, _activation(), _weights(linear))
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_gradients_pass_a_quantized_layer() -> None:
    linear = nn.Linear(5, 7)
    layer = QuantLinear.wrap(linear, _activation(), _weights(linear))
    layer(torch.randn(3, 5)).sum().backward()
    assert linear.weight.grad is not None
    assert linear.weight.grad.abs().sum() > 0


def test_quantizer_pairs_of_a_plain_layer() -> None:
    with pytest.raises(TypeError, match="Linear is not quantized"):
        quantizer_pairs(nn.Linear(2, 2))


def test_nearest_row() -> None:
    context = StepContext()
    rows = StepRows([901, 601, 301, 1], 1000, context)
    for timestep, row in ((999, 0), (901, 0), (752, 0), (751, 0), (750, 1), (601, 1), (300, 2), (0, 3)):
        rows(torch.tensor(timestep))
        assert context.row is not None
        assert context.row.tolist() == [row], timestep


def test_one_row_per_sample() -> None:
    context = StepContext()
    StepRows([901, 601], 1000, context)(torch.tensor([601, 901, 601]))
    assert context.row is not None
    assert context.row.tolist() == [1, 0, 1]


def test_fractional_timesteps_take_the_nearest_row() -> None:
    context = StepContext()
    rows = StepRows((1000.0, 857.14, 400.5), 1000, context)
    for timestep, row in ((1000.0, 0), (857.0, 1), (600.0, 2), (0.0, 2)):
        rows(torch.tensor([timestep]))
        assert context.row is not None
        assert context.row.tolist() == [row], timestep
    StepRows((1000.0, 750.0), 1000, context, unit=1000.0)(torch.tensor([0.75]))
    assert context.row.tolist() == [1]
    with pytest.raises(ModelError, match=r"outside the training range 0\.\.1000"):
        rows(torch.tensor([1001.0]))


def test_a_timestep_expanded_to_the_batch_is_one() -> None:
    context = StepContext()
    StepRows([901, 601], 1000, context)(torch.tensor([601]).expand(4))
    assert context.row is not None
    assert context.row.tolist() == [1]


@pytest.mark.parametrize("timestep", [1000, -1])
def test_timestep_outside_the_training_range(timestep: int) -> None:
    with pytest.raises(ModelError, match=r"outside the training range 0\.\.999"):
        StepRows([901], 1000, StepContext())(torch.tensor([timestep]))


class _Denoiser(nn.Module):
    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        linear = nn.Linear(4, 4)
        self.layer = QuantLinear.wrap(linear, quantizer, _weights(linear))

    def forward(self, sample: Tensor, timestep: Tensor | float) -> Tensor:
        return self.layer(sample)


@torch.no_grad()
def test_denoiser_selects_its_rows_from_the_raw_timestep() -> None:
    context = StepContext()
    quantizer = ActivationQuantizer(A8, torch.tensor([0.5, 0.01]), torch.zeros(2), context)
    denoiser = _Denoiser(quantizer)
    install_step_rows(denoiser, StepRows([901, 1], 1000, context))
    x = torch.randn(2, 4)
    early, late = denoiser(x, torch.tensor(901)), denoiser(x, timestep=1)
    assert not torch.equal(early, late)
    assert torch.equal(denoiser(x, 901.0), early)
    mixed = denoiser(x, torch.tensor([901, 1]))
    assert torch.equal(mixed, torch.stack([early[0], late[1]]))
    # a copy has a context of its own, and its quantizers follow it
    twin = copy.deepcopy(denoiser)
    assert torch.equal(twin(x, 1), late)
    assert torch.equal(context.row, torch.tensor([0, 1]))


def test_table_without_a_selected_row() -> None:
    quantizer = ActivationQuantizer(A8, torch.tensor([0.5, 0.1]), torch.zeros(2), StepContext())
    with pytest.raises(ModelError, match="no row of the step tables is selected"):
        quantizer(torch.zeros(1))


def test_table_without_a_context() -> None:
    with pytest.raises(ValueError, match="2 rows needs the context"):
        ActivationQuantizer(A8, torch.tensor([0.5, 0.1]), torch.zeros(2))


def test_shapes_of_parameters() -> None:
    with pytest.raises(ValueError, match=r"must be \[R\]"):
        ActivationQuantizer(A8, torch.ones(1, 3), torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"must be \[1\], \[1, C\] or \[1, C, B\]"):
        WeightQuantizer(W8, torch.ones(3))
