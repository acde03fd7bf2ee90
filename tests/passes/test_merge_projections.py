"""Linear layers behind one quantizer become one product and a Split; what differs stays apart, with the reason."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from qdexport.core.spec import LayerPlan, QuantSpec
from qdexport.core.target import TARGETS
from qdexport.graph.dialect import SCALED_FOR_KEY, SEQUENCE_FIRST_KEY
from qdexport.graph.runner import run_passes
from qdexport.passes.lower_bitwidth import LowerBitwidth
from qdexport.passes.lower_timestep_scale import LowerTimestepScale
from qdexport.passes.merge_projections import MergeProjections

B, L, K = 2, 4, 6
WIDTHS = {"q": 4, "k": 4, "v": 2}
MERGED = "a.to_q+a.to_k+b.to_v"
LAYERS = {"q": "a.to_q", "k": "a.to_k", "v": "b.to_v"}
SPEC = QuantSpec(bits=8)


def stored(noise, name, scale):
    """Codes, scale and zero point of one layer's weight."""
    return {
        f"c{name}": noise.integers(-7, 8, (K, WIDTHS[name])).astype(np.int8),
        f"w{name}": np.asarray(scale, np.float32),
        f"z{name}": np.zeros(np.shape(scale), np.int8),
    }


def network(graphs, noise, *, bias=(), scales=None, rows=1, dtype="float", int4=()):
    """Three layers behind one quantizer; all numbers are dyadic and small, so that every sum is exact, in FP16 too."""
    narrow = np.float32 if dtype == "float" else np.float16
    step = ", step" if rows > 1 else ""
    lines = [
        '["norm/Mul"] x = Mul(u, two)',
        graphs.quantize("a.to_q.input_quantizer", "q_x", f"x, s, z{step}", -128, 127),
    ]
    constants = {
        "two": narrow(2),
        "s": 0.5 ** np.arange(1, rows + 1, dtype=np.float32),
        "z": np.zeros(rows, np.float32),
    }
    for name, width in WIDTHS.items():
        module = LAYERS[name]
        scale = 0.5 ** noise.integers(1, 4, width) if scales is None else np.full((), scales[name])
        axis = f"<axis: int = {1 if scales is None else 0}>"
        lines += [
            f'["{module}.weight/DequantizeLinear"] d{name} = DequantizeLinear{axis}(c{name}, w{name}, z{name})',
            f'["{module}.weight/Cast"] f{name} = Cast<to: int = {1 if dtype == "float" else 10}>(d{name})',
            f'["{module}/MatMul"] p{name} = MatMul(q_x, f{name})',
        ]
        constants |= stored(noise, name, scale)
        last = f"p{name}"
        if name in bias:
            lines.append(f'["{module}/Add"] o{name} = Add({last}, b{name})')
            constants[f"b{name}"] = (noise.integers(-4, 5, width) * 0.5).astype(narrow)
            last = f"o{name}"
        lines.append(f'["out/Abs_{name}"] y{name} = Abs({last})')
    inputs = f"{dtype}[{B}, {L}, {K}] u" + (", int64[1] step" if rows > 1 else "")
    outputs = ", ".join(f"{dtype}[{B}, {L}, {width}] y{name}" for name, width in WIDTHS.items())
    model = graphs.model_of(inputs, outputs, "\n".join(lines), constants)
    for name in int4:
        store_as_int4(model, f"c{name}", f"z{name}")
    return model


def store_as_int4(model, *names):
    for name in names:
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(value.const_value.numpy().astype(ir.DataType.INT4.numpy()), name=name)
        value.type = ir.TensorType(ir.DataType.INT4)


def feeds(noise, narrow=np.float32, row=None):
    found = {"u": (noise.integers(-8, 9, (B, L, K)) * 0.25).astype(narrow)}
    return found if row is None else {**found, "step": np.array([row])}


def context(graphs, **changes):
    plans = tuple(LayerPlan(name=name, kind="linear", weight=SPEC, activation=SPEC) for name in LAYERS.values())
    plans = tuple(replace(plan, **changes.get(plan.name, {})) for plan in plans)
    return replace(graphs.context_of(), layers=plans)


@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("bias", [(), ("q", "k", "v"), ("k",)], ids=["bare", "biases", "one bias"])
def test_one_product_and_a_part_for_each(graphs, noise, dtype, bias):
    model = network(graphs, noise, bias=bias, dtype=dtype)
    narrow = np.float32 if dtype == "float" else np.float16
    ran = graphs.run(model, MergeProjections(), feeds(noise, narrow), context(graphs))
    assert ran.ops.count("MatMul") == 1
    assert ran.node(f"{MERGED}/MatMul").outputs[0].shape == (B, L, 10)
    assert [out.shape[-1] for out in ran.node(f"{MERGED}/Split").outputs] == [4, 4, 2]
    assert ran.ops.count("Add") == bool(bias)
    assert ran.report.touched == list(LAYERS.values())
    ran.assert_equal()


