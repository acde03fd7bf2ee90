"""Graphs that an opset or a parser does not take are refused by layer before anything is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qdexport.core.target import Target, target_named
from qdexport.emit.legal import check_legal, illegal_nodes
from qdexport.emit.onnx_file import emit
from qdexport.errors import EmitError

JETSON, RTX, ORT = (target_named(name) for name in ("tensorrt-10", "tensorrt-rtx", "onnxruntime"))
INT8 = {"s": np.float32([0.5]), "z": np.int8([0])}


def graph(text: str, constants: dict[str, np.ndarray]) -> ir.Model:
    """Nodes in ONNX text; element types are inferred as far as onnx can."""
    header = '<ir_version: 11, opset_import: ["" : 23, "trt" : 1, "com.microsoft" : 1]>'
    proto = onnx.parser.parse_model(f"{header}\ng (float[2, 8] x) => (float[2, 8] y) {{\n{text}\n}}")
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def found(model: ir.Model, target: Target) -> list[str]:
    return list(illegal_nodes(model, target))


QDQ = (
    '["conv.input_quantizer/QuantizeLinear"] q = QuantizeLinear(x, s, z)\n'
    '["conv.input_quantizer/DequantizeLinear"] y = DequantizeLinear(q, s, z)'
)


@pytest.mark.parametrize("target", [JETSON, RTX, ORT])
def test_the_portable_form_is_legal_everywhere(target: Target) -> None:
    for opset in range(target.opsets[0], target.opsets[1] + 1):
        assert found(graph(QDQ, INT8), target.with_opset(opset)) == []


def test_an_opset_that_lacks_something_names_the_layer() -> None:
    model = graph('["norm/RMSNormalization"] y = RMSNormalization(x, s)', {"s": np.ones(8, np.float32)})
    assert found(model, ORT.with_opset(22)) == ["norm/RMSNormalization: opset 22 has no RMSNormalization"]
    assert found(model, RTX.with_opset(23)) == []
    blocked = QDQ.replace("DequantizeLinear(q", "DequantizeLinear<block_size: int = 4>(q")
    assert found(graph(blocked, INT8), ORT.with_opset(20)) == [
        "conv.input_quantizer/DequantizeLinear: DequantizeLinear of opset 20 has no attribute block_size"
    ]


def test_int4_needs_opset_21() -> None:
    tensor = helper.make_tensor("codes", TensorProto.INT4, [8, 2], [1] * 16)
    node = helper.make_node("DequantizeLinear", ["codes", "s"], ["w"], name="to_q/DequantizeLinear")
    product = helper.make_node("MatMul", ["x", "w"], ["y"], name="to_q/MatMul")
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, d) for n, d in (("x", [2, 8]), ("y", [2, 2]))]
    scale = numpy_helper.from_array(np.float32(1), "s")
    proto = helper.make_graph([node, product], "g", infos[:1], infos[1:], [tensor, scale])
    model = ir.from_proto(helper.make_model(proto, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
    assert found(model, RTX) == []
    (problem,) = found(model, RTX.with_opset(20))
    assert problem == "to_q/DequantizeLinear: DequantizeLinear of opset 20 does not take INT4 (codes)"


@pytest.mark.parametrize(
    ("text", "constants", "problem"),
    [
        (QDQ, {**INT8, "z": np.int8([3])}, "the zero point is not 0"),
        (QDQ, {**INT8, "z": np.uint8([0])}, "does not quantize to UINT8"),
        (QDQ, {**INT8, "s": np.float32([-1])}, "a scale is 0 or negative"),
        (QDQ.replace(", s, z)", ", s)"), {"s": INT8["s"]}, "does not quantize to UINT8"),
        (QDQ, {"s": np.ones(8, np.float32), "z": np.zeros(1, np.int8)}, "1 zero points beside 8 scales"),
        (QDQ, {"s": np.ones(8, np.float32), "z": np.zeros(8, np.int8)}, "an activation has 8 scales; use one"),
        ('["a/Abs"] s = ReduceMax<keepdims = 0>(x)\n' + QDQ, {"z": np.int8(0)}, "the scale s is computed"),
        ('["n/Det"] d = Det(m)\n["n/Add"] y = Add(x, d)', {"m": np.eye(2, dtype=np.float32)}, "has no Det"),
        (
            '["n/Cast"] d = Cast<to = 11>(x)\n["n/Add"] e = Add(d, d)\n["n/Cast_1"] y = Cast<to = 1>(e)',
            {},
            "has no Add of DOUBLE",
        ),
        (
            QDQ.replace("DequantizeLinear(q", "DequantizeLinear(g").replace("\n", '\n["n/Gather"] g = Gather(q, i)\n'),
            {**INT8, "i": np.int64([0, 1])},
            "has no Gather of INT8",
        ),
        ('["n/Shape"] a = Shape(x)\n["n/Sum"] y = ReduceSum(x, a)', {}, "wants a constant as input 1 of ReduceSum"),
    ],
)
def test_what_no_tensorrt_takes(text: str, constants: dict[str, np.ndarray], problem: str) -> None:
    model = graph(text, constants)
    for target in (JETSON, RTX):
        assert any(problem in item for item in found(model, target)), found(model, target)


def test_what_tensorrt_10_does_not_take_and_11_does() -> None:
    typed = QDQ.replace("DequantizeLinear(q", "DequantizeLinear<output_dtype: int = 1>(q")
    named = "conv.input_quantizer/DequantizeLinear: "
    assert found(graph(typed, INT8), RTX.with_opset(23)) == []
    (problem,) = found(graph(typed, INT8), JETSON)
    assert problem == f"{named}DequantizeLinear of opset 20 has no attribute output_dtype"
    custom = '["w/TRT_INT4DequantizeLinear"] y = trt.TRT_FP4DynamicQuantize(x)'
    assert found(graph(custom, {}), RTX) == []
    assert found(graph(custom, {}), JETSON) == [
        "w/TRT_INT4DequantizeLinear: the ONNX parser of TensorRT 10.3 has no TRT_FP4DynamicQuantize"
    ]
    foreign = '["act/Gelu"] y = com.microsoft.Gelu(x)'  # the parser would take it for ONNX's own
    assert found(graph(foreign, {}), RTX) == ["act/Gelu: the ONNX parser of TensorRT 11 has no com.microsoft::Gelu"]


def test_nothing_is_written(tmp_path: Path) -> None:
    model = graph(QDQ, {**INT8, "z": np.int8([3])})
    message = r"not legal for target tensorrt-10, opset 20: conv.input_quantizer/Q.*: the zero point is not 0; conv"
    with pytest.raises(EmitError, match=message):
        emit(model, tmp_path / "onnx", JETSON, {})
    assert not (tmp_path / "onnx").exists()
    check_legal(graph(QDQ, INT8), JETSON)


@pytest.mark.parametrize(("opset", "ir_version"), [(20, 9), (21, 10), (22, 10), (23, 11)])
def test_every_opset_has_its_file_format(tmp_path: Path, opset: int, ir_version: int) -> None:
    file = emit(graph(QDQ, INT8), tmp_path / "onnx", RTX.with_opset(opset), {})
    proto = onnx.load(file.path)
    assert (proto.opset_import[0].version, proto.ir_version) == (opset, ir_version)
    onnx.checker.check_model(proto, full_check=True)
