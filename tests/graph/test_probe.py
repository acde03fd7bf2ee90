from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from qdexport.errors import ParityError
from qdexport.graph.evaluate import evaluate
from qdexport.graph.probe import build_probe, find_probes, weight_codes

# a padded convolution with a scale per step, two products that share one quantizer, and what lies between them
BODY = """
["rows/Gather"] scale = Gather<axis: int = 0>(table, timestep)
["conv.input_quantizer/Pad"] padded = Pad(sample, pads)
["conv.input_quantizer/Div"] unit = Div(padded, scale)
["conv.input_quantizer/QuantizeLinear"] q = QuantizeLinear(unit, one, zero)
["conv.input_quantizer/DequantizeLinear"] dq = DequantizeLinear(q, one, zero)
["conv.weight_quantizer/DequantizeLinear"] w = DequantizeLinear<axis: int = 0>(w_codes, w_scale, w_zero)
["conv/Conv"] c = Conv<kernel_shape: ints = [3, 3]>(dq, w)
["conv/Mul"] scaled = Mul(c, scale)
["conv/Add"] biased = Add(scaled, bias)
["act/Relu"] r = Relu(biased)
["act/Reshape"] flat = Reshape(r, flat_shape)
["a.input_quantizer/QuantizeLinear"] fq = QuantizeLinear(flat, step, zero)
["a.input_quantizer/DequantizeLinear"] fdq = DequantizeLinear(fq, step, zero)
["a.weight_quantizer/DequantizeLinear"] aw = DequantizeLinear<axis: int = 1>(a_codes, a_scale, a_zero)
["a/MatMul"] ay = MatMul(fdq, aw)
["b.weight_quantizer/DequantizeLinear"] bw = DequantizeLinear<axis: int = 0>(b_codes, a_scale, a_zero)
["b/Gemm"] by = Gemm<transB: int = 1>(fdq, bw, b_bias)
["sum/Add"] y = Add(ay, by)
"""


def constants(rng: np.random.Generator) -> dict[str, np.ndarray]:
    codes = lambda *shape: rng.integers(-127, 128, shape).astype(np.int8)  # noqa: E731  one line each
    return {
        "table": np.float32([0.5, 0.25]),
        "pads": np.int64([0, 0, 1, 1, 0, 0, 1, 1]),
        "one": np.float32(1),
        "step": np.float32(0.125),
        "zero": np.int8(0),
        "w_codes": codes(4, 2, 3, 3),
        "w_scale": np.float32([0.5, 0.25, 0.125, 1]),
        "w_zero": np.zeros(4, np.int8),
        "bias": rng.standard_normal((1, 4, 1, 1)).astype(np.float32),
        "flat_shape": np.int64([0, -1]),
        "a_codes": codes(36, 5),
        "b_codes": codes(5, 36),
        "a_scale": np.full(5, 0.25, np.float32),
        "a_zero": np.zeros(5, np.int8),
        "b_bias": rng.standard_normal(5).astype(np.float32),
    }


@pytest.fixture
def proto(noise: np.random.Generator) -> onnx.ModelProto:
    return parsed(noise, BODY)


def parsed(noise: np.random.Generator, body: str) -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]>\n'
        f"g (float[1, 2, 3, 3] sample, int64[1] timestep) => (float[1, 5] y) {{{body}}}"
    )
    model.graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in constants(noise).items())
    return onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


@pytest.fixture
def model(proto: onnx.ModelProto) -> ir.Model:
    return ir.from_proto(proto)


def run_whole(model: ir.Model, feeds: dict[str, np.ndarray], names: list[str]) -> dict[str, np.ndarray]:
    """Values inside the whole graph, as outputs of it."""
    values = {value.name: value for node in model.graph for value in node.outputs}
    graph = ir.convenience.extract(model.graph, list(model.graph.inputs), [values[name] for name in names])
    graph.opset_imports.update(model.graph.opset_imports)
    return evaluate(ir.Model(graph, ir_version=10), feeds)


def feeds_of(rng: np.random.Generator, timestep: int) -> dict[str, np.ndarray]:
    return {
        "sample": rng.standard_normal((1, 2, 3, 3)).astype(np.float32) * 20,
        "timestep": np.int64([timestep]),
    }