def test_codes_and_scales_stay_what_they_are(graphs, noise):
    model = network(graphs, noise)
    parts = {kind: [model.graph.initializers[f"{kind}{name}"].const_value.numpy() for name in WIDTHS] for kind in "cw"}
    ran = graphs.run(model, MergeProjections(), feeds(noise), context(graphs))
    (weight,) = ran.nodes("DequantizeLinear")
    codes, scale, _ = (value.const_value.numpy() for value in weight.inputs)
    assert (codes == np.concatenate(parts["c"], axis=1)).all()
    assert (scale == np.concatenate(parts["w"])).all()


@pytest.mark.parametrize(("scales", "size"), [((0.5, 0.5, 0.5), 1), ((0.5, 0.5, 0.25), 10)], ids=["equal", "unequal"])
def test_one_scale_per_layer(graphs, noise, scales, size):
    model = network(graphs, noise, scales=dict(zip(WIDTHS, scales, strict=True)))
    ran = graphs.run(model, MergeProjections(), feeds(noise), context(graphs))
    (weight,) = ran.nodes("DequantizeLinear")
    assert weight.inputs[1].const_value.size == size
    ran.assert_equal()


def test_int4_and_int8_weights_stay_apart(graphs, noise):
    model = network(graphs, noise, int4=("q", "k"))
    ran = graphs.run(model, MergeProjections(), feeds(noise), context(graphs))
    assert {node.name for node in ran.nodes("MatMul")} == {"a.to_q+a.to_k/MatMul", "b.to_v/MatMul"}
    merged = next(node for node in ran.nodes("DequantizeLinear") if "+" in node.name)
    assert merged.inputs[0].dtype == merged.inputs[2].dtype == ir.DataType.INT4
    ran.assert_equal()


@pytest.mark.parametrize(
    ("change", "reason"),
    [("bos", "the first token of the text"), ("scaled", "channel scale of another layer")],
)
def test_a_layer_that_is_more_than_a_product_stays(graphs, noise, change, reason):
    model = network(graphs, noise)
    if change == "scaled":
        node = next(node for node in model.graph if node.name == "b.to_v/MatMul")
        node.metadata_props[SCALED_FOR_KEY] = "a.to_out.0:0"
    facts = context(graphs, **({"b.to_v": {"bos": True}} if change == "bos" else {}))
    ran = graphs.run(model, MergeProjections(), feeds(noise), facts)
    assert {node.name for node in ran.nodes("MatMul")} == {"a.to_q+a.to_k/MatMul", "b.to_v/MatMul"}
    (skipped,) = ran.report.skipped
    assert skipped.node == "b.to_v/MatMul"
    assert reason in skipped.reason
    ran.assert_equal()


def test_names_stay_within_what_tensorrt_takes(graphs, noise, monkeypatch):
    monkeypatch.setattr("qdexport.passes.merge_projections._LONGEST_NAME", len("a.to_q+a.to_k"))
    ran = graphs.run(network(graphs, noise), MergeProjections(), feeds(noise), context(graphs))
    assert {node.name for node in ran.nodes("MatMul")} == {"a.to_q+a.to_k/MatMul", "b.to_v/MatMul"}
    ran.assert_equal()


