"""Constants of which a part is read are cut to it; what is computed stays the same."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper, parser
from onnx.reference import ReferenceEvaluator

from qdexport.capture.constants import crop_constants

TABLE = (np.arange(24 * 36 * 8) % 999).astype(np.float16).reshape(1, 24 * 36, 8)


def graph(body: str) -> ir.Model:
    text = f"""<ir_version: 10, opset_import: ["" : 20]>
    network (float16[N, 4, 6, 8] x, int64[1] start) => (float16[N, 4, 6, 8] y)
    <int64[4] square = {{1, 24, 36, -1}}, int64[1] a = {{2}}, int64[1] b = {{6}}, int64[1] one = {{1}},
     int64[1] two = {{2}}, int64[1] c = {{-7}},
     int64[1] d = {{9223372036854775807}}, int64[1] f = {{10}}> {{ {body} }}"""
    model = parser.parse_model(text)
    model.graph.initializer.append(numpy_helper.from_array(TABLE, "table"))
    return ir.from_proto(model)


def run(model: ir.Model) -> np.ndarray:
    x = np.random.default_rng(0).standard_normal((2, 4, 6, 8)).astype(np.float16)
    feed = {"x": x, "start": np.array([3])}
    return np.asarray(ReferenceEvaluator(ir.to_proto(model)).run(None, feed)[0])


CROPPED = "s = Reshape(table, square) p = Slice(s, a, b, one) q = Slice(p, c, d, two, one) r = Slice(q, one, d, two)"


# a start that is known at run time
LATE = (
    "s = Reshape(table, square) e = Add(start, one) p = Slice(s, start, e, two) q = Slice(p, a, b, one)"
    " m = ReduceMax <keepdims = 0> (q) y = Mul(x, m)"
)


def sizes(model: ir.Model) -> dict[str, int]:
    return {item.name: int(np.prod(item.dims)) for item in ir.to_proto(model).graph.initializer if item.data_type == 10}


def test_a_chain_of_views_becomes_one_small_constant() -> None:
    model = graph(CROPPED + " y = Add(x, r)")
    before = run(model)
    assert crop_constants(model, above=1000) == 1
    assert np.array_equal(run(model), before)
    assert sizes(model)["table/part_0"] == 4 * 6 * 8
    add = next(node for node in model.graph if node.op_type == "Add")
    assert add.inputs[1] is not None
    assert add.inputs[1].dtype == ir.DataType.FLOAT16
    onnx.checker.check_model(ir.to_proto(model))


@pytest.mark.parametrize(
    ("body", "above"),
    [
        (CROPPED + " y = Add(x, r)", TABLE.size),  # small constants are folded elsewhere
        (LATE, 1),
        ("s = Slice(table, a, f, one) y = MatMul(x, s)", 1),  # a weight
        ("s = Slice(table, a, d, two) m = ReduceMax <keepdims = 0> (s) y = Mul(x, m)", TABLE.size),
        ("s = Reshape(table, square) m = ReduceMax <keepdims = 0> (s) y = Mul(x, m)", 1),  # nothing is cut
    ],
)  # fmt: skip
def test_what_is_left_alone(body: str, above: int) -> None:
    model = graph(body)
    before = run(model)
    assert crop_constants(model, above=above) == 0
    assert np.array_equal(run(model), before)


def test_two_parts_of_one_constant() -> None:
    model = graph(
        "s = Reshape(table, square) p = Slice(s, a, b, one) q = Slice(p, c, d, two) r = Slice(q, one, d, two)"
        " k = Slice(p, a, d, two) m = ReduceMin <keepdims = 0> (k) t = Add(x, r) y = Add(t, m)"
    )
    before = run(model)
    assert crop_constants(model, above=1000) == 2
    assert np.array_equal(run(model), before)