@pytest.mark.parametrize("timestep", [0, 1])
def test_layers_give_in_the_probe_what_they_give_in_the_whole(
    model: ir.Model, noise: np.random.Generator, timestep: int
) -> None:
    feeds = feeds_of(noise, timestep)
    inside = run_whole(model, feeds, ["q", "biased", "flat", "fq", "ay", "by"])
    probes = find_probes(model, ["conv", "a", "b"])
    probe = build_probe(model, list(probes.values()))
    assert [value.name for value in probe.graph.inputs] == ["conv/x", "timestep", "a/x", "b/x"]
    found = evaluate(
        probe,
        {
            "conv/x": feeds["sample"],
            "timestep": feeds["timestep"],
            "a/x": inside["flat"],
            "b/x": inside["flat"],
        },
    )
    expected = {
        "conv/codes": "q",
        "conv/y": "biased",
        "a/codes": "fq",
        "a/y": "ay",
        "b/codes": "fq",
        "b/y": "by",
    }
    assert list(found) == list(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], inside[value], strict=True)


def test_a_probe_is_legal_and_holds_nothing_else(model: ir.Model) -> None:
    probes = find_probes(model, ["a", "b"])
    proto = ir.to_proto(build_probe(model, list(probes.values())))
    onnx.checker.check_model(proto, full_check=True)
    assert {node.op_type for node in proto.graph.node} == {
        "QuantizeLinear",
        "DequantizeLinear",
        "MatMul",
        "Gemm",
    }
    names = [node.name for node in proto.graph.node]
    assert len(set(names)) == len(names)
    assert "w_codes" not in {item.name for item in proto.graph.initializer}


def test_what_a_probe_says_about_a_layer(model: ir.Model) -> None:
    probes = find_probes(model, ["conv", "a", "b"])
    assert probes["conv"].pads == (0, 0, 1, 1, 0, 0, 1, 1)
    assert probes["a"].pads == ()
    assert [probe.weight.name for probe in probes.values()] == ["w_codes", "a_codes", "b_codes"]
    stored = {name: model.graph.initializers[f"{name}_codes"].const_value.numpy() for name in "wab"}
    np.testing.assert_array_equal(weight_codes(probes["conv"]), stored["w"])
    np.testing.assert_array_equal(weight_codes(probes["a"]), stored["a"].T)
    np.testing.assert_array_equal(weight_codes(probes["b"]), stored["b"])


def test_a_cast_in_front_of_the_product_is_passed(noise: np.random.Generator) -> None:
    """What is quantized in FP32 in a network with an FP16 body: sines of a class label, with a channel scale."""
    body = BODY.replace("ay = MatMul(fdq, aw)", "ay = MatMul(cast, aw)").replace(
        '["a/MatMul"]', '["a/Cast"] cast = Cast<to: int = 1>(fdq)\n["a/MatMul"]'
    )
    probe = find_probes(ir.from_proto(parsed(noise, body)), ["a"])["a"]
    assert (probe.x.name, probe.codes.name if probe.codes is not None else "") == ("flat", "fq")


def test_a_transpose_between_codes_and_product_counts(model: ir.Model) -> None:
    product = next(node for node in model.graph if node.name == "a/MatMul")
    turned = ir.node("Transpose", [product.inputs[1]], {"perm": [1, 0]}, name="a.weight_quantizer/Transpose")
    model.graph.insert_before(product, turned)
    product.replace_input_with(1, turned.outputs[0])
    assert not find_probes(model, ["a"])["a"].weight_transposed


def test_the_source_graph_is_untouched(model: ir.Model) -> None:
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    build_probe(model, list(find_probes(model, ["conv", "a", "b"]).values()))
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_external_data_is_referenced_not_copied(proto: onnx.ModelProto, tmp_path: Path) -> None:
    onnx.save(
        proto,
        tmp_path / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=0,
    )
    model = ir.load(tmp_path / "model.onnx")
    probe = build_probe(model, list(find_probes(model, ["a"]).values()))
    tensors = {value.name: value.const_value for value in probe.graph.initializers.values()}
    assert isinstance(tensors["a_codes"], ir.ExternalTensor)
    stored = {item.name: item for item in ir.to_proto(probe).graph.initializer}["a_codes"]
    assert not stored.raw_data
    assert {entry.key: entry.value for entry in stored.external_data}["location"] == "model.onnx.data"


