"""Quantizers behind a softmax become pointwise chains with the very codes of the definition."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from qdexport.errors import GraphPassError
from qdexport.graph.dialect import LOG2_ZERO
from qdexport.graph.edit import NodeWriter, name_everything, replace_value
from qdexport.graph.evaluate import evaluate, log2_codes
from qdexport.graph.runner import run_passes
from qdexport.passes import default_passes
from qdexport.passes.lower_log2 import LowerLog2

LOGARITHMIC, UNIFORM = 1.0, 0.0
CHAIN = ["Div", "Clip", "Log", "Mul", "Round", "Pow", "Mul", "Less", "Where", "Mul", "Less", "Where"]
ROOT = np.float32(np.sqrt(0.5))


def quantizer(graphs, qmax, *, scale, mode, zero_point=None, row=False, shape=(-1,), body="float"):
    """``x -> FakeQuantize -> y`` for x of ``shape``; scale, mode and zero point have a value per row."""
    constants = {"s": np.float32(scale), "m": np.float32(mode)}
    constants["z"] = np.float32(np.zeros(len(scale)) if zero_point is None else zero_point)
    line = graphs.quantize("attn.softmax_quantizer", "q", f"x, s, z, {'row' if row else ''}, m", 0, qmax)
    dims = ",".join(map(str, shape))
    rows = f"int64[{row}] row" if row else ""
    inputs = ", ".join(item for item in (f"{body}[{dims}] x", rows) if item)
    text = line + '\n["attn/Identity"] y = Identity(q)'
    return graphs.model_of(inputs, f"{body}[{dims}] y", text, constants)


def probabilities(noise, scale=1.0, reach=40):
    """Every bound between two codes with its neighbours, powers of two, random magnitudes, and what is no number
    of a softmax."""
    bounds = np.concatenate([np.ldexp(ROOT, -np.arange(148)), np.ldexp(np.float32(1), -np.arange(149))])
    bounds = (bounds * np.float32(scale)).astype(np.float32)
    near = [bounds]
    for towards in (0, 4):
        step = bounds
        for _ in range(3):
            step = np.nextafter(step, np.float32(towards))
            near.append(step)
    odd = np.float32([0, -0.0, -0.5, -np.inf, 1, 1.5, 1e37, np.inf])
    spread = (np.exp2(-noise.random(4000) * reach) * scale).astype(np.float32)
    return np.concatenate([*near, odd, spread])


def run_in_onnxruntime(model, feeds):
    proto = ir.to_proto(model)
    del proto.opset_import[:]
    proto.opset_import.append(onnx.helper.make_opsetid("", 21))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def definition(x, scale, qmax):
    """``s 2^-q``, computed apart from the operator."""
    q = log2_codes(x, np.float32(scale), qmax)
    return np.where(q < min(qmax, LOG2_ZERO), np.ldexp(np.float32(scale), -q.astype(np.int32)), np.float32(0))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("scale", [1.0, 0.25, 0.0731])
def test_codes_are_those_of_the_definition(graphs, noise, bits, scale):
    qmax = (1 << bits) - 1
    x = probabilities(noise, scale, reach=130 if bits == 8 else qmax + 3)
    ran = graphs.run(quantizer(graphs, qmax, scale=[scale], mode=[LOGARITHMIC], shape=x.shape), LowerLog2(), {"x": x})
    assert ran.ops == [*CHAIN, "Identity"]
    assert ran.report.touched == ["attn.softmax_quantizer"]
    assert all(node.name.startswith("attn.softmax_quantizer/") for node in list(ran.model.graph)[:-1])
    ran.assert_equal()
    # the logarithm and the power of another library: equal all the same
    y = run_in_onnxruntime(ran.model, {"x": x})
    np.testing.assert_array_equal(y, definition(x, scale, qmax).astype(np.float32))
    used = min(qmax, LOG2_ZERO)
    assert len(np.unique(y)) == used + 1 if scale == 1 else len(np.unique(y)) > 0.9 * used


@pytest.mark.parametrize("exponent", [-1, -8, -14])
def test_every_number_between_two_powers(graphs, exponent):
    """All 2^23 numbers would take a second each; every 16th, and all of 2^16 around the bound."""
    low = int(np.float32(2.0**exponent).view(np.uint32))
    middle = int(np.float32(ROOT * 2.0 ** (exponent + 1)).view(np.uint32))
    bits = np.unique(np.concatenate([np.arange(low, low + 2**23, 16), np.arange(middle - 2**15, middle + 2**15)]))
    x = bits.astype(np.uint32).view(np.float32)
    model = quantizer(graphs, 15, scale=[1], mode=[LOGARITHMIC], shape=x.shape)
    run_passes(model, [LowerLog2()], graphs.context_of())
    y = run_in_onnxruntime(model, {"x": x})
    np.testing.assert_array_equal(y, definition(x, 1, 15))
    assert set(y) == {np.float32(2.0**exponent), np.float32(2.0 ** (exponent + 1) if exponent > -14 else 2.0**-13)}


@pytest.mark.parametrize("error", [-(2.0**-16), 2.0**-16])
def test_an_inexact_logarithm_moves_no_code(graphs, noise, error):
    """GPUs compute it to some 2^-22 of itself; 64 times that changes nothing."""
    x = probabilities(noise)
    model = quantizer(graphs, 255, scale=[1], mode=[LOGARITHMIC], shape=x.shape)
    run_passes(model, [LowerLog2()], graphs.context_of())
    logarithm = next(node for node in model.graph if node.op_type == "Log")
    writer = NodeWriter(logarithm, after=True)
    out = logarithm.outputs[0]
    wrong = writer.op("Mul", [out, writer.constant("wrong", np.float32(1 + error))], like=out)
    replace_value(out, wrong, keep=[wrong.producer()])
    name_everything(model)
    np.testing.assert_array_equal(run_in_onnxruntime(model, {"x": x}), definition(x, 1, 255))


def test_the_comparison_is_needed(graphs, noise):
    """Without it codes differ, so that the tests above can fail."""
    x = probabilities(noise)
    model = quantizer(graphs, 255, scale=[1], mode=[LOGARITHMIC], shape=x.shape)
    run_passes(model, [LowerLog2()], graphs.context_of())
    first = next(node for node in model.graph if node.op_type == "Where")
    first.replace_input_with(1, first.inputs[2])
    assert (run_in_onnxruntime(model, {"x": x}) != definition(x, 1, 255)).any()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_point", [0, 3])
def test_uniform_rows(graphs, noise, bits, zero_point):
    qmax = (1 << bits) - 1
    x = (noise.integers(-8, 2 * qmax + 9, 3000) * 0.5 / qmax).astype(np.float32)
    model = quantizer(graphs, qmax, scale=[1 / qmax], mode=[UNIFORM], zero_point=[zero_point], shape=x.shape)
    ran = graphs.run(model, LowerLog2(), {"x": x})
    shifted = ["Add", "Clip", "Sub"] if zero_point else ["Clip"]
    assert ran.ops == ["Div", "Round", *shifted, "Mul", "Identity"]
    ran.assert_equal()


@pytest.mark.parametrize("mode", [LOGARITHMIC, UNIFORM])
def test_a_half_precision_body(graphs, noise, mode):
    x = noise.random((2, 3, 8, 8)).astype(np.float16) ** 4
    model = quantizer(graphs, 15, scale=[1 / 15], mode=[mode], shape=x.shape, body="float16")
    ran = graphs.run(model, LowerLog2(), {"x": x})
    assert [ran.ops[0], ran.ops[-2]] == ["Cast", "Cast"]
    assert ran.ops.count("Cast") == 2
    ran.assert_equal()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    ("modes", "scales", "columns"),
    [
        ([1, 0, 1], [1, 0.0625, 1], 2),
        ([1, 1, 1], [1, 0.5, 0.25], 1),
        ([0, 0, 0], [0.05, 0.06, 0.07], 1),
        ([0, 1, 1], [0.5, 0.5, 0.5], 1),
        ([1, 1, 1], [1, 1, 1], 0),
    ],
)
def test_rows(graphs, noise, modes, scales, columns, count):
    """One row for the batch, or one per sample; what all rows share is no column."""
    model = quantizer(graphs, 15, scale=scales, mode=modes, row=count, shape=(2, 3, 5, 7))
    x = noise.random((2, 3, 5, 7)).astype(np.float32) ** 6
    rows = [[row] for row in range(3)] if count == 1 else [[0, 1], [2, 0], [1, 1]]
    ran = graphs.run(model, LowerLog2(), [{"x": x, "row": np.array(row)} for row in rows])
    gathers = ran.nodes("Gather")
    assert [node.name for node in gathers] == (["softmax_table/Gather"] if columns else [])
    assert all(node.inputs[0].shape == [3, columns] for node in gathers)
    mixed = len(set(modes)) == 2
    assert ran.ops.count("Log") == int(any(modes))
    assert ran.ops.count("Where") == (2 if any(modes) else 0) + int(mixed)
    ran.assert_equal()
    if columns:
        assert not np.array_equal(ran.after[0]["y"], ran.after[1]["y"])


def test_quantizers_of_one_row_share_one_table(graphs, noise):
    lines = [
        graphs.quantize("a.softmax_quantizer", "p", "x, s, z, row, m", 0, 15),
        graphs.quantize("b.softmax_quantizer", "q", "x, t, z, row, m", 0, 255),
        '["a/MatMul"] y = MatMul(p, q)',
    ]
    constants = {"s": np.float32([1, 0.1]), "t": np.float32([1, 0.005]), "z": np.zeros(2, np.float32)}
    constants["m"] = np.float32([LOGARITHMIC, UNIFORM])
    model = graphs.model_of("float[2,6,6] x, int64[1] row", "float[2,6,6] y", "\n".join(lines), constants)
    x = noise.random((2, 6, 6)).astype(np.float32) ** 3
    ran = graphs.run(model, LowerLog2(), [{"x": x, "row": np.array([row])} for row in (0, 1)])
    assert [node.inputs[0].shape for node in ran.nodes("Gather")] == [[2, 4]]
    assert ran.report.touched == ["a.softmax_quantizer", "b.softmax_quantizer"]
    ran.assert_equal()


def network(graphs, noise, body="float", rows=1):
    """``softmax(x) -> quantizer -> P V -> quantized linear layer``."""
    narrow = np.float16 if body == "float16" else np.float32
    constants = {
        "s": np.float32([1, 1 / 255][:rows]), "z": np.zeros(rows, np.float32),
        "m": np.float32([LOGARITHMIC, UNIFORM][:rows]),
        "t": np.float32([0.25]), "o": np.float32([7]),
        "v": (noise.integers(-4, 5, (1, 8, 6)) * 0.5).astype(narrow),
        **graphs.weight_constants("w", noise.integers(-9, 10, (6, 5)), np.full(5, 0.5)),
    }  # fmt: skip
    cast = 10 if body == "float16" else 1
    lines = [
        '["attn/Softmax"] p = Softmax<axis: int = -1>(x)',
        graphs.quantize("attn.softmax_quantizer", "pq", f"p, s, z, {'row' if rows > 1 else ''}, m", 0, 255),
        '["attn/MatMul"] a = MatMul(pq, v)',
        graphs.quantize("to_out.input_quantizer", "aq", "a, t, o", 0, 255),
        graphs.weight_of("to_out", "w", axis=1),
        f'["to_out.weight_quantizer/Cast"] wn = Cast<to: int = {cast}>(w)',
        '["to_out/MatMul"] y = MatMul(aq, wn)',
    ]
    inputs = f"{body}[1,4,8] x" + (", int64[1] row" if rows > 1 else "")
    return graphs.model_of(inputs, f"{body}[1,4,5] y", "\n".join(lines), constants)


def test_quantizers_of_layers_are_left_alone(graphs, noise):
    x = noise.normal(size=(1, 4, 8)).astype(np.float32)
    ran = graphs.run(network(graphs, noise), LowerLog2(), {"x": x})
    assert [node.name for node in ran.nodes("FakeQuantize")] == ["to_out.input_quantizer/FakeQuantize"]
    ran.assert_equal()


@pytest.mark.parametrize("rows", [1, 2])
def test_all_passes_together(graphs, noise, rows):
    """The later passes find no softmax quantizer, which they would have to refuse."""
    model = network(graphs, noise, rows=rows)
    feeds = {"x": (noise.normal(size=(1, 4, 8)) * 2).astype(np.float32)}
    every = [{**feeds, "row": np.array([row])} for row in range(rows)] if rows > 1 else [feeds]
    before = [evaluate(model, item)["y"] for item in every]
    reports = run_passes(model, default_passes(), graphs.context_of(timestep_input=False))
    assert {report.name for report in reports if report.changed} >= {"lower-log2", "lower-zero-point"}
    # codes times 1/2, 8 of them times 7 bits: every sum is exact in any order
    for item, expected in zip(every, before, strict=True):
        np.testing.assert_array_equal(evaluate(model, item)["y"], expected)
        np.testing.assert_array_equal(run_in_onnxruntime(model, item), expected)


def test_a_quantizer_without_a_mode_in_front_of_a_float_product(graphs, noise):
    lines = [graphs.quantize("a.quantizer", "q", "x, s, z", 0, 255), '["a/MatMul"] y = MatMul(q, x)']
    constants = {"s": np.float32([1 / 255]), "z": np.float32([0])}
    model = graphs.model_of("float[2,6,6] x", "float[2,6,6] y", "\n".join(lines), constants)
    ran = graphs.run(model, LowerLog2(), {"x": noise.random((2, 6, 6)).astype(np.float32)})
    assert ran.ops == ["Div", "Round", "Clip", "Mul", "MatMul"]
    ran.assert_equal()


def test_one_scale_per_channel_is_refused(graphs):
    line = graphs.quantize("a.softmax_quantizer", "y", "x, s, z, , m", 0, 15, axis=1)
    constants = {"s": np.ones((1, 6), np.float32), "z": np.zeros((1, 6), np.float32), "m": np.float32([1])}
    model = graphs.model_of("float[2,6] x", "float[2,6] y", line, constants)
    with pytest.raises(GraphPassError, match=r"'lower-log2': a\.softmax_quantizer: 6 scales .* one scale per tensor"):
        run_passes(model, [LowerLog2()], graphs.context_of())
