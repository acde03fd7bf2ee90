"""Compute types of layers, read from an ONNX file."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qdexport.core.spec import LayerPlan, QuantSpec
from qdexport.emit.coverage import onnx_coverage

IN, OUT = 8, 6
NARROW = {"int8": np.int8, "int4": ml_dtypes.int4}


def plan(name, *, folded=False, splits=()):
    spec = QuantSpec(bits=8)
    kind = "conv" if splits else "linear"
    return LayerPlan(name=name, kind=kind, weight=spec, activation=spec, folded=folded, splits=splits)


def linear_file(path, stored, *, quantized=True, weight_cast=None, input_cast=None, out=TensorProto.FLOAT):
    """``x -> Q -> DQ [-> Cast] -> MatMul`` with a weight ``codes -> DQ [-> Cast]``."""
    arrays = {
        "codes": np.ones((IN, OUT)).astype(NARROW[stored]), "scale": np.ones(OUT, np.float32),
        "zero": np.zeros(OUT).astype(NARROW[stored]), "sx": np.float32(0.1), "zx": np.int8(0),
    }  # fmt: skip
    nodes = [helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["w"], axis=1)]
    x, w = "x", "w"
    if quantized:
        nodes.append(helper.make_node("QuantizeLinear", ["x", "sx", "zx"], ["q"]))
        nodes.append(helper.make_node("DequantizeLinear", ["q", "sx", "zx"], ["dq"]))
        x = "dq"
    if weight_cast:
        nodes.append(helper.make_node("Cast", [w], ["wc"], to=weight_cast))
        w = "wc"
    if input_cast:
        nodes.append(helper.make_node("Cast", [x], ["xc"], to=input_cast))
        x = "xc"
    nodes.append(helper.make_node("MatMul", [x, w], ["y"], name="l/MatMul"))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, IN])],
        [helper.make_tensor_value_info("y", out, [2, OUT])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("stored", NARROW)
def test_both_operands_are_quantized(tmp_path, stored):
    path = linear_file(tmp_path / "m.onnx", stored)
    assert onnx_coverage(path, [plan("l"), plan("gone"), plan("t", folded=True)]) == {
        "l": stored,
        "gone": "missing",
        "t": "folded",
    }


@pytest.mark.parametrize("stored", NARROW)
def test_weights_alone_compute_in_floating_point(tmp_path, stored):
    assert onnx_coverage(linear_file(tmp_path / "m.onnx", stored, quantized=False), [plan("l")]) == {"l": "fp32"}


@pytest.mark.parametrize(("stored", "found"), [("int8", "int8"), ("int4", "fp16")])
def test_int4_weights_behind_a_cast_are_none(tmp_path, stored, found):
    """TensorRT-RTX passes casts of INT8 pairs over, and multiplies floats where INT4 codes are cast."""
    half = TensorProto.FLOAT16
    path = linear_file(tmp_path / "m.onnx", stored, weight_cast=half, input_cast=half, out=half)
    assert onnx_coverage(path, [plan("l")]) == {"l": found}


def test_parts_of_a_split_layer(tmp_path):
    path = linear_file(tmp_path / "m.onnx", "int8")
    model = onnx.load(path)
    model.graph.node[-1].name = "l#0/MatMul"
    onnx.save(model, path)
    assert onnx_coverage(path, [plan("l", splits=(4, 4))]) == {"l#0": "int8", "l#1": "missing"}


def test_every_layer_of_a_merged_product(tmp_path):
    path = linear_file(tmp_path / "m.onnx", "int8")
    model = onnx.load(path)
    model.graph.node[-1].name = "a.to_q+a.to_k/MatMul"
    onnx.save(model, path)
    assert onnx_coverage(path, [plan("a.to_q"), plan("a.to_k")]) == {"a.to_q": "int8", "a.to_k": "int8"}