def test_a_missing_layer_is_named(model: ir.Model) -> None:
    with pytest.raises(ParityError, match="no node gone/Conv, gone/MatMul or gone/Gemm"):
        find_probes(model, ["conv", "gone"])


def test_a_layer_that_reads_floating_point_is_named(model: ir.Model) -> None:
    product = next(node for node in model.graph if node.name == "a/MatMul")
    flat = next(node for node in model.graph if node.name == "act/Reshape").outputs[0]
    product.replace_input_with(0, flat)
    with pytest.raises(ParityError, match="input of layer a does not come from an input quantizer"):
        find_probes(model, ["a"])


def test_a_layer_with_a_floating_point_weight_is_named(model: ir.Model) -> None:
    product = next(node for node in model.graph if node.name == "a/MatMul")
    value = ir.Value(name="float_weight", const_value=ir.tensor(np.ones((36, 5), np.float32)))
    model.graph.register_initializer(value)
    product.replace_input_with(1, value)
    with pytest.raises(ParityError, match="weight of layer a is not stored as integers"):
        find_probes(model, ["a"])


def test_an_input_without_a_type_is_named(model: ir.Model) -> None:
    probes = find_probes(model, ["a"])
    probes["a"].x.type = None
    with pytest.raises(ParityError, match="input of layer a"):
        build_probe(model, list(probes.values()))


MERGED = """
["a+b.input_quantizer/QuantizeLinear"] fq = QuantizeLinear(sample, step, zero)
["a.input_quantizer/DequantizeLinear"] fdq = DequantizeLinear(fq, step, zero)
["a+b/DequantizeLinear"] w = DequantizeLinear<axis: int = 1>(codes, ones, zeros)
["a+b/MatMul"] product = MatMul(fdq, w)
["a+b/Mul"] scaled = Mul(product, scale)
["a+b/Split"] ay, by = Split<axis: int = -1>(scaled, widths)
["a/Relu"] ar = Relu(ay)
["sum/Sub"] y = Sub(by, ar)
"""


def merged_model(noise: np.random.Generator, widths: list[int]) -> ir.Model:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]>\n'
        f"g (float[1, 6] sample) => (float[1, 3] y) {{{MERGED}}}".replace("a+b.input", "a.input")
    )
    arrays = {
        "step": np.float32(0.125),
        "zero": np.int8(0),
        "codes": noise.integers(-127, 128, (6, 4)).astype(np.int8),
        "ones": np.ones(4, np.float32),
        "zeros": np.zeros(4, np.int8),
        "scale": np.float32([0.5, 0.25, 0.125, 1]),
        "widths": np.array(widths, np.int64),
    }
    model.graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in arrays.items())
    return ir.from_proto(onnx.shape_inference.infer_shapes(model, data_prop=True))


def test_layers_of_a_merged_product_have_their_own_codes_and_outputs(noise: np.random.Generator) -> None:
    model = merged_model(noise, [1, 3])
    probes = find_probes(model, ["a", "b"])
    codes = model.graph.initializers["codes"].const_value.numpy()
    assert (weight_codes(probes["a"]) == codes.T[:1]).all()
    assert (weight_codes(probes["b"]) == codes.T[1:]).all()
    x = noise.standard_normal((1, 6)).astype(np.float32)
    found = evaluate(build_probe(model, list(probes.values())), {"a/x": x, "b/x": x})
    whole = run_whole(model, {"sample": x}, ["ay", "by"])
    np.testing.assert_array_equal(found["a/y"], whole["ay"])
    np.testing.assert_array_equal(found["b/y"], whole["by"])


def test_a_merged_product_without_an_output_for_each_layer(noise: np.random.Generator) -> None:
    model = merged_model(noise, [1, 3])
    split = next(node for node in model.graph if node.op_type == "Split")
    split.inputs[1].const_value = ir.tensor(np.int64([1, 1, 2]), name="widths")
    with pytest.raises(ParityError, match="no Split with an output for each"):
        find_probes(model, ["a"])
