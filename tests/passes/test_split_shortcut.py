"""Quantizers of a split convolution read the operands of the concatenation that its input is."""

from __future__ import annotations

import numpy as np
import pytest

from qdexport.passes.fold_adapters import FoldAdapters
from qdexport.passes.split_shortcut import SplitShortcut

SHORTCUT = "up.resnets.0.conv_shortcut"
HIDDEN, SKIP = 5, 3
SPLIT = f'["{SHORTCUT}/Split"] p0, p1 = Split<axis: int = 1>({{}}, sizes)'
SLICES = (
    f'["{SHORTCUT}/Slice"] p0 = Slice({{}}, first, seam, channels)\n'
    f'["{SHORTCUT}/Slice"] p1 = Slice({{}}, seam, last, channels)'
)


def network(graphs, noise, cuts=SPLIT, joined="x", *, body="float", before="", shape="2,{},4,4", **more):
    """``Concat`` read by a norm (a stand-in) and by the two quantizers of a split 1x1 convolution."""
    narrow = np.float16 if body == "float16" else np.float32
    constants = {
        "sizes": np.array([HIDDEN, SKIP]), "channels": np.array([1]),
        "first": np.array([0]), "seam": np.array([HIDDEN]), "last": np.array([np.iinfo(np.int64).max]),
        "w0": noise.normal(size=(4, HIDDEN, 1, 1)).astype(narrow), "b": noise.normal(size=4).astype(narrow),
        "w1": noise.normal(size=(4, SKIP, 1, 1)).astype(narrow),
        "s0": np.float32([0.05]), "s1": np.float32([0.31]), "z": np.float32([0]), "zx": np.float32([3]),
        "sw": np.full((1, 4), 0.02, np.float32), "zw": np.zeros((1, 4), np.float32),
    } | more  # fmt: skip
    lines = [
        '["up.resnets.0/Concat"] x = Concat<axis: int = 1>(hidden, skip)',
        '["up.resnets.0.norm1/Tanh"] n = Tanh(x)',
        before,
        cuts.format(joined, joined),
        graphs.quantize(f"{SHORTCUT}.input_quantizers.0", "q0", "p0, s0, zx", 0, 255),
        graphs.quantize(f"{SHORTCUT}.input_quantizers.1", "q1", "p1, s1, z", -128, 127),
        graphs.quantize(f"{SHORTCUT}.weight_quantizers.0", "k0", "w0, sw, zw", -128, 127, axis=0),
        graphs.quantize(f"{SHORTCUT}.weight_quantizers.1", "k1", "w1, sw, zw", -128, 127, axis=0),
        f'["{SHORTCUT}#0/Conv"] y0 = Conv(q0, k0, b)',
        f'["{SHORTCUT}#1/Conv"] y1 = Conv(q1, k1)',
        f'["{SHORTCUT}/Add"] y = Add(y0, y1)',
    ]
    inputs = f"{body}[{shape.format(HIDDEN)}] hidden, {body}[{shape.format(SKIP)}] skip"
    outputs = f"{body}[{shape.format(HIDDEN + SKIP)}] n, {body}[{shape.format(4)}] y"
    return graphs.model_of(inputs, outputs, "\n".join(lines), constants)


def feeds_of(noise, dtype=np.float32):
    draw = {"hidden": noise.normal(size=(2, HIDDEN, 4, 4)), "skip": 20 * noise.normal(size=(2, SKIP, 4, 4))}
    return {name: array.astype(dtype) for name, array in draw.items()}


def sources(ran):
    return [ran.node(f"{SHORTCUT}.input_quantizers.{part}/FakeQuantize").inputs[0].name for part in (0, 1)]


@pytest.mark.parametrize("cuts", [SPLIT, SLICES], ids=["split", "slices"])
@pytest.mark.parametrize("body", ["float", "float16"])
@pytest.mark.parametrize("shape", ["2,{},4,4", "N,{},H,W"])
def test_each_quantizer_reads_its_operand(graphs, noise, cuts, body, shape):
    dtype = np.float16 if body == "float16" else np.float32
    ran = graphs.run(network(graphs, noise, cuts, body=body, shape=shape), SplitShortcut(), feeds_of(noise, dtype))
    assert sources(ran) == ["hidden", "skip"]
    assert not {"Split", "Slice"} & set(ran.ops)
    (concat,) = ran.nodes("Concat")
    assert [use.node.op_type for use in concat.outputs[0].uses()] == ["Tanh"]
    assert ran.report.touched == [f"{SHORTCUT}.input_quantizers.{part}" for part in (0, 1)]
    assert not ran.report.skipped
    ran.assert_equal()


def test_a_concatenation_that_nobody_else_reads_is_gone(graphs, noise):
    model = network(graphs, noise)
    tanh = next(node for node in model.graph if node.op_type == "Tanh")
    tanh.replace_input_with(0, model.graph.inputs[0])
    model.graph.outputs[0].shape = model.graph.inputs[0].shape
    ran = graphs.run(model, SplitShortcut(), feeds_of(noise))
    assert "Concat" not in ran.ops
    ran.assert_equal()


