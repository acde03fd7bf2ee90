"""Codes as bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from qdexport.core.spec import QuantSpec
from qdexport.quant.attach import weight_scale
from qdexport.quant.modules import ActivationQuantizer, QuantLinear, QuantSplitConv2d, WeightQuantizer
from qdexport.quant.packing import integer_codes, pack_codes, unpack_codes, weight_codes, weight_parts


@pytest.mark.parametrize("shape", [(3, 5), (4, 2, 3, 3), (1,)])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_round_trip(bits: int, signed: bool, shape: tuple[int, ...]) -> None:
    spec = QuantSpec(bits=bits, signed=signed)
    dtype = np.int8 if signed else np.uint8
    codes = np.random.default_rng(bits).integers(spec.qmin, spec.qmax, shape, endpoint=True).astype(dtype)
    codes.flat[0] = spec.qmin
    codes.flat[-1] = spec.qmax  # 128 and more for unsigned 8 bits
    packed = pack_codes(codes, spec)
    assert packed.nbytes == ((codes.size + 1) // 2 if bits <= 4 else codes.size)
    restored = unpack_codes(packed, spec, shape)
    assert restored.dtype == dtype
    assert np.array_equal(restored, codes)


def test_low_nibble_comes_first() -> None:
    packed = pack_codes(np.array([1, -1, 7], dtype=np.int8), QuantSpec(bits=4))
    assert packed.tolist() == [0xF1, 0x07]


@pytest.mark.parametrize(
    ("bits", "packed"),
    [
        (4, np.zeros(3, np.uint8)),
        (4, np.zeros(2, np.int8)),
        (8, np.zeros(4, np.int8)),
        (8, np.zeros((2, 2), np.uint8)),
    ],
)
def test_what_does_not_fit_is_refused(bits: int, packed: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected"):
        unpack_codes(packed, QuantSpec(bits=bits), (2, 2))


def _quantizers(weight: torch.Tensor, bits: int) -> tuple[ActivationQuantizer, WeightQuantizer]:
    spec = QuantSpec(bits=bits, granularity="per_channel")
    inputs = ActivationQuantizer(QuantSpec(bits=8), torch.ones(1), torch.zeros(1))
    return inputs, WeightQuantizer(spec, weight_scale(weight, spec))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_codes_are_those_of_the_forward_pass(bits: int, dtype: torch.dtype) -> None:
    linear = nn.Linear(6, 4).to(dtype)
    inputs, weights = _quantizers(linear.weight, bits)
    codes = integer_codes(QuantLinear.wrap(linear, inputs, weights))
    values = torch.from_numpy(codes).float() * weights.scale.reshape(-1, 1)
    assert torch.equal(values.to(dtype), weights(linear.weight))
    assert codes.min() >= -(1 << (bits - 1))
    # symmetric: the largest magnitude of each channel has the largest code
    assert np.abs(codes).max(axis=1).tolist() == [(1 << (bits - 1)) - 1] * 4


def test_codes_of_a_split_layer_lie_side_by_side() -> None:
    conv = nn.Conv2d(6, 4, 1)
    pairs = [_quantizers(kernel, 8) for kernel in conv.weight.split([4, 2], dim=1)]
    layer = QuantSplitConv2d.wrap(conv, (4, 2), [a for a, _ in pairs], [w for _, w in pairs])
    codes = integer_codes(layer)
    assert codes.shape == conv.weight.shape
    assert np.array_equal(codes[:, 4:], weight_codes(*weight_parts(layer)[1]))


def test_a_plain_layer_has_no_codes() -> None:
    with pytest.raises(TypeError, match="Linear is not quantized"):
        integer_codes(nn.Linear(2, 2))


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_large_weights_are_coded_in_blocks(granularity: str) -> None:
    spec = QuantSpec.model_validate({"bits": 8, "granularity": granularity})
    weight = torch.randn(300, 1000, generator=torch.Generator().manual_seed(0)).half()  # 2.3 blocks
    quantizer = WeightQuantizer(spec, weight_scale(weight, spec))
    whole = (weight.float() / quantizer.scale.reshape(-1, 1)).round().clamp(-128, 127)
    assert np.array_equal(weight_codes(weight, quantizer), whole.numpy())
