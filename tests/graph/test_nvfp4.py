"""Narrow floating-point numbers: PyTorch, numpy, onnx's reference evaluator and ONNX Runtime agree bit for bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper

from qdexport.check.session import reference_session
from qdexport.graph.evaluate import evaluate
from qdexport.graph.narrow_floats import e2m1_round, e4m3_round, nvfp4_codes
from qdexport.graph.nvfp4 import executable, has_nvfp4
from qdexport.quant import affine


def every(dtype):
    """All finite numbers of a type, the middles between neighbours (ties), and numbers beyond the largest."""
    codes = np.arange(256, dtype=np.uint8).view(dtype) if dtype == ml_dtypes.float8_e4m3fn else None
    numbers = codes.astype(np.float32) if codes is not None else np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    numbers = np.unique(np.concatenate([numbers, -numbers]))
    numbers = numbers[np.isfinite(numbers)]
    middles = (numbers[1:] + numbers[:-1]) / 2
    beyond = np.float32([1e4, -1e4, numbers.max() * 1.06])
    near = np.nextafter(middles, np.float32(np.inf))
    return np.concatenate([numbers, middles, near, beyond]).astype(np.float32)


@pytest.mark.parametrize(
    ("dtype", "in_numpy", "in_torch"),
    [
        (ml_dtypes.float8_e4m3fn, e4m3_round, affine.e4m3_round),
        (ml_dtypes.float4_e2m1fn, e2m1_round, affine.e2m1_round),
    ],
    ids=["e4m3", "e2m1"],
)
def test_rounding_at_every_tie(dtype, in_numpy, in_torch):
    values = every(dtype)
    largest = 448 if dtype == ml_dtypes.float8_e4m3fn else 6
    expected = np.clip(values, -largest, largest).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(in_numpy(values), expected)
    np.testing.assert_array_equal(in_torch(torch.from_numpy(values)).numpy(), expected)


def test_bits_of_e2m1():
    numbers = affine.e2m1_round(torch.linspace(-7, 7, 141))
    expected = numbers.numpy().astype(ml_dtypes.float4_e2m1fn).view(np.int8)
    np.testing.assert_array_equal(affine.e2m1_bits(numbers).numpy(), (expected << 4) >> 4)


@pytest.fixture
def activation(noise):
    """Blocks of every size: zeros, tiny numbers whose scale rounds to 0, and numbers beyond the calibrated range."""
    x = noise.normal(size=(2, 5, 64)).astype(np.float32)
    x[0, 0] = 0
    x[0, 1, :16] *= 1e-9
    x[1, 2] *= 100
    return x


def test_codes_and_scales_of_blocks(activation):
    scale = np.float32([4 / (6 * 448)])
    codes, narrow = nvfp4_codes(activation, scale)
    x, g = torch.from_numpy(activation), torch.from_numpy(scale)
    np.testing.assert_array_equal(affine.nvfp4_codes(x, g).numpy(), codes)
    np.testing.assert_array_equal(affine.block_scales(x, g)[..., 0].numpy(), narrow)
    assert narrow[0, 0, 0] == narrow[0, 1, 0] == 0
    assert narrow[1, 2].max() == 448
    assert bool(affine.nvfp4_fake_quantize(x, g).isfinite().all())
    wide = np.repeat(narrow * scale, 16, axis=-1)
    np.testing.assert_array_equal(affine.nvfp4_fake_quantize(x, g).numpy(), codes * wide)


def product(noise, out="y"):
    """``x [-> NVFP4] -> MatMul`` with an NVFP4 weight, as the compiler writes it."""
    codes, narrow = nvfp4_codes(noise.normal(size=(8, 64)).astype(np.float32), np.float32([0.001]))
    arrays = {
        "xs": np.float32(4 / (6 * 448)),
        "ws": np.float32(0.001),
        "wq": codes.astype(ml_dtypes.float4_e2m1fn),
        "wb": narrow.astype(ml_dtypes.float8_e4m3fn),
    }
    blocks = {"axis": -1, "block_size": 16}
    dynamic = {"domain": "trt", "scale_type": int(TensorProto.FLOAT8E4M3FN), **blocks}
    nodes = [
        helper.make_node("TRT_FP4DynamicQuantize", ["x", "xs"], ["q", "b"], name="q/Q", **dynamic),
        helper.make_node("DequantizeLinear", ["b", "xs"], ["bs"], name="q/DQ"),
        helper.make_node("DequantizeLinear", ["q", "bs"], ["xd"], name="q/DQ_1", **blocks),
        helper.make_node("DequantizeLinear", ["wb", "ws"], ["wd"], name="w/DQ"),
        helper.make_node("DequantizeLinear", ["wq", "wd"], ["w"], name="w/DQ_1", **blocks),
        helper.make_node("Transpose", ["w"], ["wt"], name="l/Transpose", perm=[1, 0]),
        helper.make_node("MatMul", ["xd", "wt"], ["y"], name="l/MatMul"),
    ]
    kinds = {"y": (TensorProto.FLOAT, [2, 5, 8]), "q": (TensorProto.FLOAT4E2M1, [2, 5, 64])}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 5, 64])],
        [helper.make_tensor_value_info(out, *kinds[out])],
        [ir.to_proto(ir.tensor(array, name=name)) for name, array in arrays.items()],
        value_info=[helper.make_tensor_value_info("q", *kinds["q"])] if out == "y" else [],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("trt", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=11)


def test_the_reference_runs_what_onnx_runtime_has_no_operator_for(noise, activation):
    """Written out it has the numbers of the custom operator in onnx's reference evaluator."""
    model = product(noise)
    exact = evaluate(model, {"x": activation})["y"]
    (answer,) = reference_session(model.SerializeToString()).run(None, {"x": activation})
    # equal operands: FP32 sums of 64 products, in another order (Higham 2002, section 3.1)
    np.testing.assert_allclose(answer, exact, rtol=0, atol=70 * 2.0**-24 * np.abs(exact).max() * 8)
    plain = ir.from_proto(model)
    assert has_nvfp4(plain)
    executable(plain)
    assert not has_nvfp4(plain)
    assert "trt" not in plain.graph.opset_imports


def test_codes_that_are_outputs_become_numbers(noise, activation):
    (codes,) = reference_session(product(noise, "q").SerializeToString()).run(None, {"x": activation})
    assert codes.dtype == np.float32
    np.testing.assert_array_equal(codes, nvfp4_codes(activation, np.float32([4 / (6 * 448)]))[0])
