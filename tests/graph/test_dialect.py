"""The operator is known to onnx once it is registered."""

from __future__ import annotations

import onnx
import pytest

from qdexport.graph.dialect import DOMAIN, FAKE_QUANTIZE, VERSION, register_schema

TEXT = """<ir_version: 10, opset_import: ["" : 21, "qdexport" : 1]>
g (float[2,3] x, int64[1] row) => (float[2,3] y)
<float[2] s = {0.1, 0.2}, float[2] z = {0, 0}>
{ y = qdexport.FakeQuantize<qmin: int = -8, qmax: int = 7, axis: int = -1>(x, s, z, row) }"""


def test_registering_twice_is_harmless() -> None:
    register_schema()
    register_schema()
    assert onnx.defs.has(FAKE_QUANTIZE, DOMAIN)
    schema = onnx.defs.get_schema(FAKE_QUANTIZE, VERSION, DOMAIN)
    assert [item.name for item in schema.inputs] == ["x", "scale", "zero_point", "row", "mode"]
    assert sorted(schema.attributes) == ["axis", "form", "qmax", "qmin"]


def test_the_checker_accepts_legal_nodes_and_refuses_others() -> None:
    register_schema()
    onnx.checker.check_model(onnx.parser.parse_model(TEXT))
    wrong = onnx.parser.parse_model(TEXT.replace("(x, s, z, row)", "(x, s)"))
    with pytest.raises(onnx.checker.ValidationError, match="FakeQuantize"):
        onnx.checker.check_model(wrong)
