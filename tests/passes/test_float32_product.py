"""Linear layers with INT4 weights: exact codes, FP32 operands, and integer kernels in the built plan."""

from __future__ import annotations

import dataclasses
import importlib.util
import tracemalloc

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qdexport.build.engine import BuildOptions, build_engine
from qdexport.build.plan import engine_coverage
from qdexport.check.session import reference_session
from qdexport.core.io_spec import IoSpec
from qdexport.core.layer_names import node_names
from qdexport.core.spec import Granularity, LayerPlan, QuantSpec
from qdexport.core.target import TARGETS
from qdexport.emit.coverage import onnx_coverage
from qdexport.emit.onnx_file import emit
from qdexport.errors import GraphPassError
from qdexport.graph.evaluate import evaluate
from qdexport.graph.probe import find_probes, weight_codes
from qdexport.graph.runner import run_passes
from qdexport.passes import default_passes
from qdexport.passes.float32_product import codes_alone, multiply_in_float32
from qdexport.passes.fold_adapters import FoldAdapters
from qdexport.passes.lower_bitwidth import LowerBitwidth

IN, OUT, ROWS = 32, 16, 3
LAYERS = ("to_q", "to_k", "fc", "last")
STEPS = (900, 300, 1)
BODIES = ["float", "float16"]


def plan(name, bits=4):
    weight = QuantSpec(bits=bits, granularity=Granularity.PER_CHANNEL)
    return LayerPlan(name=name, kind="linear", weight=weight, activation=QuantSpec(bits=8))


def context_of(graphs, body, bits):
    """Widths of weights by layer; the timestep chooses rows of scales alone."""
    context = graphs.context_of(body="fp16" if body == "float16" else "fp32")
    return dataclasses.replace(context, layers=tuple(plan(*item) for item in bits.items()), int4=True)


def network(graphs, noise, body, kind, bits):
    """Two products behind one quantizer, a Gemm, and a product of what was not quantized together.

    Numbers are dyadic and small, so that every sum is exact, in FP16 too.
    """
    narrow = np.float16 if body == "float16" else np.float32

    def weights(*shape):
        return (noise.integers(-8, 8, shape) * 2.0**-6).astype(narrow)

    rows = 3 if kind == "steps" else 1
    zero = {"symmetric": 0.0, "unsigned": 131.0, "steps": 7.0}[kind]
    constants = {
        "wq": weights(OUT, IN), "wk": weights(OUT, IN), "wf": weights(OUT, OUT), "wl": weights(4, OUT),
        "bq": (noise.integers(-4, 5, OUT) * 0.125).astype(narrow),
        "bf": (noise.integers(-4, 5, OUT) * 0.125).astype(narrow),
        "zx": np.full(rows, zero, np.float32), "sx": np.float32([0.125, 0.25, 0.5])[:rows],
        "sw": np.full((1, OUT), 2.0**-6, np.float32), "zw": np.zeros((1, OUT), np.float32),
        "s4": np.full((1, 4), 2.0**-6, np.float32), "z4": np.zeros((1, 4), np.float32),
        "row_of": np.searchsorted([100, 500], np.arange(1000)).astype(np.int64),
        "flat": np.array([-1, OUT]), "deep": np.array([2, -1, OUT]),
    }  # fmt: skip
    bounds = {layer: (-(1 << (width - 1)), (1 << (width - 1)) - 1) for layer, width in bits.items()}
    quantizer = (0, 255) if kind == "unsigned" else (-128, 127)
    row = ", row" if kind == "steps" else ""

    def layer(name, weight, scale="sw, zw"):
        return graphs.quantize(f"{name}.weight_quantizer", f"{weight}q", f"{weight}, {scale}", *bounds[name], axis=0)

    lines = [
        '["step_rows/Gather"] row = Gather(row_of, timestep)' if kind == "steps" else "",
        graphs.quantize("to_q.input_quantizer", "xq", f"x, sx, zx{row}", *quantizer),
        layer("to_q", "wq"), layer("to_k", "wk"), layer("fc", "wf"), layer("last", "wl", "s4, z4"),
        '["to_q/Transpose"] wqt = Transpose<perm: ints = [1,0]>(wqq)', '["to_q/MatMul"] q0 = MatMul(xq, wqt)',
        '["to_q/Add"] q = Add(q0, bq)',
        '["to_k/Transpose"] wkt = Transpose<perm: ints = [1,0]>(wkq)', '["to_k/MatMul"] k = MatMul(xq, wkt)',
        '["attn/Add"] qk = Add(q, k)', '["attn/Reshape"] qkf = Reshape(qk, flat)',
        graphs.quantize("fc.input_quantizer", "fq", f"qkf, sx, zx{row}", *quantizer),
        '["fc/Gemm"] f = Gemm<transB: int = 1>(fq, wfq, bf)',
        '["act/Relu"] fa = Relu(f)', '["act/Reshape"] fd = Reshape(fa, deep)',
        graphs.quantize("last.input_quantizer", "lq", f"fd, sx, zx{row}", *quantizer),
        '["last/Transpose"] wlt = Transpose<perm: ints = [1,0]>(wlq)', '["last/MatMul"] y = MatMul(lq, wlt)',
    ]  # fmt: skip
    timestep = ", int64[1] timestep" if kind == "steps" else ""
    interface = f"{body}[2,{ROWS},{IN}] x{timestep}", f"{body}[2,{ROWS},4] y"
    return graphs.model_of(*interface, "\n".join(lines), constants)


