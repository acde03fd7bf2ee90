"""Needless casts go, needed ones stay, and mixed floating types are refused by name."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qdexport.errors import GraphPassError
from qdexport.graph.edit import name_everything
from qdexport.graph.evaluate import evaluate
from qdexport.graph.runner import PassReport
from qdexport.passes.legalize_types import LegalizeTypes

FLOAT, HALF, DOUBLE, INT64 = 1, 10, 11, 7


def cast(layer, out, source, to):
    return f'["{layer}/Cast"] {out} = Cast<to: int = {to}>({source})'


def chain(graphs, *casts, kind="float16", result=None):
    """``x -> Relu -> casts -> Relu -> y``."""
    lines, value = ['["p/Relu"] v0 = Relu(x)'], "v0"
    for index, to in enumerate(casts, 1):
        lines.append(cast(f"m{index}", f"v{index}", value, to))
        value = f"v{index}"
    lines.append(f'["q/Relu"] y = Relu({value})')
    return graphs.model_of(f"{kind}[4] x", f"{result or kind}[4] y", "\n".join(lines), {})


@pytest.mark.parametrize(
    ("kind", "casts", "left", "result"),
    [
        ("float16", (HALF,), 0, None),
        ("float", (FLOAT,), 0, None),
        ("float16", (FLOAT, HALF), 0, None),
        ("float16", (FLOAT, FLOAT, HALF), 0, None),
        ("float16", (FLOAT, HALF, FLOAT, HALF), 0, None),
        ("float16", (FLOAT,), 1, "float"),
        ("float16", (FLOAT, HALF, FLOAT), 1, "float"),
        ("float", (HALF, FLOAT), 2, None),
        ("float", (HALF,), 1, "float16"),
        ("float", (INT64, FLOAT), 2, None),
    ],
)
def test_casts_that_change_nothing_are_removed(graphs, noise, kind, casts, left, result):
    """Narrowing and widening back rounds, so it stays."""
    dtype = np.float16 if kind == "float16" else np.float32
    x = (np.array([0.1, 1e-5, -3.3, 1234.567])).astype(dtype)
    ran = graphs.run(chain(graphs, *casts, kind=kind, result=result), LegalizeTypes(), {"x": x})
    assert ran.ops == ["Relu", *["Cast"] * left, "Relu"]
    assert ran.report.changed == (left < len(casts))
    ran.assert_equal()


def test_a_widening_that_others_read_stays(graphs, noise):
    body = "\n".join(
        [
            cast("a", "wide", "x", FLOAT),
            cast("b", "back", "wide", HALF),
            '["c/Relu"] y1 = Relu(back)',
            '["d/Relu"] y2 = Relu(wide)',
        ]
    )
    model = graphs.model_of("float16[4] x", "float16[4] y1, float[4] y2", body, {})
    ran = graphs.run(model, LegalizeTypes(), {"x": noise.normal(size=4).astype(np.float16)})
    assert ran.ops == ["Cast", "Relu", "Relu"]
    assert ran.node("c/Relu").inputs[0].name == "x"
    ran.assert_equal()


def test_a_network_output_behind_a_needless_cast_keeps_its_name(graphs, noise):
    body = '["p/Relu"] v = Relu(x)\n' + cast("q", "y", "v", FLOAT)
    ran = graphs.run(
        graphs.model_of("float[4] x", "float[4] y", body, {}),
        LegalizeTypes(),
        {"x": noise.normal(size=4).astype(np.float32)},
    )
    assert ran.ops == ["Relu"]
    ran.assert_equal()


def test_an_input_that_is_an_output_keeps_both_names(graphs, noise):
    model = graphs.model_of("float[4] x", "float[4] y", cast("q", "y", "x", FLOAT), {})
    ran = graphs.run(model, LegalizeTypes(), {"x": noise.normal(size=4).astype(np.float32)})
    assert ran.ops == ["Identity"]
    ran.assert_equal()


def test_mixed_floating_types_are_refused(graphs):
    """Onnx's own inference would stop at such a graph, so the type is spoilt afterwards."""
    model = graphs.model_of("float[4] x, float[4] u", "float[4] y", '["a/Add"] y = Add(x, u)', {})
    model.graph.inputs[1].type = ir.TensorType(ir.DataType.FLOAT16)
    with pytest.raises(
        GraphPassError, match=r"a/Add \(Add\) reads several floating types: x FLOAT, u FLOAT16"
    ):
        LegalizeTypes().apply(model, graphs.context_of(), PassReport("legalize-types"))


