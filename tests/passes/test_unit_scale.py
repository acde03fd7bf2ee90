"""The unit-scale form on arbitrary quantizers and convolutions, static and by rows."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qdexport.core.carrier import carrier_offset
from qdexport.graph.evaluate import fake_quantize_codes
from qdexport.passes.lower_timestep_scale import LowerTimestepScale
from qdexport.passes.lower_zero_point import LowerZeroPoint

ROWS = 3


@st.composite
def quantizers(draw):
    """Bounds, dyadic scales and zero points of any width from 2 to 8 bits."""
    bits, signed = draw(st.integers(2, 8)), draw(st.booleans())
    qmin = -(1 << (bits - 1)) if signed else 0
    qmax = qmin + (1 << bits) - 1
    zeros = draw(st.lists(st.integers(qmin, qmax), min_size=ROWS, max_size=ROWS))
    scales = [2.0**exponent for exponent in draw(st.lists(st.integers(-6, 1), min_size=ROWS, max_size=ROWS))]
    return (qmin, qmax), scales, zeros


@st.composite
def convolutions(draw):
    """Attributes of a convolution of 4 to 6 channels over 6 x 5 pixels."""
    kernel = draw(st.sampled_from([1, 2, 3]))
    pads = draw(st.lists(st.integers(0, 2), min_size=4, max_size=4))
    strides = draw(st.lists(st.integers(1, 2), min_size=2, max_size=2))
    dilations = draw(st.lists(st.integers(1, 2), min_size=2, max_size=2))
    return kernel, draw(st.sampled_from([1, 2])), {"pads": pads, "strides": strides, "dilations": dilations}


@settings(max_examples=60)
@given(quantizer=quantizers(), conv=convolutions(), per_step=st.booleans(), bias=st.booleans(), seed=st.integers(0, 99))
def test_any_convolution_behind_any_quantizer(graphs, quantizer, conv, per_step, bias, seed):
    """Powers of two and few terms: every sum is exact in FP32, so outputs are equal bit for bit."""
    (qmin, qmax), scales, zeros = quantizer
    kernel, group, attributes = conv
    noise = np.random.default_rng(seed)
    if not per_step:
        scales, zeros = scales[:1], zeros[:1]
    constants = {
        "s": np.float32(scales),
        "z": np.float32(zeros),
        "b": (noise.integers(-99, 100, 6) * 0.125).astype(np.float32),
        **graphs.weight_constants(
            "w", noise.integers(-128, 128, (6, 4 // group, kernel, kernel)), 2.0 ** noise.integers(-7, -4, 6)
        ),
    }
    listed = ", ".join(f"{key}: ints = {value}" for key, value in attributes.items())
    body = "\n".join(
        [
            graphs.quantize("conv.input_quantizer", "xq", "x, s, z, row" if per_step else "x, s, z", qmin, qmax),
            graphs.weight_of("conv", "w"),
            f'["conv/Conv"] y = Conv<group: int = {group}, {listed}>(xq, w{", b" if bias else ""})',
        ]
    )
    model = graphs.model_of("float[2,4,6,5] x, int64[1] row", "float[2,6,h,w] y", body, constants)
    # a quarter of the finest step: codes, ties and points between, inside and outside the range
    x = (noise.integers(-600, 600, (2, 4, 6, 5)) * 2.0**-8 * (qmax - qmin)).astype(np.float32)
    feeds = [{"x": x, "row": np.array([row])} for row in range(len(scales))]
    ran = graphs.run(model, LowerTimestepScale() if per_step else LowerZeroPoint(), feeds)
    ran.assert_equal()

    (unit,) = ran.nodes("FakeQuantize")
    offset = carrier_offset(qmin, qmax, np.float32(zeros))
    for row, item in enumerate(feeds):
        taken = zeros[row] if offset is None else offset
        codes = fake_quantize_codes(x, np.float32(scales[row]), np.float32(zeros[row]), qmin, qmax) - taken
        assert codes.min() >= -128
        assert codes.max() <= 127
        if unit.inputs[1].const_value.numpy() == np.float32(1) and "Pad" not in ran.ops and "Div" in ran.ops:
            np.testing.assert_array_equal(ran.at(unit.name, item), codes)
