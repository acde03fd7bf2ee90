"""Typed reads name the node of what is missing."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qdexport.errors import GraphPassError
from qdexport.graph.dialect import LAYER_KEY
from qdexport.graph.query import (
    compute_consumers,
    const_of,
    const_or_none,
    dtype_of,
    graph_of,
    input_of,
    int_attr,
    ints_attr,
    is_fake_quantize,
    module_of,
    only_consumer,
    shape_of,
    value_name,
    weight_source,
)

TEXT = """<ir_version: 10, opset_import: ["" : 21, "qdexport" : 1]>
g (float[1,2,4,4] x, float[3,4] a) => (float[1,3,4,4] y, float[3,3] p)
<float[1] s = {0.1}, float[1] z = {0}, float[3,2,1,1] w = {1, 2, 3, 4, 5, 6},
 float[3,4] v = {1,2,3,4,5,6,7,8,9,10,11,12}>
{
  ["conv.input_quantizer/FakeQuantize"] q =
      qdexport.FakeQuantize<qmin: int = -128, qmax: int = 127, axis: int = -1>(x, s, z)
  ["conv/Conv"] y = Conv<kernel_shape: ints = [1, 1]>(q, w)
  ["l.weight_quantizer/FakeQuantize"] vq =
      qdexport.FakeQuantize<qmin: int = -8, qmax: int = 7, axis: int = 0>(v, s, z)
  ["l/Transpose"] vt = Transpose<perm: ints = [1, 0]>(vq)
  ["l/Cast"] vc = Cast<to: int = 1>(vt)
  ["l/MatMul"] p = MatMul(a, vc)
  ["c/Constant"] k = Constant<value_ints: ints = [3, 4]>()
}"""


@pytest.fixture
def nodes() -> dict[str, ir.Node]:
    return {node.name or "": node for node in ir.from_onnx_text(TEXT).graph}


def test_constants_are_initializers_and_constant_nodes(nodes: dict[str, ir.Node]) -> None:
    np.testing.assert_array_equal(const_of(nodes["conv/Conv"], 1).ravel(), [1, 2, 3, 4, 5, 6])
    np.testing.assert_array_equal(const_or_none(nodes["c/Constant"].outputs[0]), [3, 4])
    assert const_or_none(nodes["conv/Conv"].outputs[0]) is None
    assert const_or_none(None) is None


def test_what_is_missing_is_named(nodes: dict[str, ir.Node]) -> None:
    conv = nodes["conv/Conv"]
    with pytest.raises(GraphPassError, match=r"conv/Conv \(Conv\): input 0, q, is not constant"):
        const_of(conv, 0)
    with pytest.raises(GraphPassError, match=r"conv/Conv \(Conv\) has no input 2"):
        input_of(conv, 2)
    with pytest.raises(GraphPassError, match=r"conv/Conv \(Conv\) has no attribute 'group'"):
        int_attr(conv, "group")
    assert int_attr(conv, "group", 1) == 1
    assert ints_attr(conv, "kernel_shape") == (1, 1)
    assert ints_attr(conv, "pads", (0, 0)) == (0, 0)


def test_unknown_types_and_shapes_are_refused(nodes: dict[str, ir.Node]) -> None:
    value = nodes["l/Transpose"].outputs[0]  # the text says nothing about inner values
    with pytest.raises(GraphPassError, match="the type of vt is unknown; capture the model again"):
        dtype_of(value)
    with pytest.raises(GraphPassError, match="the shape of vt is unknown; capture the model again"):
        shape_of(value)
    assert dtype_of(nodes["conv/Conv"].outputs[0]) == ir.DataType.FLOAT
    assert list(shape_of(nodes["conv/Conv"].outputs[0])) == [1, 3, 4, 4]


def test_names_are_printable(nodes: dict[str, ir.Node]) -> None:
    assert value_name(None) == "(absent)"
    assert value_name(ir.Value()) == "(unnamed)"
    assert value_name(nodes["conv/Conv"].outputs[0]) == "y"
    assert module_of(nodes["conv/Conv"]) == ""
    nodes["conv/Conv"].metadata_props[LAYER_KEY] = "conv"
    assert module_of(nodes["conv/Conv"]) == "conv"


def test_a_node_outside_a_graph_is_refused() -> None:
    with pytest.raises(GraphPassError, match="lone is not part of the main graph"):
        graph_of(ir.node("Relu", [ir.Value(name="x")], name="lone"))


def test_quantizers_and_readers(nodes: dict[str, ir.Node]) -> None:
    quantizer = nodes["conv.input_quantizer/FakeQuantize"]
    assert is_fake_quantize(quantizer)
    assert not is_fake_quantize(nodes["conv/Conv"])
    assert not is_fake_quantize(None)
    assert only_consumer(quantizer.outputs[0]) is nodes["conv/Conv"]
    assert only_consumer(nodes["conv/Conv"].outputs[0]) is None  # a graph output
    assert list(compute_consumers(quantizer.outputs[0])) == [nodes["conv/Conv"]]
    assert list(compute_consumers(nodes["l/Cast"].outputs[0])) == []  # the second operand


def test_the_source_of_a_weight(nodes: dict[str, ir.Node]) -> None:
    assert weight_source(nodes["l/MatMul"]) is nodes["l.weight_quantizer/FakeQuantize"]
    assert weight_source(nodes["conv/Conv"]) is None
