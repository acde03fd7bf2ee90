"""Static symmetric quantizers become INT8 pairs; a Clip in FP32 carries narrower widths exactly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdexport.errors import GraphPassError
from qdexport.graph.evaluate import fake_quantize_codes
from qdexport.passes.lower_bitwidth import LowerBitwidth

RANGES = [(-128, 127), (-127, 127), (-64, 63), (-8, 7), (-2, 1), (0, 15), (-20, 43), (-128, 100), (0, 127)]


def quantizer(graphs, bounds, scale=0.037, body="float"):
    constants = {"s": np.float32([scale]), "z": np.float32([0])}
    text = graphs.quantize("conv.input_quantizer", "y", "x, s, z", *bounds)
    return graphs.model_of(f"{body}[2,60] x", f"{body}[2,60] y", text, constants)


def values(noise, scale=0.037):
    """Ties, values on codes, beyond the range, and anything between."""
    steps = np.concatenate([np.arange(-60, 60) / 2, noise.uniform(-300, 300, 40), noise.uniform(-20, 20, 60)])
    return (noise.permutation(steps)[:120].reshape(2, 60) * scale).astype(np.float32)


@pytest.mark.parametrize("bounds", RANGES)
@pytest.mark.parametrize("scale", [0.037, 0.25, 3.3e-6, 411.0])
def test_every_range(graphs, noise, bounds, scale):
    feeds = {"x": values(noise, scale)}
    ran = graphs.run(quantizer(graphs, bounds, scale), LowerBitwidth(), feeds)
    clip = ["Clip"] if bounds != (-128, 127) else []
    assert ran.ops == [*clip, "QuantizeLinear", "DequantizeLinear"]
    assert [node.name for node in ran.model.graph] == [f"conv.input_quantizer/{op}" for op in ran.ops]
    quantize, dequantize = ran.nodes("QuantizeLinear")[0], ran.nodes("DequantizeLinear")[0]
    assert quantize.inputs[1] is dequantize.inputs[1]
    assert quantize.inputs[1].const_value.numpy() == np.float32(scale)
    assert quantize.inputs[2].const_value.numpy() == np.int8(0)
    assert quantize.inputs[2].const_value.numpy().dtype == np.int8
    codes = ran.at("conv.input_quantizer/QuantizeLinear", feeds)
    assert codes.dtype == np.int8
    np.testing.assert_array_equal(
        codes, fake_quantize_codes(feeds["x"], np.float32(scale), np.float32(0), *bounds)
    )
    assert ran.report.touched == ["conv.input_quantizer"]
    ran.assert_equal()


@pytest.mark.parametrize(("bounds", "low", "high"), [((-8, 127), True, False), ((-128, 7), False, True)])
def test_a_bound_where_int8_ends_needs_no_clip(graphs, noise, bounds, low, high):
    ran = graphs.run(quantizer(graphs, bounds), LowerBitwidth(), {"x": values(noise)})
    (clip,) = ran.nodes("Clip")
    assert [clip.inputs[1] is not None, len(clip.inputs) > 2 and clip.inputs[2] is not None] == [low, high]
    ran.assert_equal()


def test_a_half_precision_body_is_left_and_entered_by_casts(graphs, noise):
    feeds = {"x": values(noise).astype(np.float16)}
    ran = graphs.run(quantizer(graphs, (-8, 7), body="float16"), LowerBitwidth(), feeds)
    assert ran.ops == ["Cast", "Clip", "QuantizeLinear", "DequantizeLinear", "Cast"]
    codes = ran.at("conv.input_quantizer/QuantizeLinear", feeds)
    wide = feeds["x"].astype(np.float32)
    np.testing.assert_array_equal(codes, fake_quantize_codes(wide, np.float32(0.037), np.float32(0), -8, 7))
    ran.assert_equal()


def test_all_readers_follow(graphs, noise):
    body = "\n".join(
        [
            graphs.quantize("a.input_quantizer", "xq", "x, s, z", -8, 7),
            '["a/Relu"] y1 = Relu(xq)',
            '["b/Add"] y2 = Add(xq, xq)',
        ]
    )
    constants = {"s": np.float32([0.1]), "z": np.float32([0])}
    model = graphs.model_of("float[2,60] x", "float[2,60] y1, float[2,60] y2", body, constants)
    ran = graphs.run(model, LowerBitwidth(), {"x": values(noise)})
    assert ran.ops == ["Clip", "QuantizeLinear", "DequantizeLinear", "Relu", "Add"]
    ran.assert_equal()


@pytest.mark.parametrize(
    ("constants", "bounds", "row"),
    [
        ({"s": [0.1, 0.2], "z": [0, 0]}, (-128, 127), ", row"),
        ({"s": [0.1], "z": [3]}, (-128, 127), ""),
        ({"s": [0.1], "z": [0]}, (0, 255), ""),
        ({"s": [0.1], "z": [0]}, (-129, 127), ""),
    ],
    ids=["step rows", "zero point", "above INT8", "below INT8"],
)
def test_what_earlier_passes_should_have_rewritten_is_refused(graphs, noise, constants, bounds, row):
    text = graphs.quantize("conv.input_quantizer", "y", f"x, s, z{row}", *bounds)
    arrays = {name: np.float32(array) for name, array in constants.items()}
    model = graphs.model_of("float[2,60] x, int64[1] row", "float[2,60] y", text, arrays)
    with pytest.raises(
        GraphPassError, match=r"conv.input_quantizer: .*run lower-zero-point and lower-timestep-scale first"
    ):
        graphs.run(model, LowerBitwidth(), {"x": values(noise), "row": np.array([1])})


@given(
    x=st.floats(-1e5, 1e5, width=32),
    scale=st.floats(2.0**-30, 2.0**12, width=32),
    low=st.integers(-128, 0),
    high=st.integers(0, 127),
)
def test_the_identity(x, scale, low, high):
    """``rint(clip(x, low s, high s) / s) = clip(rint(x / s), low, high)`` for every FP32 x and s."""
    value, step = np.float32(x), np.float32(scale)
    clipped = np.clip(value, np.float32(low) * step, np.float32(high) * step)
    assert np.rint(clipped / step) == np.clip(np.rint(value / step), low, high)


@given(code=st.integers(-128, 127), scale=st.floats(2.0**-30, 2.0**12, width=32), nudge=st.integers(-2, 2))
def test_the_identity_at_the_bounds_themselves(code, scale, nudge):
    """Where random numbers seldom fall: the bound, half a step beside it, and their FP32 neighbours."""
    step = np.float32(scale)
    for offset in (-0.5, 0.0, 0.5):
        value = np.float32(np.float64(code + offset) * np.float64(step))
        for _ in range(abs(nudge)):
            value = np.nextafter(value, np.float32(np.inf if nudge > 0 else -np.inf))
        for low, high in ((code, 127), (-128, code)):
            clipped = np.clip(value, np.float32(low) * step, np.float32(high) * step)
            assert np.rint(clipped / step) == np.clip(np.rint(value / step), low, high)
