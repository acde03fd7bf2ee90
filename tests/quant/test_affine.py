"""Ranges to parameters, values to codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qdexport.core.spec import QuantSpec
from qdexport.quant.affine import dequantize, fake_quantize_reference, parameters_from_range, quantize_codes

WIDTHS = range(2, 9)
KINDS = [(symmetric, signed) for symmetric in (True, False) for signed in (True, False)]


def test_symmetric_scale_is_reach_over_qmax() -> None:
    scale, zero_point = parameters_from_range(torch.tensor([-4.0]), torch.tensor([2.0]), QuantSpec(bits=8))
    assert scale.item() == np.float32(4.0 / 127)
    assert zero_point.item() == 0


def test_unsigned_symmetric_scale_covers_the_positive_half() -> None:
    spec = QuantSpec(bits=4, signed=False)
    scale, zero_point = parameters_from_range(torch.tensor([-4.0]), torch.tensor([3.0]), spec)
    assert scale.item() == np.float32(3.0 / 15)
    assert zero_point.item() == 0


@pytest.mark.parametrize("signed", [True, False])
def test_asymmetric_parameters(signed: bool) -> None:
    spec = QuantSpec(bits=8, symmetric=False, signed=signed)
    scale, zero_point = parameters_from_range(torch.tensor([-1.0]), torch.tensor([3.0]), spec)
    assert scale.item() == np.float32(4.0 / 255)
    assert zero_point.item() == spec.qmin + 64  # rint(63.75)


@pytest.mark.parametrize(("low", "high"), [(1.0, 3.0), (-3.0, -1.0)])
def test_range_is_widened_to_hold_zero(low: float, high: float) -> None:
    spec = QuantSpec(bits=8, symmetric=False, signed=False)
    scale, zero_point = parameters_from_range(torch.tensor([low]), torch.tensor([high]), spec)
    zero = fake_quantize_reference(torch.zeros(1), scale, zero_point, spec.qmin, spec.qmax)
    assert zero.item() == 0
    assert scale.item() == np.float32(3.0 / 255)


@pytest.mark.parametrize(("symmetric", "signed"), KINDS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_all_widths_reach_both_ends_and_halve_the_step(bits: int, symmetric: bool, signed: bool) -> None:
    spec = QuantSpec(bits=bits, symmetric=symmetric, signed=signed)
    low = torch.tensor([-1.5 if signed or not symmetric else 0.0])
    high = torch.tensor([2.0])
    scale, zero_point = parameters_from_range(low, high, spec)
    x = torch.linspace(float(low), float(high), 1001)
    codes = quantize_codes(x, scale, zero_point, spec.qmin, spec.qmax)
    assert codes.min() >= spec.qmin
    assert codes.max() == spec.qmax
    assert torch.equal(codes, codes.round())
    error = (dequantize(codes, scale, zero_point) - x).abs().max()
    # half a step; asymmetric: the rounded zero point shifts the range by up to half a step more
    assert error <= scale * (0.5 if symmetric else 1.0) * (1 + 1e-6)


def test_round_half_to_even() -> None:
    codes = quantize_codes(torch.tensor([0.5, 1.5, 2.5, -0.5]), torch.tensor(1.0), torch.tensor(0.0), -128, 127)
    assert codes.tolist() == [0.0, 2.0, 2.0, -0.0]


def test_dead_channel_leaves_the_others_alone() -> None:
    low, high = torch.tensor([-1.0, 0.0, -3.0]), torch.tensor([1.0, 0.0, 2.0])
    scale, _ = parameters_from_range(low, high, QuantSpec(bits=8))
    alone, _ = parameters_from_range(low[[0, 2]], high[[0, 2]], QuantSpec(bits=8))
    assert torch.equal(scale[[0, 2]], alone)
    assert scale[1] > 0


@pytest.mark.parametrize("symmetric", [True, False])
def test_tiny_range_keeps_a_normal_scale(symmetric: bool) -> None:
    spec = QuantSpec(bits=8, symmetric=symmetric)
    scale, _ = parameters_from_range(torch.tensor([-1e-44]), torch.tensor([1e-44]), spec)
    assert scale.item() >= torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_unusable_range_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        parameters_from_range(torch.tensor([0.0]), torch.tensor([bad]), QuantSpec(bits=8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_result_keeps_the_dtype_and_computes_in_fp32(dtype: torch.dtype) -> None:
    x = torch.linspace(-3, 3, 101).to(dtype)
    scale, zero_point = torch.tensor(0.0371), torch.tensor(3.0)
    y = fake_quantize_reference(x, scale, zero_point, -128, 127)
    wide = fake_quantize_reference(x.float(), scale, zero_point, -128, 127)
    assert y.dtype == dtype
    assert torch.equal(y, wide.to(dtype))