def feeds_of(noise, body, kind, steps=STEPS):
    x = (noise.integers(-64, 65, (2, ROWS, IN)) * 0.125).astype(np.float16 if body == "float16" else np.float32)
    return [{"x": x, "timestep": np.array([step])} for step in steps] if kind == "steps" else [{"x": x}]


CASES = [(body, kind) for body in BODIES for kind in ("symmetric", "unsigned", "steps")]
BITS = {"to_q": 4, "to_k": 3, "fc": 4, "last": 2}


def lowered(graphs, noise, body, kind, bits):
    model = network(graphs, noise, body, kind, bits)
    feeds = feeds_of(noise, body, kind)
    before = [evaluate(model, item) for item in feeds]
    run_passes(model, default_passes(), context_of(graphs, body, bits))
    return model, feeds, before


@pytest.mark.parametrize(("body", "kind"), CASES)
def test_every_form_is_exact_and_runs_in_onnx_runtime(graphs, noise, tmp_path, body, kind):
    model, feeds, before = lowered(graphs, noise, body, kind, BITS)
    by_name = {name: node for node in model.graph for name in node_names(node.name)}
    for layer in LAYERS:
        product = next(by_name[name] for op in ("MatMul", "Gemm") if (name := f"{layer}/{op}") in by_name)
        assert [value.dtype for value in product.inputs if value is not None] == [ir.DataType.FLOAT] * len(
            product.inputs
        )
        weight = product.inputs[1].producer()
        assert weight.op_type == "DequantizeLinear"
        assert [value.dtype for value in weight.inputs] == [ir.DataType.INT4, ir.DataType.FLOAT, ir.DataType.INT4]
    file = emit(model, tmp_path / "onnx", TARGETS["tensorrt-rtx"], {})
    session = reference_session(file.path)
    stored = ir.load(file.path)
    for item, expected in zip(feeds, before, strict=True):
        np.testing.assert_array_equal(evaluate(stored, item)["y"], expected["y"])
        np.testing.assert_array_equal(session.run(["y"], item)[0], expected["y"])
    plans = context_of(graphs, body, BITS).layers
    assert onnx_coverage(file.path, plans) == dict.fromkeys(LAYERS, "int4")


def test_half_the_bytes(graphs, noise, tmp_path):
    sizes = {}
    for bits in (4, 8):
        model, _, _ = lowered(graphs, noise, "float", "symmetric", dict.fromkeys(LAYERS, bits))
        codes = {name: value.const_value for name, value in model.graph.initializers.items() if name.endswith("/codes")}
        assert len(codes) == len(LAYERS) - 1  # queries and keys side by side
        sizes[bits] = sum(len(ir.serde.serialize_tensor(tensor).raw_data) for tensor in codes.values())
    assert sizes[8] == 2 * sizes[4] == 2 * OUT * (2 * IN + OUT + 4) // 2


def test_probes_read_the_codes(graphs, noise, tmp_path):
    """Codes of up to 4 bits in torch's layout, also from a file."""
    model = network(graphs, noise, "float", "symmetric", BITS)
    weights = {
        layer: model.graph.initializers[name].const_value.numpy()
        for layer, name in zip(LAYERS, ("wq", "wk", "wf", "wl"), strict=True)
    }
    run_passes(model, default_passes(), context_of(graphs, "float", BITS))
    file = emit(model, tmp_path / "onnx", TARGETS["tensorrt-rtx"], {})
    for name, probe in find_probes(ir.load(file.path), LAYERS).items():
        low, high = -(1 << (BITS[name] - 1)), (1 << (BITS[name] - 1)) - 1
        codes = weight_codes(probe)
        assert codes.dtype == np.int8
        np.testing.assert_array_equal(codes, np.clip(weights[name] * 2**6, low, high))