def test_a_layer_with_fp16_weights_reads_fp16(graphs, noise):
    """PyTorch's exporter lets the sines of class labels reach it in FP32."""
    weight = noise.integers(-4, 5, (4, 3)).astype(np.float16)
    body = cast("n", "h", "x", HALF) + '\n["fc/MatMul"] v = MatMul(h, w)\n["a/Relu"] y = Relu(v)'
    model = graphs.model_of("float[2, 4] x", "float16[2, 3] y", body, {"w": weight})
    product = next(node for node in model.graph if node.op_type == "MatMul")
    product.replace_input_with(0, model.graph.inputs[0])  # onnx's own inference would stop at such a graph
    report = PassReport("legalize-types")
    LegalizeTypes().apply(model, graphs.context_of(), report)
    assert report.touched == ["fc"]
    assert [value.dtype for value in product.inputs] == [ir.DataType.FLOAT16] * 2
    name_everything(model)
    x = noise.integers(-8, 9, (2, 4)).astype(np.float32)
    expected = np.maximum(x.astype(np.float16) @ weight, 0)  # whole numbers: exact in either type
    np.testing.assert_array_equal(evaluate(ir.to_proto(model), {"x": x})["y"], expected)


def test_an_unknown_type_is_refused(graphs):
    model = graphs.model_of(
        "float[4] x", "float[4] y", '["p/Relu"] v = Relu(x)\n' + cast("q", "y", "v", FLOAT), {}
    )
    model.graph.node(0).outputs[0].type = None
    with pytest.raises(GraphPassError, match="the type of v is unknown; capture the model again"):
        LegalizeTypes().apply(model, graphs.context_of(), PassReport("legalize-types"))


def test_a_quantizer_that_was_not_lowered_is_refused(graphs):
    text = graphs.quantize("conv.input_quantizer", "y", "x, s, z", -8, 7)
    model = graphs.model_of("float[4] x", "float[4] y", text, {"s": np.float32([1]), "z": np.float32([0])})
    with pytest.raises(GraphPassError, match=r"conv\.input_quantizer: FakeQuantize was not lowered"):
        graphs.run(model, LegalizeTypes(), {"x": np.ones(4, np.float32)})


def test_pairs_may_mix_types(graphs, noise):
    body = "\n".join(
        [
            '["a/QuantizeLinear"] q = QuantizeLinear(x, s, zero)',
            '["a/DequantizeLinear"] y = DequantizeLinear(q, s, zero)',
        ]
    )
    constants = {"s": np.float32(0.1), "zero": np.int8(0)}
    model = graphs.model_of("float[4] x", "float[4] y", body, constants)
    ran = graphs.run(model, LegalizeTypes(), {"x": noise.normal(size=4).astype(np.float32)})
    assert not ran.report.changed


def test_a_concatenation_of_two_floating_types_is_widened_as_in_pytorch(graphs, noise):
    """SDXL with an FP16 body: the pooled text beside FP32 time ids."""
    model = graphs.model_of(
        "float16[2,3] a, float[2,3] b", "float[2,6] y",
        '["text/Cast"] wide = Cast<to: int = 1>(a)\n["/Concat"] y = Concat<axis: int = 1>(wide, b)', {},
    )  # fmt: skip
    concat = next(node for node in model.graph if node.op_type == "Concat")
    concat.replace_input_with(0, model.graph.inputs[0])  # what the exporter leaves behind
    LegalizeTypes().apply(model, graphs.context_of(), PassReport("legalize-types"))
    name_everything(model)
    assert [str(value.dtype) for value in concat.inputs] == ["FLOAT", "FLOAT"]
    a, b = noise.standard_normal((2, 3)).astype(np.float16), noise.standard_normal((2, 3)).astype(np.float32)
    np.testing.assert_array_equal(evaluate(model, {"a": a, "b": b})["y"], np.concatenate([a.astype(np.float32), b], 1))