def weight_only(graphs, noise, *, narrow=(), scales="per_block"):
    """Three layers that read one tensor, whose weights alone are quantized, in blocks of two input features."""
    lines, constants = ['["norm/Mul"] x = Mul(u, two)'], {"two": np.float32(2)}
    blocks = scales == "per_block"
    for name, width in WIDTHS.items():
        module, rows = LAYERS[name], (K // 2, width) if blocks else (width,)
        given = "<axis: int = 0, block_size: int = 2>" if blocks else "<axis: int = 1>"
        lines += [
            f'["{module}.weight/DequantizeLinear"] d{name} = DequantizeLinear{given}(c{name}, w{name}, z{name})',
            f'["{module}/MatMul"] p{name} = MatMul(x, d{name})',
            f'["out/Abs_{name}"] y{name} = Abs(p{name})',
        ]
        constants |= stored(noise, name, 0.5 ** noise.integers(1, 4, rows))
    outputs = ", ".join(f"float[{B}, {L}, {width}] y{name}" for name, width in WIDTHS.items())
    model = graphs.model_of(f"float[{B}, {L}, {K}] u", outputs, "\n".join(lines), constants)
    for name in narrow:
        store_as_int4(model, f"c{name}", f"z{name}")
    # any size the recipe takes: the pass reads the graph
    spec = QuantSpec(bits=8, granularity=scales, block_size=16 if blocks else None)
    plans = [LayerPlan(name=name, kind="linear", weight=spec, activation=None) for name in LAYERS.values()]
    return model, replace(graphs.context_of(), layers=tuple(plans))


def test_weights_in_blocks_are_merged_without_a_quantizer(graphs, noise):
    """The builder would merge them itself, and store their INT8 codes as floating-point numbers."""
    model, context = weight_only(graphs, noise)
    ran = graphs.run(model, MergeProjections(), {"u": np.float32(noise.integers(-8, 9, (B, L, K)))}, context)
    (product,) = ran.nodes("MatMul")
    restored = product.inputs[1].producer()
    assert restored.attributes["block_size"].as_int() == 2
    assert restored.inputs[0].const_value.numpy().dtype == np.int8
    assert restored.inputs[1].shape == (K // 2, sum(WIDTHS.values()))
    assert product.name == f"{MERGED}/MatMul"
    ran.assert_equal()


@pytest.mark.parametrize(("narrow", "scales"), [("qkv", "per_block"), ("", "per_channel")])
def test_other_weights_alone_stay(graphs, noise, narrow, scales):
    model, context = weight_only(graphs, noise, narrow=narrow, scales=scales)
    ran = graphs.run(model, MergeProjections(), {"u": np.float32(noise.integers(-8, 9, (B, L, K)))}, context)
    assert ran.report.touched == []
    assert "keeps it narrow" in ran.report.skipped[0].reason


def test_what_passes_noted_about_the_layers_stays(graphs, noise):
    model = network(graphs, noise)
    for node in model.graph:
        if node.op_type == "MatMul":
            node.metadata_props[SEQUENCE_FIRST_KEY] = "1"
    ran = graphs.run(model, MergeProjections(), feeds(noise), context(graphs))
    assert SEQUENCE_FIRST_KEY in ran.node(f"{MERGED}/MatMul").metadata_props


@pytest.mark.parametrize("target", [name for name, target in TARGETS.items() if not target.merge_projections])
def test_a_target_that_does_not_gain_keeps_its_graph(graphs, noise, target):
    facts = replace(context(graphs), target=TARGETS[target])
    ran = graphs.run(network(graphs, noise), MergeProjections(), feeds(noise), facts)
    assert not ran.report.changed


@pytest.mark.parametrize("int4", [(), ("q", "k", "v")], ids=["int8", "int4"])
def test_scales_per_channel_stand_behind_the_product(graphs, noise, int4):
    """In front of it, TensorRT-RTX moves the Split through them and multiplies floats."""
    model = network(graphs, noise, bias=("q",), dtype="float16", int4=int4)
    facts = context(graphs)
    run_passes(model, [MergeProjections()], facts)
    ran = graphs.run(model, LowerBitwidth(), feeds(noise, np.float16), facts)
    product = ran.node(f"{MERGED}/MatMul")
    weight = product.inputs[1].producer()
    assert weight.op_type == "DequantizeLinear"  # nothing between, FP32
    assert (weight.inputs[1].const_value.numpy() == 1).all()
    assert product.outputs[0].dtype == ir.DataType.FLOAT
    (scaled,) = (use.node for use in product.outputs[0].uses())
    assert scaled.op_type == "Mul"
    assert [use.node.op_type for use in scaled.outputs[0].uses()] == ["Cast"]
    ran.assert_equal()


def test_one_common_scale_stays_in_the_weight(graphs, noise):
    """Then the builder multiplies it within the product, and writes the type of the body."""
    model = network(graphs, noise, scales=dict.fromkeys(WIDTHS, 0.5), dtype="float16")
    facts = context(graphs)
    run_passes(model, [MergeProjections()], facts)
    ran = graphs.run(model, LowerBitwidth(), feeds(noise, np.float16), facts)
    assert ran.node(f"{MERGED}/MatMul").outputs[0].dtype == ir.DataType.FLOAT16
    assert "Mul" not in {node.op_type for node in ran.model.graph if MERGED in node.name}
    ran.assert_equal()


def test_a_row_of_a_step_table_scales_all_at_once(graphs, noise):
    model = network(graphs, noise, bias=("k", "v"), rows=2)
    facts = context(graphs)
    run_passes(model, [MergeProjections()], facts)
    ran = graphs.run(model, LowerTimestepScale(), [feeds(noise, row=row) for row in (0, 1)], facts)
    assert [node.op_type for node in ran.model.graph if node.name.startswith(f"{MERGED}/")].count("Mul") == 1
    ran.assert_equal()
