"""NVFP4 quantizers become constants and TensorRT's dynamic quantizer, bit for bit."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qdexport.errors import GraphPassError
from qdexport.graph.narrow_floats import nvfp4_codes
from qdexport.passes.lower_nvfp4 import LowerNvfp4

SCALE = {"s": np.float32([0.0015]), "ws": np.float32([0.0007]), "z": np.float32([0])}


def linear(graphs, constants, body="float", width=32):
    """``x -> NVFP4 -> MatMul`` with a weight ``[8, width]`` that is quantized, then transposed as torch does."""
    text = "\n".join(
        [
            graphs.quantize("to_q.input_quantizer", "xq", "x, s, z", -6, 6, form="nvfp4"),
            graphs.quantize("to_q.weight_quantizer", "wq", "w, ws, z", -6, 6, form="nvfp4"),
            '["to_q/Transpose"] wt = Transpose<perm: ints = [1,0]>(wq)',
            '["to_q/MatMul"] y = MatMul(xq, wt)',
        ]
    )
    return graphs.model_of(f"{body}[2,3,{width}] x", f"{body}[2,3,8] y", text, {**SCALE, **constants})


@pytest.mark.parametrize(("body", "dtype"), [("float", np.float32), ("float16", np.float16)])
def test_a_linear_layer(graphs, noise, body, dtype):
    weight = noise.normal(size=(8, 32)).astype(dtype)
    x = noise.normal(size=(2, 3, 32)).astype(dtype)
    x[0, 0, :16] = 0
    ran = graphs.run(linear(graphs, {"w": weight}, body), LowerNvfp4(), {"x": x})
    ran.assert_equal()
    casts = ["Cast"] if dtype == np.float16 else []
    one = ["DequantizeLinear", "DequantizeLinear", *casts]
    assert ran.ops == ["TRT_FP4DynamicQuantize", *one, *one, "Transpose", "MatMul"]
    assert ran.report.touched == ["to_q.input_quantizer", "to_q.weight_quantizer"]
    (quantize,) = ran.nodes("TRT_FP4DynamicQuantize")
    assert [(value.dtype, list(value.shape)) for value in quantize.outputs] == [
        (ir.DataType.FLOAT4E2M1, [2, 3, 32]),
        (ir.DataType.FLOAT8E4M3FN, [2, 3, 2]),
    ]
    last = ran.node("to_q.weight_quantizer/DequantizeLinear_1")
    codes, narrow = nvfp4_codes(weight, SCALE["ws"])
    np.testing.assert_array_equal(last.inputs[0].const_value.numpy().astype(np.float32), codes)
    stored = last.inputs[1].producer().inputs[0].const_value
    assert stored.dtype == ir.DataType.FLOAT8E4M3FN
    np.testing.assert_array_equal(stored.numpy().astype(np.float32), narrow)


def test_a_width_that_has_no_blocks_is_refused(graphs):
    model = linear(graphs, {"w": np.zeros((8, 24), np.float32)}, width=24)
    with pytest.raises(GraphPassError, match=r"to_q\.input_quantizer: the last axis, 24, is no multiple of 16"):
        graphs.run(model, LowerNvfp4(), [])


def test_a_scale_per_step_is_refused(graphs):
    text = graphs.quantize("to_q.input_quantizer", "y", "x, s, z, row", -6, 6, form="nvfp4")
    constants = {"s": np.float32([1, 2]), "z": np.float32([0, 0]), "row": np.int64([1])}
    model = graphs.model_of("float[2,32] x", "float[2,32] y", text, constants)
    with pytest.raises(GraphPassError, match=r"to_q\.input_quantizer: NVFP4 has one scale per tensor, not 2"):
        graphs.run(model, LowerNvfp4(), [])