@pytest.mark.parametrize("body", ["float", "float16"])
def test_channel_scales_are_cut_as_well(graphs, noise, body):
    """TCAQ-DM's factors stand between the concatenation and the cut, in FP32 also for an FP16 body."""
    dtype = np.float16 if body == "float16" else np.float32
    name = f"{SHORTCUT}.channel_scale"
    before = f'["{name}/Mul"] scaled = Mul(x, inverse)'
    if body == "float16":
        before = (
            f'["{name}/Cast"] wide = Cast<to: int = 1>(x)\n["{name}/Mul"] product = Mul(wide, inverse)\n'
            f'["{name}/Cast"] scaled = Cast<to: int = 10>(product)'
        )
    inverse = noise.uniform(0.1, 1, (1, HIDDEN + SKIP, 1, 1)).astype(np.float32)
    model = network(graphs, noise, joined="scaled", before=before, body=body, inverse=inverse)
    ran = graphs.run(model, SplitShortcut(), feeds_of(noise, dtype))
    assert not {"Split", "Slice"} & set(ran.ops)
    first, second = ran.nodes("Mul")
    np.testing.assert_array_equal(first.inputs[1].const_value.numpy(), inverse[:, :HIDDEN])
    np.testing.assert_array_equal(second.inputs[1].const_value.numpy(), inverse[:, HIDDEN:])
    assert {node.name.partition("/")[0] for node in (first, second)} == {name}
    assert len(ran.nodes("Cast")) == (4 if body == "float16" else 0)
    ran.assert_equal()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sizes": np.array([4, 4])}, "channels 0 to 4 are cut, but the seams of up.resnets.0/Concat are 0, 5, 8"),
        ({"joined": "m", "before": '["up/Relu"] m = Relu(x)'}, "m is cut here, but it is not a concatenation"),
    ],
    ids=["other seams", "no concatenation"],
)
def test_where_the_seams_do_not_agree_the_cut_stays(graphs, noise, changes, reason):
    if "sizes" in changes:
        changes |= {"w0": np.ones((4, 4, 1, 1), np.float32), "w1": np.ones((4, 4, 1, 1), np.float32)}
    ran = graphs.run(network(graphs, noise, **changes), SplitShortcut(), feeds_of(noise))
    assert not ran.report.changed
    assert len(ran.report.skipped) == 2
    assert ran.report.skipped[0].node == f"{SHORTCUT}.input_quantizers.0/FakeQuantize"
    assert reason in ran.report.skipped[0].reason
    assert "Split" in ran.ops
    ran.assert_equal()


def test_another_axis_is_none(graphs, noise):
    """A concatenation of rows, cut by channels."""
    model = network(
        graphs, noise, joined="rows", before='["up/Concat"] rows = Concat<axis: int = 0>(x, x)', shape="N,{},4,4"
    )
    ran = graphs.run(model, SplitShortcut(), feeds_of(noise))
    assert "joins another axis" in ran.report.skipped[1].reason
    ran.assert_equal()


def test_one_part_of_two_may_fit(graphs, noise):
    """Three operands of which the cut joins two: the other one is read directly."""
    before = '["up/Concat"] three = Concat<axis: int = 1>(hidden, skip, skip)'
    more = {"sizes": np.array([HIDDEN, 2 * SKIP]), "w1": noise.normal(size=(4, 2 * SKIP, 1, 1)).astype(np.float32)}
    ran = graphs.run(network(graphs, noise, joined="three", before=before, **more), SplitShortcut(), feeds_of(noise))
    assert sources(ran)[0] == "hidden"
    assert [item.node for item in ran.report.skipped] == [f"{SHORTCUT}.input_quantizers.1/FakeQuantize"]
    ran.assert_equal()


def test_weights_and_other_cuts_are_left_alone(graphs, noise):
    """The first token's Slice, a GEGLU's Split and the Split of the weight belong to other passes."""
    lines = [
        '["a/Concat"] x = Concat<axis: int = 1>(u, v)',
        '["a/Split"] p, r = Split<axis: int = 1>(x, sizes)',
        graphs.quantize("a.input_quantizer", "q", "p, s, z", -128, 127),
        '["a/Mul"] y = Mul(q, r)',
    ]
    constants = {"sizes": np.array([3, 3]), "s": np.float32([0.1]), "z": np.float32([0])}
    model = graphs.model_of("float[2,3] u, float[2,3] v", "float[2,3] y", "\n".join(lines), constants)
    feeds = {name: noise.normal(size=(2, 3)).astype(np.float32) for name in "uv"}
    ran = graphs.run(model, SplitShortcut(), feeds)
    assert not ran.report.changed
    assert not ran.report.skipped


def test_it_may_run_after_the_weights_are_folded(graphs, noise):
    model = network(graphs, noise)
    graphs.run(model, FoldAdapters(), feeds_of(noise))
    ran = graphs.run(model, SplitShortcut(), feeds_of(noise))
    assert sources(ran) == ["hidden", "skip"]
    ran.assert_equal()