def test_layers_of_both_widths_share_a_quantizer(graphs, noise):
    """In an FP16 body the INT8 layer keeps its Cast, and the INT4 layer reads the FP32 value before it."""
    bits = BITS | {"to_k": 8}
    model = network(graphs, noise, "float16", "symmetric", bits)
    context = context_of(graphs, "float16", bits)
    feeds = feeds_of(noise, "float16", "symmetric")
    graphs.run(model, FoldAdapters(), feeds, context)
    ran = graphs.run(model, LowerBitwidth(), feeds, context)
    ran.assert_equal()
    wide, narrow = ran.node("to_q/MatMul"), ran.node("to_k/MatMul")
    assert [value.dtype for value in wide.inputs] == [ir.DataType.FLOAT] * 2
    assert [value.dtype for value in narrow.inputs] == [ir.DataType.FLOAT16] * 2
    assert narrow.inputs[0].producer().inputs[0] is wide.inputs[0]
    (cast,) = [use.node for use in wide.outputs[0].uses()]
    assert (cast.name, cast.op_type) == ("to_q/Cast", "Cast")
    assert [use.node.name for use in cast.outputs[0].uses()] == ["to_q/Add"]
    gemm = ran.node("fc/Gemm")
    assert [value.dtype for value in gemm.inputs] == [ir.DataType.FLOAT] * 3
    # the quantizer in front of a Gemm that alone reads it needs no Cast behind
    assert "fc.input_quantizer/Cast_1" not in {node.name for node in ran.model.graph}


def test_a_graph_output_that_an_int4_layer_makes(graphs, noise):
    ran_feeds = feeds_of(noise, "float16", "symmetric")
    model = network(graphs, noise, "float16", "symmetric", BITS)
    graphs.run(model, FoldAdapters(), ran_feeds, context_of(graphs, "float16", BITS))
    ran = graphs.run(model, LowerBitwidth(), ran_feeds, context_of(graphs, "float16", BITS))
    assert ran.model.graph.outputs[0].dtype == ir.DataType.FLOAT16
    assert ran.model.graph.outputs[0].producer().op_type == "Cast"


def test_a_weight_of_another_form_is_refused(graphs, noise):
    model = graphs.model_of(
        "float[2,3] x, float[2,3] u",
        "float[2,2] y",
        '["l/MatMul"] y = MatMul(x, w)',
        {"w": np.ones((3, 2), np.float32)},
    )
    with pytest.raises(GraphPassError, match="l: the weight is not quantized although the input is"):
        multiply_in_float32(next(iter(model.graph)), model.graph.inputs[1])


def test_codes_of_ml_dtypes_are_those_of_numpy():
    codes = np.arange(-8, 8, dtype=np.int8)
    np.testing.assert_array_equal(codes.astype(ml_dtypes.int4).astype(np.int8), codes)


@pytest.mark.rtx
@pytest.mark.parametrize(("body", "kind"), CASES)
def test_the_built_plan_computes_with_integers(graphs, noise, tmp_path, body, kind):
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("needs the tensorrt_rtx package")
    model, _, _ = lowered(graphs, noise, body, kind, BITS)
    file = emit(model, tmp_path / "onnx", TARGETS["tensorrt-rtx"], {})
    options = BuildOptions(
        target=TARGETS["tensorrt-rtx"], io=IoSpec(inputs=(), outputs=()), compute_capabilities=("8.9",)
    )
    _, built = build_engine(file.path, tmp_path / "engine", options)
    assert engine_coverage(built, LAYERS) == dict.fromkeys(LAYERS, "int8")


def test_sums_of_codes_make_no_wide_copy(graphs):
    """All keys and values of SDXL's text are one product: its codes as INT64 would be 1.3 GB."""
    codes = np.random.default_rng(0).integers(-8, 8, (512, 2048)).astype(np.int8)
    constants = graphs.weight_constants("w", codes, np.full(2048, 0.5))
    body = graphs.weight_of("fc", "w", axis=1) + '\n["fc/MatMul"] y = MatMul(x, w)'
    made = graphs.model_of("float[2,512] x", "float[2,2048] y", body, constants)
    tracemalloc.start()
    scales, sums = codes_alone(next(node for node in made.graph if node.op_type == "MatMul"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(sums, codes.astype(np.int64).sum(axis=0))
    assert (scales == 0.5).all()
    assert peak < 2 * codes.size
