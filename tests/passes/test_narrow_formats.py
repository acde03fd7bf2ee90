"""FP8 and weights in blocks through the passes that fold weights and lower activations."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qdexport.core.spec import LayerPlan, QuantSpec
from qdexport.graph.evaluate import fake_quantize_codes
from qdexport.passes.fold_adapters import FoldAdapters
from qdexport.passes.lower_bitwidth import LowerBitwidth
from qdexport.passes.lower_timestep_scale import LowerTimestepScale
from qdexport.passes.lower_zero_point import LowerZeroPoint

BLOCK = 16


def blocked(graphs, noise, bits, body, dtype):
    """A linear layer whose weight ``[4, 64]`` has a scale for each 16 inputs; as torch exports it."""
    half = noise.uniform(1e-4, 2e-2, (1, 4, 4)).astype(np.float16)
    scale = half.astype(np.float32)
    steps = noise.integers(-(2**bits), 2**bits, (4, 64)) / 2  # ties, and numbers out of range
    weight = (steps * np.repeat(scale[0], BLOCK, axis=1)).astype(dtype)
    text = "\n".join(
        [
            graphs.quantize("l.weight_quantizer", "wq", "w, s, z", -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, axis=1),
            '["l/Transpose"] wt = Transpose<perm: ints = [1,0]>(wq)',
            '["l/MatMul"] y = MatMul(x, wt)',
        ]
    )
    constants = {"w": weight, "s": scale, "z": np.zeros_like(scale)}
    return graphs.model_of(f"{body}[64,64] x", f"{body}[64,4] y", text, constants), weight, scale[0]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("body", "dtype"), [("float", np.float32), ("float16", np.float16)])
def test_a_weight_in_blocks(graphs, noise, bits, body, dtype):
    """Codes lie as the product reads them; an FP16 body has FP16 scales and no Cast, and equal numbers."""
    model, weight, scale = blocked(graphs, noise, bits, body, dtype)
    model.graph.opset_imports[""] = 20  # as captured: blocks are of 21
    spec = QuantSpec(bits=bits, granularity="per_block", block_size=BLOCK)
    plan = LayerPlan(name="l", kind="linear", weight=spec, activation=None)
    context = dataclasses.replace(graphs.context_of(body=body), layers=(plan,), int4_weight_only=True)
    # one input at a time: BLAS is given the weight in another layout, and may add in another order
    feeds = {"x": np.eye(64, dtype=dtype)}
    ran = graphs.run(model, FoldAdapters(), feeds, context)
    ran.assert_equal()
    assert ran.ops == ["DequantizeLinear", "MatMul"]
    assert ran.model.graph.opset_imports[""] == 21
    (node,) = ran.nodes("DequantizeLinear")
    assert (node.attributes["axis"].as_int(), node.attributes["block_size"].as_int()) == (0, BLOCK)
    codes, stored, zero = (value.const_value for value in node.inputs)
    assert codes.dtype == zero.dtype == (ir.DataType.INT4 if bits == 4 else ir.DataType.INT8)
    np.testing.assert_array_equal(stored.numpy(), scale.T.astype(dtype), strict=True)
    wide = np.repeat(scale, BLOCK, axis=1)
    expected = fake_quantize_codes(weight, wide, np.float32(0), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    np.testing.assert_array_equal(codes.numpy().astype(np.float32), expected.T)


def fp8_layer(graphs, noise, quantizer):
    scale = np.float32([[0.01, 0.3, 2.0]])
    text = "\n".join(
        [
            quantizer,
            graphs.quantize("l.weight_quantizer", "wq", "w, ws, wz", -448, 448, axis=0, form="fp8"),
            '["l/Transpose"] wt = Transpose<perm: ints = [1,0]>(wq)',
            '["l/MatMul"] y = MatMul(xq, wt)',
        ]
    )
    weight = (noise.normal(size=(3, 8)) * 300 * scale.T).astype(np.float32)
    return text, {"w": weight, "ws": scale, "wz": np.zeros_like(scale)}


def test_fp8_weights_and_activations(graphs, noise):
    """Saturation is E4M3's own: there is no Clip, and zero points and carriers leave it alone."""
    quantizer = graphs.quantize("l.input_quantizer", "xq", "x, s, z", -448, 448, form="fp8")
    text, constants = fp8_layer(graphs, noise, quantizer)
    constants |= {"s": np.float32([0.004]), "z": np.float32([0])}
    x = np.diag(noise.normal(size=8)).astype(np.float32)  # one input at a time, as above
    x[0] *= 100
    model = graphs.model_of("float[8,8] x", "float[8,3] y", text, constants)
    assert not graphs.run(model, LowerZeroPoint(), {"x": x}).report.touched
    ran = graphs.run(model, FoldAdapters(), {"x": x})
    ran.assert_equal()
    weight = ran.node("l.weight_quantizer/DequantizeLinear").inputs[0].const_value
    expected = np.clip(constants["w"] / constants["ws"].T, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(weight.numpy().view(np.uint8), expected.T.view(np.uint8))
    ran = graphs.run(model, LowerBitwidth(), {"x": x})
    ran.assert_equal()
    assert ran.ops == ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul"]
    codes = ran.at("l.input_quantizer/QuantizeLinear", {"x": x})
    expected = np.clip(x / np.float32(0.004), -448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(codes.view(np.uint8), expected.view(np.uint8))


def test_fp8_with_a_scale_per_step(graphs, noise):
    """The unit-scale form has the codes of x / s; powers of two make its sums exact."""
    quantizer = graphs.quantize("l.input_quantizer", "xq", "x, s, z, row", -448, 448, form="fp8")
    text, constants = fp8_layer(graphs, noise, quantizer)
    constants |= {"s": np.float32([0.25, 0.5]), "z": np.float32([0, 0]), "ws": np.float32([[0.5, 1, 2]])}
    constants["w"] = noise.integers(-15, 16, (3, 8)).astype(np.float32)
    feeds = [{"x": noise.integers(-30, 31, (5, 8)).astype(np.float32), "row": np.int64([row])} for row in (0, 1)]
    model = graphs.model_of("float[5,8] x, int64[1] row", "float[5,3] y", text, constants)
    graphs.run(model, FoldAdapters(), feeds)
    ran = graphs.run(model, LowerTimestepScale(), feeds)
    ran.assert_equal()
    ran = graphs.run(model, LowerBitwidth(), feeds)
    ran.assert_equal()
    assert ran.node("l.input_quantizer/QuantizeLinear").outputs[0].dtype == ir.DataType.FLOAT8E4M3FN
    assert "Clip" not in ran.ops
